"""foveal push and foveal pull: a run to and from a repository of the Hugging Face Hub, or a folder.

    README.md              a model card: what it is, its score, how to pull and evaluate it
    config.json            the run's, without names of this machine and its folders
    metrics.jsonl, summary.json, weights.safetensors, a learning curve and a film where the run has them
    checkpoints/step-*/    with --checkpoint: what `foveal resume` goes on from, replay included

What is pulled is data: JSON, text, pictures, safetensors. Files of other types are left where they are, and a
repository with names that point out of its folder is refused as a whole.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any

import tyro

from ..agents import newest_first
from ..vision import find_weights, read_weights
from .card import model_card
from .origin import is_alive
from .run import Run, open_run, write_json

TYPES = {".json", ".jsonl", ".md", ".safetensors", ".onnx", ".png", ".gif", ".mp4"}
"""What is pulled."""
SHOWN = ("plots/learning_curve.png", "videos/policy.mp4")
"""What is pushed beside the run's record."""
NEEDED = ("config.json", "metrics.jsonl", "weights.safetensors")


@dataclass(frozen=True)
class Push:
    """Send a run to a repository of the Hugging Face Hub, or to a folder, with a model card."""

    run: tyro.conf.Positional[Path]
    """Run folder; a checkpoint in it sends that one's weights instead of the best."""
    repo: tyro.conf.Positional[str]
    """USER/NAME on the Hub, or a folder: ./NAME, /..., ~/... or file:..."""
    update: bool = False
    """Write into a repository or folder that is there already."""
    private: bool = False
    """Of a new repository: only its owner sees it."""
    checkpoint: bool = False
    """Send the newest checkpoint too, optimizer and replay buffer included, so that it can be resumed."""


@dataclass(frozen=True)
class Pull:
    """Fetch a run from a repository of the Hugging Face Hub, or from a folder, into a run folder."""

    repo: tyro.conf.Positional[str]
    """USER/NAME on the Hub, or a folder: ./NAME, /..., ~/... or file:..."""
    out: Path | None = None
    """The run folder to make; by default results/pulled/NAME."""
    revision: str | None = None
    """On the Hub: a branch, tag or commit."""


def push(given: Push) -> int:
    folder = local(given.repo)
    run = open_run(given.run)
    if run.summary.get("state") == "running" and is_alive(run.summary.get("process", {})):
        raise ValueError(f"run {run.path} is still running, as process {run.summary['process']['pid']}")
    weights = find_weights(given.run if given.run.is_file() else Path(given.run))
    if folder is not None and folder.exists() and not given.update:
        raise ValueError(f"{folder} is there already; --update writes into it")
    with tempfile.TemporaryDirectory(prefix="foveal-push-") as made:
        stage(run, weights, Path(made), given.repo, given.checkpoint)
        size = sum(file.stat().st_size for file in Path(made).rglob("*") if file.is_file())
        where = push_folder(Path(made), folder) if folder is not None else push_hub(Path(made), given)
    print(f"pushed {run.path} ({size / 1e6:.2f} MB) to {where}")
    print(f"to fetch it: foveal pull {given.repo}")
    return 0


def stage(run: Run, weights: Path, folder: Path, repo: str, checkpoint: bool) -> None:
    """Put what is pushed of a run into an empty folder."""
    shutil.copyfile(weights, folder / "weights.safetensors")
    write_json(folder / "config.json", portable(run.config))
    summary = {key: value for key, value in run.summary.items() if key != "process"}
    write_json(folder / "summary.json", summary)
    rows = "".join(json.dumps(row) + "\n" for row in run.rows())
    (folder / "metrics.jsonl").write_text(rows, encoding="utf-8")
    shown = [name for name in SHOWN if (run.path / name).is_file()]
    for name in shown:
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(run.path / name, folder / name)
    if checkpoint:
        newest = next(iter(newest_first(run.path / "checkpoints")), None)
        if newest is None:
            raise ValueError(f"checkpoint: {run.path} has none")
        shutil.copytree(newest, folder / "checkpoints" / newest.name)
    description = read_weights(weights)[1]
    place = local(repo)
    named = repo if place is None else f"./{place.name}"  # wherever the folder is carried
    card = model_card(named, str(default_out(repo)), run.config, summary, description, shown)
    (folder / "README.md").write_text(card, encoding="utf-8")


def portable(config: dict[str, Any]) -> dict[str, Any]:
    """A run's config without the machine's name, the command line, and paths of its folders."""
    private = ("hostname", "command")
    origin = {key: value for key, value in config["run"].items() if key not in private}
    clean = {**config, "run": origin}
    if isinstance(options := config.get("options"), dict):
        paths = {"results": "results", "data_dir": None, "init_from": None}
        clean["options"] = options | {key: value for key, value in paths.items() if key in options}
    return clean


def push_folder(made: Path, folder: Path) -> Path:
    """Write files into a folder, each whole or not at all; a new folder appears when all are in it."""
    if folder.exists():
        if not folder.is_dir() or (any(folder.iterdir()) and not (folder / "weights.safetensors").is_file()):
            raise ValueError(f"{folder} is no folder that a run was pushed to")
        for file in sorted(made.rglob("*")):
            if file.is_file():
                target = folder / file.relative_to(made)
                target.parent.mkdir(parents=True, exist_ok=True)
                partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
                shutil.copyfile(file, partial)
                partial.replace(target)
        return folder
    with beside(folder) as partial:
        shutil.copytree(made, partial, dirs_exist_ok=True)
    return folder


def push_hub(made: Path, given: Push) -> str:
    with hub(given.repo) as api:
        from huggingface_hub import CommitOperationAdd, get_token
        from huggingface_hub.errors import HfHubHTTPError

        if get_token() is None:
            raise ValueError(f"push to {given.repo}: no token; `hf auth login` stores one, or set HF_TOKEN")
        try:
            api.create_repo(given.repo, private=given.private or None, exist_ok=given.update)
        except HfHubHTTPError as error:
            if error.response.status_code == 409:
                raise ValueError(f"{given.repo} is taken; --update writes into it") from error
            raise
        files = [file for file in sorted(made.rglob("*")) if file.is_file()]
        done = api.create_commit(  # one commit: the repository has all of it or nothing
            given.repo,
            [CommitOperationAdd(file.relative_to(made).as_posix(), file) for file in files],
            commit_message="A run, by foveal push",
        )
        return str(done.commit_url)


def pull(given: Pull) -> int:
    folder = local(given.repo)
    out = given.out or default_out(given.repo)
    if out.exists():
        raise ValueError(f"out: {out} is there already")
    with beside(out) as partial:
        left = pull_folder(folder, partial) if folder is not None else pull_hub(given, partial)
        check_pulled(partial, given.repo)
    if left:
        print(f"left there, of types that a run has no use for: {', '.join(left)}", file=sys.stderr)
    run, description = open_run(out), read_weights(out / "weights.safetensors")[1]
    trained = description.get("agent") or description.get("model")
    print(f"pulled {trained} on {run.config.get('env_id')} into {out}")
    print(f"to score it: foveal evaluate {out}")
    return 0


def default_out(repo: str) -> Path:
    folder = local(repo)
    return Path("results") / "pulled" / (folder.name if folder is not None else repo.replace("/", "-"))


def pull_folder(source: Path, partial: Path) -> list[str]:
    """Copy a folder's files of known types; the names of others."""
    if not source.is_dir():
        raise ValueError(f"there is no folder {source}")
    files = [file for file in sorted(source.rglob("*")) if not file.is_dir() or file.is_symlink()]
    for file in files:
        if file.is_symlink():
            raise ValueError(f"{source} is refused: {file.relative_to(source)} is a link")
    taken, left = choose([file.relative_to(source).as_posix() for file in files], str(source))
    for name in taken:
        (partial / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, partial / name)
    return left


def pull_hub(given: Pull, partial: Path) -> list[str]:
    """Download a repository's files of known types, all of one commit; the names of others."""
    with hub(given.repo) as api:
        info = api.model_info(given.repo, revision=given.revision)
        taken, left = choose([file.rfilename for file in info.siblings or []], given.repo)
        for name in taken:
            api.hf_hub_download(given.repo, name, revision=info.sha, local_dir=partial)
        shutil.rmtree(partial / ".cache", ignore_errors=True)  # the client's notes on what it fetched
    return left


def choose(names: list[str], source: str) -> tuple[list[str], list[str]]:
    """The names to take and those to leave; hidden files are neither.

    ValueError for a name that is no plain path below the folder, or where what a run needs is not there.
    """
    taken: list[str] = []
    left: list[str] = []
    for name in names:
        parts = PurePosixPath(name).parts
        if ".." in parts or name.startswith(("/", "~")) or re.search(r"[\\:\x00-\x1f]", name):
            raise ValueError(f"{source} is refused: it has a file {name!r}, which points out of it")
        if any(part.startswith(".") for part in parts):
            continue
        (taken if PurePosixPath(name).suffix in TYPES else left).append(name)
    if lacking := [name for name in NEEDED if name not in taken]:
        raise ValueError(f"{source} holds no run that foveal pushed: it has no {' and no '.join(lacking)}")
    return taken, left


def check_pulled(folder: Path, source: str) -> None:
    """ValueError where what was fetched is no run that this version reads; nothing in it is executed."""
    try:
        description = read_weights(folder / "weights.safetensors")[1]
        run = open_run(folder)
        run.rows()
        whole = {"run", "agent"} <= run.config.keys() and {"agent", "model"} & description.keys()
    except (ValueError, TypeError, KeyError) as error:
        text = str(error).replace(f"{folder}/", "")
        raise ValueError(f"{source} holds no run that foveal pushed: {text}") from error
    if not whole:
        raise ValueError(f"{source} holds no run that foveal pushed: its config.json is of something else")


@contextlib.contextmanager
def beside(folder: Path) -> Iterator[Path]:
    """A folder to fill next to `folder`, whose name it gets at the end; nothing stays of one that failed."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    for old in folder.parent.glob(f".{folder.name}.*.partial"):  # of a process that was killed
        pid = old.name.split(".")[-2]
        if pid.isdecimal() and not Path(f"/proc/{pid}").exists():
            shutil.rmtree(old, ignore_errors=True)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    partial.mkdir()
    try:
        yield partial
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def local(repo: str) -> Path | None:
    """The folder that a repository's name means, None for one on the Hub. ValueError for neither."""
    if repo.startswith("file:"):
        return Path(re.sub(r"^file:(//)?", "", repo)).expanduser().absolute()
    if repo.startswith((".", "~")) or Path(repo).is_absolute():
        return Path(repo).expanduser().absolute()
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", repo):
        return None
    raise ValueError(f"repo takes USER/NAME on the Hub, or a folder such as ./NAME; got {repo!r}")


@contextlib.contextmanager
def hub(repo: str) -> Iterator[Any]:
    """The Hub's client; what goes wrong with it is a ValueError of one line."""
    if importlib.util.find_spec("huggingface_hub") is None:
        raise ValueError("foveal push and pull need huggingface_hub: pip install 'foveal[hub]'")
    import huggingface_hub
    from huggingface_hub import errors
    from huggingface_hub.utils.logging import set_verbosity_error
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()
    set_verbosity_error()  # it warns at every try again, and then raises what is told below
    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    try:
        yield huggingface_hub.HfApi(
            endpoint, library_name="foveal", library_version=metadata.version("foveal")
        )
    except errors.GatedRepoError as error:
        raise ValueError(f"{repo} is gated: ask for access on {endpoint}/{repo}") from error
    except errors.RepositoryNotFoundError as error:
        hint = "" if huggingface_hub.get_token() else ", or one that takes a token (`hf auth login`)"
        raise ValueError(f"there is no repository {repo} at {endpoint}{hint}") from error
    except errors.RevisionNotFoundError as error:
        raise ValueError(f"{repo} has no such revision") from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        why = {401: "the token is not taken", 403: "this token may not do that"}.get(status, str(error))
        raise ValueError(f"{endpoint} refused ({status}) for {repo}: {' '.join(why.split())}") from error
    except Exception as error:
        # The client's HTTP library has changed with its versions, and its errors with it.
        network = type(error).__module__.split(".")[0] in ("httpx", "httpx2", "httpcore", "requests")
        if not network and not isinstance(error, errors.LocalEntryNotFoundError | ConnectionError):
            raise
        raise ValueError(
            f"no connection to {endpoint} ({type(error).__name__}); nothing was changed here"
        ) from error
