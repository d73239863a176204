"""foveal sync: send to W&B's server what the runs of a results folder hold and it lacks.

The record is metrics.jsonl; the server says how far it has come (`Tracker`), so nothing is sent twice: not
after a resume, a second sync, a sync that broke off, or a `wandb sync` of a run's first files. Images and
videos are taken from W&B's offline files, artifacts from where these staged them, wherever the run folder
lies now.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from .origin import is_alive, sha256
from .run import Run, list_runs, open_run, write_json
from .tracking import Tracker, axis_of, check_track, wandb_files
from .wandb_file import read_records

MARK = "sent.json"
"""In a run's wandb folder: what of it the server was last seen to have."""


@dataclass(frozen=True)
class Sync:
    """Send runs to W&B's server, whatever of them it does not have yet."""

    paths: tyro.conf.Positional[tuple[Path, ...]] = (Path("results"),)
    """Run folders, or folders of runs (results, or a group of it)."""


def sync_command(given: Sync) -> int:
    folders = run_folders(given.paths)
    check_track("online")
    sent = same = 0
    for folder in folders:
        try:
            run = open_run(folder)
        except ValueError as error:
            print(f"left out: {error}")
            continue
        if run.summary.get("state") == "running" and is_alive(run.summary.get("process", {"host": None})):
            print(f"left out: {folder} is still running")
        elif _state_of(run).items() <= (_marked(run) or {}).items():
            same += 1
        else:
            print(f"sent: {folder} ({send(run):,} rows that the server lacked)")
            sent += 1
    print(f"{sent} runs sent, {same} were there already")
    return 0


def run_folders(paths: Iterable[Path]) -> list[Path]:
    """The run folders at and below `paths`, each once. FileNotFoundError, ValueError for a path of none."""
    return list(dict.fromkeys(folder for path in paths for folder in _run_folders(path)))


def _run_folders(path: Path) -> list[Path]:
    if not path.is_dir():
        raise FileNotFoundError(f"no runs at {path}: there is no such folder")
    if (path / "config.json").is_file():
        return [path]
    below = [entry["path"] for entry in list_runs(path)]
    below += sorted(config.parent for config in path.glob("*/config.json"))  # path is a group
    if not below:
        raise ValueError(f"no runs at {path}")
    return below


def send(run: Run) -> int:
    """Send one run; returns the rows that the server lacked. Raises `ConnectionError` where it does not take
    them; what it has by then is not sent again."""
    tracker = Tracker(run.path, run.config, "online")
    rows = run.rows()
    for index, row in enumerate(rows):
        tracker.log(index, axis_of(row), row)
    sent = (_marked(run) or {}).get("artifacts", [])
    for name, type_, metadata, files in _artifacts(run.path):
        key = f"{name} {metadata.get('sha256')}"
        if key not in sent:  # W&B's server knows them by their content, too
            tracker.artifact(name, type_, files, metadata)
            sent = [*sent, key]
    failed = run.summary.get("state") not in ("finished", "stopped")
    tracker.finish(rows, run.summary, failed=failed)
    if tracker.failure:
        raise ConnectionError(tracker.failure)
    write_json(run.path / "wandb" / MARK, {**_state_of(run), "artifacts": sent})
    return len(rows) - tracker.rows_there


def _artifacts(folder: Path) -> Iterator[tuple[str, str, dict[str, Any], dict[str, Path]]]:
    """The artifacts of the offline files: name, type, metadata, files by name."""
    for file in wandb_files(folder):
        for record in read_records(file):
            if record.WhichOneof("record_type") == "artifact":
                artifact = record.artifact
                files = {e.path: _here(folder, Path(e.local_path)) for e in artifact.manifest.contents}
                if all(path.is_file() for path in files.values()):
                    yield artifact.name, artifact.type, json.loads(artifact.metadata or "{}"), files


def _here(folder: Path, staged: Path) -> Path:
    """Where a staged file lies now: its path is absolute, of the time when it was staged."""
    parts = staged.parts
    if not staged.is_relative_to(folder.resolve()) and "wandb" in parts:
        inside = parts[len(parts) - 1 - parts[::-1].index("data") :]
        return folder / "wandb" / Path(*inside)
    return staged


def _state_of(run: Run) -> dict[str, Any]:
    """What a run holds; another one where it has gone on since."""
    summary = run.path / "summary.json"
    return {
        "rows": len(run.rows()),
        "summary": sha256(summary) if summary.exists() else None,
        "files": len([file for file in wandb_files(run.path) if file.parent.name.startswith("offline-")]),
    }


def _marked(run: Run) -> dict[str, Any] | None:
    try:
        return json.loads((run.path / "wandb" / MARK).read_text())
    except (OSError, ValueError):
        return None
