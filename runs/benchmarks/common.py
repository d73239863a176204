"""What every benchmark records beside its figures, and how it writes them."""

from __future__ import annotations

import argparse
import datetime
import fcntl
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "measured"


def argument_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser whose --help is a module's docstring, as it stands."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def at_least(low: int) -> Callable[[str], int]:
    """The type of an argument that is a whole number, `low` or more."""

    def take(given: str) -> int:
        if not given.isdecimal() or int(given) < low:
            raise argparse.ArgumentTypeError(f"must be a whole number, {low} or more, got {given!r}")
        return int(given)

    return take


count, a_seed = at_least(1), at_least(0)


def machine_info() -> dict[str, Any]:
    """Date (ISO, UTC), command, machine, versions and git commit of this run, as JSON."""
    main = sys.modules["__main__"].__spec__
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", main.name if main else "", *sys.argv[1:]]),
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "os": platform.platform(),
        "python": platform.python_version(),
        "versions": {
            name: metadata.version(name)
            for name in ("foveal", "torch", "numpy", "gymnasium", "stable-baselines3")
        },
        "git_commit": _git_commit(),
    }


def write_results(path: str | Path, results: dict[str, Any]) -> None:
    """Write results as JSON, folders included, and say where."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=2) + "\n")
    print(f"results written to {path}")


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _git_commit() -> str | None:
    """The commit of this checkout, with "-dirty" where files differ from it; None outside a checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() or None


def append_cell(
    out: Path, cell: dict[str, Any], key: Sequence[str], rank: Callable[[dict[str, Any]], Any]
) -> None:
    """Put a cell, with what it ran on, among the finished ones of a file, in place of the one whose `key` is
    the same, in the order of `rank`. Others may do so at the same time: the lock is on the folder, so that no
    file is left behind."""
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(out.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        there = json.loads(out.read_text())["cells"] if out.exists() else []
        others = [one for one in there if [one[k] for k in key] != [cell[k] for k in key]]
        cells = sorted([*others, {**cell, "about": machine_info()}], key=rank)
        draft = out.with_name(f".{out.name}.tmp")
        draft.write_text(json.dumps({"cells": cells}, indent=1) + "\n")
        draft.replace(out)
    finally:
        os.close(folder)
