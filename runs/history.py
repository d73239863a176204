"""Runs as they are compared: settings, scores and one table of numbers each, from foveal's run folders and
from the offline files that other programs leave for Weights & Biases (`wandb/offline-run-*/run-*.wandb`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np

from .run import Run, describe_state
from .tracking import AXES
from .wandb_file import read_run

PICTURES = (".png", ".jpg", ".jpeg", ".gif", ".webp")
FILMS = (".mp4", ".webm")
ALIASES = {
    "agent": ("algo", "algorithm", "exp_name", "model"),
    "env_id": ("env", "env_name", "environment", "gym_id", "dataset"),
}
"""Where other programs' settings say what is trained on what, when they do not say it as we do."""
UNIMPORTANT = {
    "seed", "group", "name", "results", "tags", "track", "progress", "threads", "data_dir", "video", "device",
    "log_every", "eval_every", "eval_episodes", "final_episodes", "checkpoint_every", "target_score",
    "parameters", "commit", "torch",
}  # fmt: skip
"""Settings that two runs may differ in and still be seeds of one thing."""


@dataclass
class History:
    """One run. `table` holds a float64 column for every number that rows have, (rows,) each, NaN where a row
    has none: axes (`env_step`, ...) and metrics alike."""

    path: Path
    name: str
    state: str
    fields: dict[str, Any]
    """Settings, flat: agent, env_id, seed, learning_rate, ...; `field_of` finds one."""
    summary: dict[str, Any]
    table: dict[str, np.ndarray]
    media: list[Path] = field(default_factory=list)
    foreign: bool = False
    """Of another program: its score is what the last row says."""

    @property
    def task(self) -> str:
        return text_of(self.fields.get("env_id"))

    def series(self, metric: str, axis: str) -> tuple[np.ndarray, np.ndarray]:
        """The metric's finite values as they were recorded, and where: (n,) each, by axis. Of two values at
        one place the later one counts."""
        none = np.empty(0)
        x, y = self.table.get(axis, none), self.table.get(metric, none)
        if not x.size or not y.size:
            return none, none
        known = np.isfinite(x) & np.isfinite(y)
        x, y = x[known], y[known]
        order = np.argsort(x, kind="stable")
        x, y = x[order], y[order]
        last = np.append(x[1:] != x[:-1], True) if x.size else np.empty(0, bool)
        return x[last], y[last]

    def score(self, key: str) -> float | None:
        """What summary.json says under `key`; of another program's run, else the last value of its rows."""
        value = self.summary.get(key)
        if isinstance(value, int | float) and np.isfinite(value):
            return float(value)
        column = self.table.get(key, np.empty(0)) if self.foreign else np.empty(0)
        column = column[np.isfinite(column)]
        return float(column[-1]) if column.size else None


def text_of(value: Any) -> str:
    return "-" if value is None else str(value)


def find_field(runs: Sequence[History], name: str) -> str:
    """The full name of a setting that some run has: `name` itself, or the one that ends with `.name`; `env`
    is env_id. Raises ValueError, with what there is."""
    known = {key for run in runs for key in run.fields}
    name = "env_id" if name == "env" and "env" not in known else name
    found = [name] if name in known else sorted(key for key in known if key.endswith(f".{name}"))
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(f"setting {name!r} is one of {', '.join(found)}: say which")
    raise ValueError(f"no run has a setting {name!r}; there are {', '.join(sorted(known))}")


def matches(run: History, where: Mapping[str, str]) -> bool:
    """Whether all settings are as asked; `*` and `?` stand for any text, as in `agent=sb3/*`."""
    return all(fnmatchcase(text_of(run.fields.get(key)), pattern) for key, pattern in where.items())


def load(paths: Iterable[str | Path]) -> tuple[list[History], list[tuple[Path, str]]]:
    """The runs at and below `paths`, oldest first, and what could not be read, with the reason.

    A path is a run folder, a folder of them, a .wandb file, or the .json file of a benchmark, whose cells are
    runs. Inside a run folder nothing else is looked for: its own wandb/ is a view of it. W&B files with one
    run id are fragments of one run.

    Raises `FileNotFoundError` for a path that is not there, ValueError for a file that is none of these.
    """
    runs: list[tuple[str, History]] = []
    damaged: list[tuple[Path, str]] = []
    fragments: dict[str, list[Path]] = {}
    for path in dict.fromkeys(found for given in paths for found in _candidates(Path(given))):
        if path.suffix == ".wandb":
            fragments.setdefault(path.stem, []).append(path)
            continue
        if path.suffix == ".json":
            from .measured import read_cells  # which builds on this module

            runs += [("", cell) for cell in read_cells(path)]
            continue
        try:
            runs.append(_of_folder(path))
        except (ValueError, KeyError, TypeError, OSError) as error:
            damaged.append((path, " ".join(str(error).split())))
    for files in fragments.values():
        try:
            runs.append(_of_wandb(sorted(files)))
        except (ValueError, OSError) as error:
            damaged.append((files[0], " ".join(str(error).split())))
    return [run for _, run in sorted(runs, key=lambda item: (item[0], str(item[1].path)))], damaged


def _candidates(path: Path) -> Iterator[Path]:
    if not path.exists():
        raise FileNotFoundError(f"no runs at {path}: there is no such file or folder")
    if path.is_file():
        if path.suffix not in (".wandb", ".json"):
            raise ValueError(
                f"{path} is no run: takes run folders, folders of them, .wandb files and benchmarks' .json"
            )
        yield path
        return
    for folder, inside, files in os.walk(path):
        inside.sort()
        if "config.json" in files or "metrics.jsonl" in files:
            inside.clear()
            yield Path(folder)
        else:
            yield from (Path(folder, file) for file in sorted(files) if re.fullmatch(r"run-.+\.wandb", file))


def _of_folder(path: Path) -> tuple[str, History]:
    if not (path / "config.json").is_file() or not (path / "metrics.jsonl").is_file():
        lacking = "config.json" if (path / "metrics.jsonl").is_file() else "metrics.jsonl"
        raise ValueError(f"{path} has no {lacking}")
    run = Run(path)
    origin = run.config["run"]
    git = origin.get("foveal_git") or {}
    own = {
        key: value
        for key, value in run.config.items()
        if key not in ("run", "versions", "config", "options", "dataset")
    }
    fields = {
        **flat(run.config.get("options") or {}),
        **flat(run.config.get("config") or {}),
        **flat(own),
        "group": origin["group"],
        "name": origin["name"],
        "commit": git.get("commit", "")[:9] or None,
        "torch": run.config.get("versions", {}).get("torch"),
    }
    media = [
        file
        for folder in ("videos", "plots", "samples")
        for file in sorted((path / folder).glob("*"))
        if file.suffix.lower() in PICTURES + FILMS
    ]
    table = _table(run.rows())
    if not table:
        raise ValueError(f"{path} has no rows yet")
    history = History(path, path.name, describe_state(run.summary) or "?", fields, run.summary, table, media)
    return origin["started"], history


def _of_wandb(files: Sequence[Path]) -> tuple[str, History]:
    parts = [read_run(file) for file in files]  # each but the first goes on with what was killed
    settings = {key: value for part in parts for key, value in part.config.items()}
    fields = flat(settings)
    for key, others in ALIASES.items():
        known = [fields[name] for name in (key, *others) if fields.get(name) is not None]
        fields[key] = known[0] if known else parts[0].project if key == "env_id" else parts[0].name
    table = _table([row for part in parts for row in part.rows])
    if not table:
        raise ValueError(f"{files[0]} has no rows")
    summary: dict[str, Any] = {key: value for part in parts for key, value in part.summary.items()}
    memory = max(part.memory_mb for part in parts)
    if memory:
        summary.setdefault("memory/peak_mb", memory)
    if "_runtime" in table:
        summary.setdefault("wall_s", float(np.nanmax(table["_runtime"])))
        table.setdefault("time/wall_s", table["_runtime"])
    fields |= {"group": parts[0].group or parts[0].project, "name": parts[0].name}
    state = "finished" if parts[-1].exited else "killed"
    folder = files[-1].parent
    media = [file for file in sorted(folder.rglob("media/**/*")) if file.suffix.lower() in PICTURES + FILMS]
    name = f"{parts[0].name}-{files[0].stem.removeprefix('run-')}"
    return parts[0].started, History(folder, name, state, fields, summary, table, media, foreign=True)


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}; lists as text, as their reader would write them."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = " ".join(map(str, value)) if isinstance(value, list) else value
    return found


def _table(rows: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    columns: dict[str, np.ndarray] = {}
    for number, row in enumerate(rows):
        for key, value in row.items():
            if isinstance(value, int | float):
                if key not in columns:
                    columns[key] = np.full(len(rows), np.nan)
                columns[key][number] = value
    return columns


def axes_of(runs: Sequence[History], metric: str | None = None) -> list[str]:
    """The axes, ours first, that all of the runs have (with values of the metric, where one is named)."""
    known = [*AXES, "global_step", "_step", "time/wall_s"]
    return [
        axis
        for axis in known
        if all(run.series(metric, axis)[0].size if metric else axis in run.table for run in runs)
    ]


def label(runs: Sequence[History], by: Sequence[str] = ()) -> list[str]:
    """What each run is a seed of, as people would call it.

    With `by`, the values of those settings. Else a sweep's trial is called by its number, and other runs by
    the agent; where one agent has been trained with several settings on one task, those that most of its runs
    have (of equals the oldest) are plainly it, and others say what they do differently.
    """
    if by:
        return [" ".join(_value(key, run.fields.get(key), len(by) > 1) for key in by) for run in runs]
    labels = [""] * len(runs)
    kinds: dict[tuple[str, str], list[int]] = {}
    trials = [re.fullmatch(r"trial(\d+)", text_of(run.fields.get("name"))) for run in runs]
    sweeps = {run.fields["group"] for run, trial in zip(runs, trials) if trial}
    for index, run in enumerate(runs):
        if trial := trials[index]:
            of = f"{run.fields['group']} " if len(sweeps) > 1 else ""
            labels[index] = f"{of}trial {int(trial[1])}"
            continue
        kinds.setdefault((text_of(run.fields.get("agent")), run.task), []).append(index)
    for (agent, _), members in kinds.items():
        keys = sorted({key for index in members for key in runs[index].fields} - UNIMPORTANT)
        variants: dict[tuple[str, ...], list[int]] = {}
        for index in members:
            variant = tuple(text_of(runs[index].fields.get(key)) for key in keys)
            variants.setdefault(variant, []).append(index)
        plain = max(variants, key=lambda variant: len(variants[variant]))
        for variant, indices in variants.items():
            differing = [f"{k}={v}" for k, v, base in zip(keys, variant, plain) if v != base]
            if len(differing) > 3:
                differing = [*differing[:3], "…"]
            for index in indices:
                labels[index] = " ".join([agent, *differing])
    return labels


def _value(key: str, value: Any, named: bool) -> str:
    return f"{key}={text_of(value)}" if named and key not in ("agent", "env_id") else text_of(value)
