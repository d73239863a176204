"""Where a run comes from: versions, commit, machine, process, and the digests of what it starts from."""

import contextlib
import hashlib
import importlib.metadata
import os
import platform
import shlex
import socket
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

PACKAGES = (
    "foveal",
    "torch",
    "gymnasium",
    "stable-baselines3",
    "wandb",
    "numpy",
    "ale-py",
    "MinAtar",
    "Box2D",
)


def versions() -> dict[str, str | None]:
    """Of Python and of `PACKAGES`, without importing them; None for one that is not installed."""
    return {"python": platform.python_version()} | {package: _version(package) for package in PACKAGES}


def surroundings() -> dict[str, Any]:
    """When, how and where this process was started, and the commits of the current folder and of foveal."""
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "git": git_commit(Path.cwd()),
        "foveal_git": git_commit(Path(__file__).parent),
        "hostname": socket.gethostname(),
        "platform": platform.platform(),
    }


def sha256(path: str | Path) -> str:
    """The digest of a file, in hexadecimal; of a folder: of its files' names and digests, in order."""
    path = Path(path)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        lines = [f"{sha256(file)}  {file.relative_to(path).as_posix()}\n" for file in files]
        return hashlib.sha256("".join(lines).encode()).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def git_commit(folder: Path) -> dict[str, Any] | None:
    """The commit of a folder's repository, and whether its files differ from it; None outside of one."""

    def git(*command: str) -> str:
        done = subprocess.run(
            ["git", *command], cwd=folder, capture_output=True, text=True, check=True, timeout=10
        )
        return done.stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):
        return None


def process_of(pid: int) -> dict[str, Any]:
    """Who writes a run. Process numbers are used again, so on Linux its start is part of it (clock ticks)."""
    start = None
    with contextlib.suppress(OSError):
        start = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    return {"host": socket.gethostname(), "pid": pid, "start": start}


def is_alive(process: Mapping[str, Any]) -> bool:
    """Whether a process of `process_of` still runs here. False for another machine's: it cannot be known."""
    if process.get("host") != socket.gethostname():
        return False
    try:
        os.kill(process["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # somebody else's
    with contextlib.suppress(OSError):
        stat = Path(f"/proc/{process['pid']}/stat").read_text()
        if stat.rpartition(")")[2].split()[0] in "ZX":  # dead, and not yet collected by its parent
            return False
    return process_of(process["pid"])["start"] == process["start"]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
