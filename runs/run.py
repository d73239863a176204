"""A run is one folder: `results/<group>/<name>-<id>/`.

    config.json     what was asked for: the trainer's config; under "run" and "versions", where it came from
    metrics.jsonl   the record: one flat JSON object a row, each with its axis (NaN as Python writes it)
    summary.json    the scores, and "state"; while the run is on, "process" says who writes it
    checkpoints/ videos/ plots/ wandb/

Nothing in the folder is found by an absolute path: copied elsewhere it opens, resumes and loads there.
"""

import contextlib
import functools
import itertools
import json
import os
import re
import secrets
import shutil
import socket
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .origin import is_alive, process_of, sha256, surroundings, versions
from .tracking import AXES, Tracker, axis_of, check_track

STATES = ("running", "finished", "stopped", "failed")
"""finished: reached its end. stopped: ended early (Ctrl-C, SIGTERM, a score reached). failed: raised.
`list_runs` also says killed (was running, its process is gone) and damaged."""
TIME_KEYS = ("time/", "speed/")
"""Keys that start with these measure the machine, not the training: they differ each time."""
FOLDERS = ("checkpoints", "videos", "plots")

Value = int | float | str | bool


class Run:
    """A run folder that is open: made by `create_run`, `resume_run` (both ready to log) or `open_run` (to
    look at, and to add to its summary)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = _read_json(path / "config.json")
        """config.json: the trainer's keys, and "run" and "versions"."""
        origin = self.config.get("run")
        if not isinstance(origin, dict) or not origin.keys() >= {"id", "group", "name", "track", "started"}:
            raise ValueError(
                f'{path / "config.json"} is not that of a run: it does not say which, under "run"'
            )
        self.id: str = origin["id"]
        """Eight hexadecimal digits; W&B's run id too."""
        self.summary: dict[str, Any] = {}
        """summary.json. Change it through `summarize`."""
        if (path / "summary.json").exists():
            self.summary = _read_json(path / "summary.json")
        self._fd: int | None = None  # metrics.jsonl, while the run is on
        self._tracker: Tracker | None = None
        self.track = "off"
        """While the run is on: offline, online or off."""
        self._rows = self._size = 0  # of metrics.jsonl, and its bytes
        # Of a resumed run: rows that may come again, by axis and step; how far the file went; differences.
        self._known: dict[tuple[str, int], list[dict[str, Any]]] = {}
        self._last: dict[str, int] = {}
        self._mismatches = 0

    def rows(self) -> list[dict[str, Any]]:
        """All rows of metrics.jsonl, oldest first; a torn last line is left out."""
        return _read_rows(self.path / "metrics.jsonl")[0]

    def log(self, row: Mapping[str, Any]) -> None:
        """Append one row to metrics.jsonl, handed to the operating system before this returns, and to W&B.

        `row` is flat: an axis (`env_step`, `grad_step` or `epoch`: the first of these that it has), and int,
        float, str or bool values (NumPy and torch scalars too). In a resumed run, a row that the file already
        has is only compared with it, keys of `TIME_KEYS` aside and NaN equal to NaN. If they differ, the
        file's row stays (W&B has it already), the first difference is a warning, and summary.json counts them
        under "resume_mismatch".

        Raises `ValueError` for a row without an axis, `TypeError` for any other value, `OSError` if the row
        cannot be written (disk full); the file then ends with the row before.
        """
        if self._fd is None:
            raise RuntimeError(f"run {self.path} is not on: create_run and resume_run give one that is")
        row = dict(row)
        line = _line(row)
        axis = axis_of(row)
        if axis in self._last and row[axis] <= self._last[axis] and self._came_before(axis, row):
            return
        rest = line
        try:
            while rest:  # once round, but on a disk that fills up in the middle of a row
                rest = rest[os.write(self._fd, rest) :]
        except OSError as error:
            os.ftruncate(self._fd, self._size)
            raise _cannot_write(self.path / "metrics.jsonl", error) from error
        self._size += len(line)
        if self._tracker:
            self._tracker.log(self._rows, axis, row)
        self._rows += 1

    def configure(self, values: Mapping[str, Any]) -> None:
        """Merge `values` (JSON-able) into config.json, replaced in one step: the run goes on with others."""
        self.config.update(values)
        write_json(self.path / "config.json", self.config)

    def rewind(self, step: int) -> None:
        """Forget the rows after `step`, of a run that is not on and will go on differently from there.

        W&B's offline files, which are a view of the rows, go too: the next start writes them anew.
        """
        rows = [row for row in self.rows() if row[axis_of(row)] <= step]
        if len(rows) == len(self.rows()):
            return
        metrics = self.path / "metrics.jsonl"
        draft = metrics.with_name(".metrics.jsonl.rewind")
        draft.write_bytes(b"".join(json.dumps(row).encode() + b"\n" for row in rows))
        draft.replace(metrics)
        shutil.rmtree(self.path / "wandb", ignore_errors=True)

    def summarize(self, values: Mapping[str, Any]) -> None:
        """Merge `values` (JSON-able; scalars of NumPy and torch too) into summary.json, replaced in one step.

        Raises `OSError` if it cannot be written; the old file then stays."""
        plain = {key: value.item() if hasattr(value, "item") else value for key, value in values.items()}
        summary = {**self.summary, **plain}
        write_json(self.path / "summary.json", summary)
        self.summary = summary

    def image(self, key: str, path: str | Path, **axis: int) -> None:
        """Show an image file in W&B, at `env_step=`, `grad_step=` or `epoch=`. Tracking off: no effect."""
        if self._tracker:
            self._tracker.media("image", key, Path(path), axis)

    def video(self, key: str, path: str | Path, **axis: int) -> None:
        """Show an mp4 file in W&B, at `env_step=`, `grad_step=` or `epoch=`. Tracking off: no effect."""
        if self._tracker:
            self._tracker.media("video", key, Path(path), axis)

    def artifact(self, name: str, type: str, path: str | Path, metadata: Mapping[str, Any]) -> str:
        """Give W&B a file or a folder (a checkpoint) as the artifact `<name>-<run id>`. Returns its `sha256`,
        which is in the artifact's metadata too."""
        digest = sha256(path)
        if self._tracker:
            self._tracker.artifact(f"{name}-{self.id}", type, Path(path), {**metadata, "sha256": digest})
        return digest

    def finish(self, state: str) -> None:
        """End the run: `state` is finished, stopped or failed. All rows are in W&B's file when this returns.

        May be called from a signal handler and more than once: the first call counts."""
        if state not in STATES[1:]:
            raise ValueError(f"state: got {state!r}, takes one of {', '.join(STATES[1:])}")
        if self._fd is None:
            return
        fd, self._fd = self._fd, None
        os.close(fd)
        self.summary = {key: value for key, value in self.summary.items() if key != "process"}
        try:
            self.summarize({"state": state})
        finally:
            if self._tracker:
                tracker, self._tracker = self._tracker, None
                try:
                    tracker.finish(self.rows(), self.summary, failed=state == "failed")
                finally:
                    if tracker.failure:
                        warnings.warn(tracker.failure, stacklevel=1)

    def _start(self, track: str) -> None:
        """Open metrics.jsonl for writing, mark the run as running, start W&B and send it what it lacks."""
        metrics = self.path / "metrics.jsonl"
        rows, whole = _read_rows(metrics)
        before = self.summary
        fd = os.open(metrics, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.ftruncate(fd, whole)
            self.summarize({"state": "running", "process": process_of(os.getpid())})
            self.track = track
            if track != "off":
                self._tracker = Tracker(self.path, self.config, track)
        except BaseException:
            os.close(fd)
            with contextlib.suppress(OSError):
                self.summary = before
                self.summarize({})
            raise
        self._fd = fd
        self._rows, self._size = len(rows), whole
        for index, row in enumerate(rows):
            axis = axis_of(row)
            self._known.setdefault((axis, row[axis]), []).append(row)
            self._last[axis] = max(row[axis], self._last.get(axis, row[axis]))
            if self._tracker:
                self._tracker.log(index, axis, row)

    def _came_before(self, axis: str, row: dict[str, Any]) -> bool:
        """Whether metrics.jsonl has this row; compares the two. Rows of one step (training, evaluation) are
        told apart by their keys."""
        known = self._known.get((axis, row[axis]), [])
        keys = _compared(row).keys()
        for index, old in enumerate(known):
            if _compared(old).keys() == keys:
                del known[index]
                differing = [key for key in keys if not _same(old[key], row[key])]
                if differing:
                    key = differing[0]
                    self._mismatch(f"{key} at {axis} {row[axis]} was {old[key]}, and is now {row[key]}")
                return True
        if row[axis] == self._last[axis]:
            return False  # killed between two rows of the last step: this one was not written yet
        self._mismatch(f"there was no row of {', '.join(keys)} at {axis} {row[axis]}")
        return True

    def _mismatch(self, what: str) -> None:
        self._mismatches += 1
        count = {"resume_mismatch": self.summary.get("resume_mismatch", 0) + 1}
        if self._mismatches > 1:
            self.summary |= count  # written with the next summary: each is a wait for the disk
            return
        self.summarize(count)
        warnings.warn(
            f"this resumed run is not the one that was stopped: {what}. metrics.jsonl keeps its old rows",
            stacklevel=4,
        )


def create_run(
    results: str | Path,
    *,
    group: str,
    name: str,
    config: Mapping[str, Any],
    tags: Sequence[str] = (),
    track: str = "offline",
    job_type: str = "train",
    parents: Sequence[str | Path] = (),
) -> Run:
    """Make the folder `results/<group>/<name>-<id>/` and start the run.

    `config` is JSON-able (`agent`, `env_id`, `seed`, ...; not "run" or "versions"). Characters of `group` and
    `name` that a folder's name is better off without become "-". `track` is offline, online or off. `parents`
    are files that the run starts from, such as a checkpoint's weights; their sha256 goes into config.json. No
    random generator of the training is touched.

    Raises `ValueError` for bad arguments, `OSError` if the folder cannot be written; nothing is left behind.
    """
    check_track(track)
    if taken := {"run", "versions"} & set(config):
        raise ValueError(f"config: the keys {', '.join(sorted(taken))} are the run folder's own")
    run_id = secrets.token_hex(4)
    origin = {
        "id": run_id,
        "group": group,
        "name": name,
        "job_type": job_type,
        "tags": list(tags),
        "track": track,
        **surroundings(),
        "parents": [_parent(Path(parent)) for parent in parents],
    }
    path = Path(results) / folder_name("group", group) / f"{folder_name('name', name)}-{run_id}"

    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        for inside in FOLDERS:
            (path / inside).mkdir(parents=True)
        write_json(path / "config.json", {**config, "run": origin, "versions": versions()})
        run = Run(path)
        run._start(track)
    except BaseException as error:
        shutil.rmtree(path, ignore_errors=True)
        for folder in made[1:]:
            with contextlib.suppress(OSError):
                folder.rmdir()  # what another run has put something into since is not empty, and stays
        if isinstance(error, OSError) and error.errno:
            raise _cannot_write(path, error) from error
        raise
    return run


def open_run(path: str | Path) -> Run:
    """The run at `path`, which is its folder or anything inside it. Changes nothing: for `config`, `summary`,
    `rows` and `summarize`.

    Raises `FileNotFoundError` if there is nothing at `path`, `ValueError` if it is no run folder or a damaged
    one."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no run at {path}: there is no such file or folder")
    for folder in (path, *path.absolute().parents):
        if (folder / "config.json").is_file() and (folder / "metrics.jsonl").is_file():
            return Run(folder)
    lacking = [file for file in ("config.json", "metrics.jsonl") if not (path / file).is_file()]
    raise ValueError(f"not a run folder: {path} has no {' and no '.join(lacking)}")


def resume_run(path: str | Path, *, track: str | None = None) -> Run:
    """Open the run at `path` and start it again: a torn last line of metrics.jsonl is dropped, W&B is sent
    the rows that it lacks, and rows that come again are compared (`Run.log`). `track=None`: as before.

    Raises as `open_run` does, `ValueError` if the run still goes on, `OSError` if it cannot be written."""
    run = open_run(path)
    track = run.config["run"]["track"] if track is None else track
    check_track(track)
    process = run.summary.get("process", {})
    if run.summary.get("state") == "running" and is_alive(process) and process["pid"] != os.getpid():
        raise ValueError(f"run {run.path} is still running, as process {process['pid']}")
    try:
        run._start(track)
    except ConnectionError as error:
        if track != "online":
            raise
        warnings.warn(f"{error}. The run goes on offline", stacklevel=2)
        run._start("offline")
    except OSError as error:
        if error.errno:
            raise _cannot_write(run.path, error) from error
        raise
    return run


def list_runs(results: str | Path) -> list[dict[str, Any]]:
    """One dict for each run of `results`, oldest first: path, group, name, started, agent, env_id, seed,
    state, score, test_error, fid, bits_per_dim, nats, wall_s, and how far it came on each axis (env_step,
    grad_step, epoch). None: it has none.

    A folder that cannot be read has path, group, name, state "damaged" and an "error". Raises
    `FileNotFoundError` if `results` is no folder."""
    if not Path(results).is_dir():
        raise FileNotFoundError(f"results: there is no folder {results}")
    runs = []
    for config in Path(results).glob("*/*/config.json"):
        path = config.parent
        entry: dict[str, Any] = {"path": path, "group": path.parent.name, "name": path.name}
        try:
            runs.append(entry | _describe(Run(path)))
        except (ValueError, OSError) as error:
            runs.append(entry | {"state": "damaged", "error": str(error)})
    return sorted(runs, key=lambda run: (run.get("started") or "", str(run["path"])))


def _describe(run: Run) -> dict[str, Any]:
    origin, summary = run.config["run"], run.summary
    rows = run.rows()
    return {
        **{key: origin[key] for key in ("group", "name", "started")},
        **{key: run.config.get(key) for key in ("agent", "env_id", "seed")},
        **{axis: max((row[axis] for row in rows if axis in row), default=None) for axis in AXES},
        "state": describe_state(summary),
        "score": summary.get("eval/return_mean"),
        "test_error": summary.get("test/error"),
        **{name: summary.get(f"test/{name}") for name in ("fid", "bits_per_dim", "nats")},
        "wall_s": summary.get("wall_s"),
    }


def describe_state(summary: Mapping[str, Any]) -> str | None:
    """The state in a summary, or "killed" where it is that of a run whose process is gone."""
    state, process = summary.get("state"), summary.get("process", {})
    if state == "running" and process.get("host") == socket.gethostname() and not is_alive(process):
        return "killed"
    return state


def _compared(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if not key.startswith(TIME_KEYS)}


def _line(row: dict[str, Any]) -> bytes:
    """The row as a line of JSON, as json.dumps writes it; in `row`, plain values take the place of scalars of
    NumPy and torch.

    Every training waits for this with whatever it has computed in the caches, where it is the number of
    instructions passed for the first time that counts: json.dumps takes half as long again.
    """
    parts = []
    for key, value in row.items():
        kind = type(value)
        if kind is int or (kind is float and value - value == 0):
            parts.append(f"{_name(key)}{value!r}")
        else:  # text, truth, what is not finite, scalars of libraries
            row[key] = _plain(key, value)
            parts.append(_name(key) + json.dumps(row[key]))
    return ("{" + ", ".join(parts) + "}\n").encode()


@functools.cache
def _name(key: str) -> str:
    return json.dumps(key) + ": "


def _plain(key: str, value: Any) -> Value:
    if isinstance(value, int | float | str):  # bool is an int, NumPy's float64 a float
        return value
    with contextlib.suppress(AttributeError, ValueError, RuntimeError):  # no scalar: several elements
        return _plain(key, value.item())
    raise TypeError(f"{key}: got {type(value).__name__}, a row takes int, float, str or bool")


def _same(old: Value, new: Value) -> bool:
    return old == new or (old != old and new != new)  # NaN is what NaN is


def _read_rows(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The rows of metrics.jsonl and the bytes that they take, without a torn last line."""
    rows: list[dict[str, Any]] = []
    whole = 0
    if not path.exists():
        return rows, whole
    lines = path.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            axis_of(row)
        except (ValueError, TypeError) as error:
            if number < len(lines):
                raise ValueError(f"{path} is damaged at line {number}: {error}") from error
            break
        if not line.endswith(b"\n"):
            break
        rows.append(row)
        whole += len(line)
    return rows, whole


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: it is not a JSON object")
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Replace `path` in one step: a reader, and a run that was killed, has the old file or the new one."""
    # A name of its own each time: a signal handler may write the same file in the middle of this.
    draft = path.with_name(f".{path.name}.{next(_drafts)}")
    try:
        with draft.open("w", encoding="utf-8") as file:
            file.write(json.dumps(content, indent=2) + "\n")
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except BaseException as error:
        draft.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise _cannot_write(path, error) from error
        raise


_drafts = itertools.count()


def _cannot_write(path: Path, error: OSError) -> OSError:
    """The same error in one line that names the folder (and without its number, which would come first)."""
    return type(error)(f"cannot write {path}: {error.strerror}")


def folder_name(argument: str, text: str) -> str:
    name = re.sub(r"[^A-Za-z0-9._=+]+", "-", text).strip("-.")
    if not name:
        raise ValueError(f"{argument}: got {text!r}, takes a name with a letter or a digit")
    return name


def _parent(path: Path) -> dict[str, Any]:
    """What a run was started from, by content: the file may move."""
    parent = {"file": path.name, "sha256": sha256(path)}
    with contextlib.suppress(ValueError):
        parent["run"] = open_run(path).id
    return parent
