"""The W&B side of a run: a view of metrics.jsonl for dashboards, offline unless asked for otherwise.

wandb is imported when a run starts (half a second or more) and its calls are made by one thread behind a
queue: a call takes W&B 0.2 ms and more, of which the training should only pay for the queue. Rows carry their
axis and are never given a `step=`, which drops rows that come late.
"""

import contextlib
import netrc
import os
import queue
import shlex
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .wandb_file import has_exit, is_media, read_history

AXES = ("env_step", "grad_step", "epoch")
"""What a row can be logged against: steps of all environments together, gradient steps, epochs."""
TRACKS = ("offline", "online", "off")
PROJECT = "foveal"
"""W&B's project, unless WANDB_PROJECT names another."""
QUEUE = 10_000
"""Items that may wait for W&B. A caller that is further ahead waits: nothing is dropped."""

FINISH_S = 30
"""Seconds that the end of a run may wait for W&B's process to write the end of its file."""
SERVER_S = 10
"""Seconds to wait for W&B's server before a run starts."""
PATIENCE_S = 3
"""Seconds that the end of an online run waits before it says so."""
SEND_S = 120
"""Seconds that the end of an online run may wait for the server to take the rest."""


class Tracker:
    """A W&B run of the run folder `folder`, whose config.json is `config`.

    It reads which rows earlier W&B files of this folder hold and does not send them again. Should W&B fail
    later, that is one warning: training goes on, and `resume` sends what is missing from metrics.jsonl.

    Raises `ConnectionError` if W&B does not start.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], track: str) -> None:
        self._folder, self._track = folder, track
        lines = wandb_lines(folder)
        if track == "online":
            check_server(
                "nothing was sent, all rows are kept in the run folders; train with --track offline, and "
                "send them later with `foveal sync RESULTS`"
            )
        with contextlib.ExitStack() as stack:
            stack.enter_context(wandb_environment(folder))
            try:
                self._wandb_run = _init(folder, config, track)
            except Exception as error:
                raise ConnectionError(f"W&B (track {track}) did not start: {error}") from error
            self._leave = stack.pop_all().close
        # Offline, what the files hold counts as sent; online, what has reached the server.
        there = len(lines) if track != "online" else min(len(lines), self._wandb_run.starting_step)
        self.rows_there = sum(not is_media(line.row) for line in lines[:there])
        self._media_sent = {key for line in lines for key in _media_keys(line.row)}
        self._declared: set[str] = set()
        self.failure: str | None = None
        """Once W&B gets nothing more: why, what is kept where, and how to send it, in one line."""
        # Of the queues, the one whose put a signal handler may interrupt and call again.
        self._queue: queue.SimpleQueue[tuple[Any, ...] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._write, name="wandb-writer", daemon=True)
        self._thread.start()
        for line in lines[there:]:
            if is_media(line.row):
                self._put(self._media_again, line)

    def log(self, index: int, axis: str, row: Mapping[str, Any]) -> None:
        """Row number `index` of metrics.jsonl."""
        if index >= self.rows_there:
            self._put(self._log, axis, row)

    def media(self, kind: str, key: str, path: Path, axis: Mapping[str, int]) -> None:
        """An "image" or a "video" (mp4) at one axis, unless this run's W&B files already have it."""
        if len(axis) != 1 or not axis.keys() <= set(AXES):
            raise ValueError(f"{key}: got axes {', '.join(axis) or 'none'}, takes one of {', '.join(AXES)}")
        if not path.is_file():
            raise FileNotFoundError(f"{key}: there is no file {path}")
        if (key, *next(iter(axis.items()))) not in self._media_sent:
            self._put(self._media, kind, key, path, axis)

    def artifact(
        self, name: str, type: str, path: Path | Mapping[str, Path], metadata: Mapping[str, Any]
    ) -> None:
        """A file, a folder, or files by the names that they have in the artifact."""
        self._put(self._artifact, name, type, path, metadata)

    def finish(self, rows: list[dict[str, Any]], summary: Mapping[str, Any], *, failed: bool) -> None:
        """Wait until everything is sent, set W&B's summary to that of the whole run, and end."""
        self._put(self._finish, rows, summary, failed)
        self._queue.put(None)
        try:
            self._thread.join(PATIENCE_S)
            if self._thread.is_alive() and self._track == "online":
                words = f"waiting for W&B's server (Ctrl-C ends it): {self._folder} has everything"
                print(words, file=sys.stderr, flush=True)
            self._thread.join()
        except KeyboardInterrupt:
            self._fail("interrupted")
            _kill_service()
            raise
        finally:
            self._leave()

    def _put(self, *item: Any) -> None:
        while self._queue.qsize() >= QUEUE:
            time.sleep(0.01)
        self._queue.put(item)

    def _write(self) -> None:
        while item := self._queue.get():
            do, *arguments = item
            if self.failure:
                continue
            try:
                do(*arguments)
            except Exception as error:
                self._failed(do, error)

    def _failed(self, do: Callable[..., None], error: Exception) -> None:
        reason = str(error).rstrip(".") or type(error).__name__
        if do in (self._media, self._media_again, self._artifact):
            lost = "The run goes on: one image, video or artifact is not in W&B"
            warnings.warn(f"W&B failed: {reason}. {lost}", stacklevel=1)
            return
        # Rows are sent in order or not at all: a resume counts those that are there.
        self._fail(reason)
        if do != self._finish:
            warnings.warn(f"W&B failed: {reason}. The run goes on without it", stacklevel=1)
        import wandb

        with contextlib.suppress(Exception):
            wandb.teardown()  # or W&B's own hook shows a traceback when Python exits

    def _fail(self, reason: str) -> None:
        self.failure = self.failure or (
            f"W&B has not all of this run ({reason}): it is kept whole in {self._folder}; "
            f"send the rest with `foveal sync {shlex.quote(str(self._folder))}`"
        )

    def _log(self, axis: str, row: Mapping[str, Any]) -> None:
        for key in row:
            if key not in self._declared:
                self._declare(key, axis)
        self._wandb_run.log(dict(row))

    def _declare(self, key: str, axis: str) -> None:
        """A family of metrics (`train/*`) goes against the axis that it first came with; those with a best
        value keep it in W&B's summary beside the last one."""
        self._declared.add(key)
        family = f"{key.split('/')[0]}/*" if "/" in key else key
        if key in AXES:
            self._wandb_run.define_metric(key)
        elif family not in self._declared:
            self._declared.add(family)
            self._wandb_run.define_metric(family, step_metric=axis)
        if best := best_of(key):
            # "max" alone would take the plain last value out of the summary
            self._wandb_run.define_metric(key, step_metric=axis, summary=f"{best},last")

    def _media(self, kind: str, key: str, path: Path, axis: Mapping[str, int]) -> None:
        import wandb

        media = wandb.Image(str(path)) if kind == "image" else wandb.Video(str(path), format="mp4")
        self._log(next(iter(axis)), {**axis, key: media})

    def _media_again(self, line: "Line") -> None:
        """An image or a video that an earlier file holds and the server lacks."""
        import wandb

        kinds = {"image-file": wandb.Image, "video-file": wandb.Video}
        row = dict(line.row)
        for key, value in line.row.items():
            if isinstance(value, dict):
                row[key] = kinds[value["_type"]](str(line.files / value["path"]))
        self._log(axis_of(row), row)

    def _artifact(
        self, name: str, type: str, path: Path | Mapping[str, Path], metadata: Mapping[str, Any]
    ) -> None:
        import wandb

        artifact = wandb.Artifact(name, type=type, metadata=dict(metadata))
        if isinstance(path, Path):
            files = [file for file in sorted(path.rglob("*")) if file.is_file()] if path.is_dir() else [path]
            root = path if path.is_dir() else path.parent
            path = {file.relative_to(root).as_posix(): file for file in files}
        for inside, file in path.items():  # one by one, since add_dir prints
            artifact.add_file(str(file), name=inside)
        self._wandb_run.log_artifact(artifact)

    def _finish(self, rows: list[dict[str, Any]], summary: Mapping[str, Any], failed: bool) -> None:
        # Left alone, the summary would be that of the rows since the last resume.
        self._wandb_run.summary.update(whole_summary(rows, summary))
        self._wandb_run.finish(exit_code=1 if failed else 0)
        if self._track == "online":
            return
        # That returns before W&B's process has written everything, and a resume would send the rest again.
        file = next(Path(self._wandb_run.settings.sync_dir).glob("*.wandb"))
        deadline = time.monotonic() + FINISH_S
        while not has_exit(file) and time.monotonic() < deadline:
            time.sleep(0.02)


def axis_of(row: Mapping[str, Any]) -> str:
    """The axis that a row is logged against. Raises `ValueError` if it has none, or one that is no int."""
    for axis in AXES:
        if type(row.get(axis)) is int:
            return axis
        if axis in row:
            if isinstance(row[axis], int) and not isinstance(row[axis], bool):
                return axis
            raise ValueError(f"{axis}: got {row[axis]!r}, takes an int")
    raise ValueError(f"a row needs an axis ({', '.join(AXES)}): got {', '.join(row) or 'an empty row'}")


def check_track(track: str) -> None:
    """Raises `ValueError` for an unknown mode, and for online without a key of W&B's."""
    if track not in TRACKS:
        raise ValueError(f"track: got {track!r}, takes {', '.join(TRACKS)}")
    if track == "online" and not _has_key():
        raise ValueError("track: online needs a W&B key: run `wandb login`, or set WANDB_API_KEY")


def best_of(key: str) -> str | None:
    """Whether the best value of a metric is its "max" or its "min"; None where it has no best one."""
    if key.endswith("return_mean"):
        return "max"
    if key.endswith(("loss", "error", "bits_per_dim", "nats")):
        return "min"
    return None


def whole_summary(rows: list[dict[str, Any]], summary: Mapping[str, Any]) -> dict[str, Any]:
    """What W&B shows in its table of runs: the last value of each metric, with the best where there is one,
    and summary.json, which has the last word."""
    whole: dict[str, Any] = {}
    for row in rows:
        whole.update(row)
    whole.update(summary)
    for key, last in whole.items():
        if best := best_of(key):
            values = [row[key] for row in rows if key in row and row[key] == row[key]]
            if not values and key.startswith("eval/"):
                values = [last]  # never evaluated while it trained: its score has the same name nevertheless
            if values:
                whole[key] = {best: max(values) if best == "max" else min(values), "last": last}
    return whole


@dataclass(frozen=True)
class Line:
    """A row or an image in W&B's files of a run, and the folder of the files that it names."""

    row: dict[str, Any]
    files: Path


def wandb_lines(folder: Path) -> list[Line]:
    """What the W&B files of a run folder hold, in the order that it has in W&B.

    Rows are sent in order and only the end of a file is ever lost, so an offline file holds what follows on
    the files before it. An online one begins at the step that the server had, which may be before that.
    """
    lines: list[Line] = []
    for file in wandb_files(folder):
        new = list(read_history(file))
        if not file.parent.name.startswith("offline-") and new:
            del lines[new[0][0] :]
        lines += [Line(row, file.parent / "files") for _, row in new]
    return lines


def wandb_files(folder: Path) -> list[Path]:
    """The W&B files of a run folder, oldest first."""
    files = (folder / "wandb").glob("*run-*/*.wandb")
    return sorted(files, key=lambda file: file.parent.name.removeprefix("offline-"))


def _media_keys(row: Mapping[str, Any]) -> list[tuple[str, str, int]]:
    """(key, axis, step) of a row's images and videos."""
    keys = [key for key, value in row.items() if isinstance(value, dict) and "_type" in value]
    return [(key, axis, row[axis]) for key in keys for axis in AXES if axis in row]


def server_url() -> str:
    """W&B's server, as W&B itself finds it: a variable, the settings of `wandb login --host`, its default."""
    if url := os.environ.get("WANDB_BASE_URL"):
        return url
    import wandb

    settings = wandb.Settings()  # not wandb.setup(), which starts W&B's process
    with contextlib.suppress(AttributeError):  # not promised by W&B
        settings.update_from_system_settings()
    return str(settings.base_url)


def check_server(kept: str) -> None:
    """Raises `ConnectionError`, which says what was kept and how to send it, where W&B's server does not
    answer; W&B itself tries that for 90 seconds."""
    url = server_url()
    try:
        urllib.request.urlopen(url, timeout=SERVER_S).close()
    except urllib.error.HTTPError:
        pass  # it answers
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise ConnectionError(f"W&B's server {url} does not answer ({reason}): {kept}") from error


def _init(folder: Path, config: Mapping[str, Any], track: str) -> Any:
    import wandb

    origin = config["run"]
    options: dict[str, Any] = {
        "mode": track,
        "root_dir": str(folder),
        "console": "off",
        "silent": True,
        "symlink": False,
        "disable_git": True,  # config.json has the commit
        "disable_code": True,
        "save_code": False,
        "disable_job_creation": True,
        "x_save_requirements": False,
    }
    if track == "online":
        # The server by name: W&B keeps what it found at its first start in a process.
        options |= {
            "base_url": server_url(),
            "init_timeout": 30.0,
            "finish_timeout": float(SEND_S),
            "finish_timeout_raises": True,
        }
    # Rows then reach the file within a second; by default, a kill loses 15. An internal setting: it may go.
    try:
        settings = wandb.Settings(**options, x_transaction_log_flush_interval=1)
    except (ValueError, TypeError):
        settings = wandb.Settings(**options)
    run = wandb.init(
        settings=settings,
        project=os.environ.get("WANDB_PROJECT") or PROJECT,
        id=origin["id"],
        # Offline, every start is a file of its own; the files of one id become one run when they are synced.
        resume="allow" if track == "online" else None,
        reinit="create_new",
        group=origin["group"],
        name=origin["name"],
        job_type=origin["job_type"],
        tags=origin["tags"],
        config=dict(config),
    )
    # A link by absolute path: once the folder has moved it dangles, and copying the folder trips over it.
    for logs in folder.glob("wandb/*run-*/logs"):
        (logs / "debug-core.log").unlink(missing_ok=True)  # glob would not find it where it dangles already
    return run


def _kill_service() -> None:
    """End W&B's process, which at Python's exit would wait for its server. This reaches into W&B; where that
    has become another, it does nothing."""
    import wandb

    with contextlib.suppress(Exception):
        wandb.setup()._connection._proc._process.kill()  # type: ignore[union-attr]
    with contextlib.suppress(Exception, SystemExit):  # it exits, as killed as its process
        wandb.teardown()


@contextlib.contextmanager
def wandb_environment(folder: Path) -> Iterator[None]:
    """W&B stages artifacts and keeps its logs in the home folder; these variables, which it reads at any
    time, keep a run in one place. Error reports would go over the network, offline too."""
    wanted = {
        "WANDB_DATA_DIR": str(folder / "wandb" / "data"),
        "WANDB_CACHE_DIR": str(folder / "wandb" / "cache"),
        "WANDB_ERROR_REPORTING": "false",
        "WANDB_DISABLE_GIT": "true",
        "WANDB_SILENT": "true",
    }
    before = {key: os.environ.get(key) for key in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    hosts = [urllib.parse.urlsplit(server_url()).netloc]
    if hosts[0].endswith("forge.coreweave.com"):
        hosts.append("api.wandb.ai")  # the same server, by the name that older logins have
    for file in (os.environ.get("NETRC"), "~/.netrc", "~/_netrc"):
        if file:
            with contextlib.suppress(OSError, netrc.NetrcParseError):
                found = netrc.netrc(os.path.expanduser(file))
                return any(found.authenticators(host) is not None for host in hosts)
    return False
