"""The page of `foveal compare`: one HTML file with everything in it, which asks no server for anything.

compare.html is its frame, compare.js what it does, and plotly draws. The page has every run's rows and
computes means, intervals and probabilities of those that are shown by itself, so that a run that is hidden
counts nowhere; the definitions are those of statistics.py. Each metric lies in the page as gzip in base64 and
is unpacked when it is chosen.
"""

from __future__ import annotations

import base64
import gzip
import json
import math
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from html import escape
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from .compare import AXIS_TEXTS, BASELINES, CURVES, FEW, SCORES, Comparison
from .history import FILMS, UNIMPORTANT, History, label, text_of

COLORS = (
    "#2f7ed8", "#e07b39", "#2a9d6f", "#b04fc2", "#d4a017", "#d1495b", "#3aa7b5", "#7a6ff0", "#8a9a3b",
    "#c2739a",
)  # fmt: skip
"""Of the labels, in their order: told apart on white and on black."""
REDUNDANT = re.compile(r"learning_curve|training_curves|.*-epoch\d+")
"""Pictures of what the page draws itself, and of what came before the last one."""
MOST_PICTURES = 3_000_000
"""Bytes of films and pictures, as text in the page."""
TYPES = {".jpg": "jpeg"}


def write_page(found: Comparison, path: Path, max_bytes: int) -> tuple[Path, list[str]]:
    """Write the page to `path`, replaced at once; its path and what was left out of it for its size, a line
    each. Raises ImportError without plotly."""
    from plotly.offline import get_plotlyjs

    here = Path(__file__).parent
    frame = (here / "compare.html").read_text(encoding="utf-8")
    script = (here / "compare.js").read_text(encoding="utf-8")
    plotly = packed(get_plotlyjs().encode())
    left_out: list[str] = []
    data = describe(found)
    room = max_bytes - len(frame) - len(script) - len(plotly) - len(json.dumps(data)) - 10_000

    axes = [axis for axis in [*AXIS_TEXTS, found.axis] if any(axis in run.table for run in found.runs)]
    for axis in dict.fromkeys(axes):
        columns = [run.table.get(axis, np.full(rows_of(run), np.nan)) for run in found.runs]
        data["axes"][axis] = packed(np.concatenate(columns).astype("<f8").tobytes())
        room -= len(data["axes"][axis])
    films: dict[int, list[dict[str, str]]] = {}
    for kind in ("first", "pictures", "rest"):
        if kind == "pictures":
            films, used = pictures(found, min(MOST_PICTURES, room), left_out)
            room -= used
            continue
        for metric in ordered_metrics(found, axes)[kind]:
            blob, counts = column(found.runs, metric)
            if len(blob) > room:
                left_out.append(f"{metric}: too large; curves.csv has it with --metric {metric}")
                continue
            data["metrics"][metric] = {"counts": counts, "data": blob}
            room -= len(blob)
    for index, media in films.items():
        data["runs"][index]["media"] = media
    data["left_out"] = left_out
    text = json.dumps(data, allow_nan=False).replace("</", "<\\/")
    parts = {"title": escape(data["title"]), "script": script, "plotly": plotly, "data": text}
    for name, part in parts.items():  # the data last: what is in it is not looked at again
        frame = frame.replace("{{" + name + "}}", part)
    draft = path.with_name(f".{path.name}.tmp")
    draft.write_text(frame, encoding="utf-8")
    draft.replace(path)
    return path, left_out


def describe(found: Comparison) -> dict[str, Any]:
    """Everything but the numbers of the rows."""
    runs = found.runs
    differing = [key for key in fields_of(runs) if len({text_of(run.fields.get(key)) for run in runs}) > 1]
    keep = [key for key in differing if key not in ("name", "seed")]
    groupings = {"chosen": found.labels}
    if found.labels != label(runs):
        groupings["agent and settings"] = label(runs)
    groupings |= {key: [text_of(run.fields.get(key)) for run in runs] for key in keep}
    agents = ", ".join(dict.fromkeys(found.labels))
    shown = ("commit", "torch", "parameters")
    return {
        "title": f"{agents if len(agents) < 60 else f'{len(set(found.labels))} kinds of runs'}",
        "made": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "version": version("foveal"),
        "colors": COLORS,
        "few": FEW,
        "score": found.score,
        "lower": found.lower,
        "scores": score_names(found),
        "baselines": BASELINES,
        "metric": found.metric,
        "axis": found.axis,
        "axis_texts": AXIS_TEXTS,
        "statistic": found.statistic,
        "tasks": found.tasks(),
        "groupings": groupings,
        "settings": [key for key in keep if key in shown or key not in UNIMPORTANT | {"agent", "env_id"}],
        "sweeps": sweeps(runs),
        "damaged": [[str(path), reason] for path, reason in found.damaged],
        "axes": {},
        "metrics": {},
        "runs": [
            {
                "name": run.name,
                "path": str(run.path),
                "task": run.task,
                "state": run.state,
                "rows": rows_of(run),
                "scores": {key: run.score(key) for key in score_names(found)},
                "summary": numbers(run.summary),
                "fields": {
                    key: text_of(run.fields.get(key)) for key in {*differing, "agent", "env_id", "seed"}
                },
                "media": [],
            }
            for run in runs
        ],
    }


def sweeps(runs: Sequence[History]) -> list[dict[str, Any]]:
    """The sweeps that runs belong to: how much of the metric each setting explains, where that was told."""
    found = []
    for folder in dict.fromkeys(run.path.parent for run in runs):
        if not (folder / "sweep.json").exists():
            continue
        from .sweep import read_trials  # brings torch, seconds of import: only where there is a sweep

        try:
            trials = read_trials(folder)
        except ValueError:  # of the sweep only: its runs are whole
            continue
        if trials and trials.get("importance"):
            metric = trials["sweep"].get("metric", "the metric")
            found.append({"group": folder.name, "metric": metric, "importance": trials["importance"]})
    return found


def fields_of(runs: Sequence[History]) -> list[str]:
    return list(dict.fromkeys(key for run in runs for key in run.fields))


def rows_of(run: History) -> int:
    return len(next(iter(run.table.values())))


def numbers(summary: dict[str, Any]) -> dict[str, float]:
    """What the page shows of a summary."""
    wanted = ("speed/", "memory/", "baseline/", "wall_s")
    return {
        key: float(value)
        for key, value in summary.items()
        if key.startswith(wanted) and isinstance(value, int | float) and math.isfinite(value)
    }


def score_names(found: Comparison) -> list[str]:
    """The score asked for and all others that every run with a score has too."""
    more = [*SCORES, "last/return_mean", "test/loss"]
    scored = [run for run in found.runs if run.score(found.score) is not None]
    having = [key for key in more if scored and all(run.score(key) is not None for run in scored)]
    return list(dict.fromkeys([found.score, *having]))


def ordered_metrics(found: Comparison, axes: Sequence[str]) -> dict[str, list[str]]:
    """What is drawn at first, and after it all other columns, the ones that most runs have first."""
    having: dict[str, int] = {}
    for run in found.runs:
        for key in run.table:
            having[key] = having.get(key, 0) + 1
    names = [key for key in having if key not in axes and not key.startswith(("_", "time/"))]
    order = ("eval/", "test/", "validation/", "train/")
    names.sort(key=lambda key: (-having[key], next((i for i, p in enumerate(order) if key.startswith(p)), 9)))
    first = [key for key in dict.fromkeys([found.metric, *CURVES]) if key in having]
    return {"first": first, "rest": [key for key in names if key not in first]}


def column(runs: Sequence[History], metric: str) -> tuple[str, list[int]]:
    """A metric's recorded values: for all runs together the rows that they are in, as differences (uint32),
    then the values (float32: seven digits); and how many are of each run."""
    rows, values = [], []
    for run in runs:
        of_run = run.table.get(metric, np.empty(0))
        known = np.flatnonzero(np.isfinite(of_run))
        rows.append(np.diff(known, prepend=0))
        values.append(of_run[known])
    data = np.concatenate(rows).astype("<u4").tobytes() + np.concatenate(values).astype("<f4").tobytes()
    return packed(data), [len(part) for part in values]


def packed(data: bytes) -> str:
    return base64.b64encode(gzip.compress(data, 6, mtime=0)).decode()


def pictures(
    found: Comparison, room: int, left_out: list[str]
) -> tuple[dict[int, list[dict[str, str]]], int]:
    """Films and pictures of the best run of each label on each task, as long as there is room: by run, and
    the characters that they take."""
    chosen: dict[tuple[str, str], int] = {}
    for index, (run, name) in enumerate(zip(found.runs, found.labels)):
        best = chosen.setdefault((run.task, name), index)
        score, other = run.score(found.score), found.runs[best].score(found.score)
        if score is not None and (other is None or (score < other if found.lower else score > other)):
            chosen[run.task, name] = index
    files = [
        (index, file)
        for index in chosen.values()
        for file in found.runs[index].media
        if not REDUNDANT.fullmatch(file.stem)
    ]
    files.sort(key=lambda item: item[1].suffix.lower() not in FILMS)  # films first: there is one of each run
    used = 0
    media: dict[int, list[dict[str, str]]] = {}
    skipped = []
    for index, file in files:
        kind = TYPES.get(file.suffix.lower(), file.suffix.lower()[1:])
        if (file.stat().st_size * 4) // 3 + 100 > room - used:
            skipped.append(file)
            continue
        sort = "video" if file.suffix.lower() in FILMS else "image"
        source = f"data:{sort}/{kind};base64,{base64.b64encode(file.read_bytes()).decode()}"
        media.setdefault(index, []).append({"name": file.stem, "kind": sort, "source": source})
        used += len(source) + 100
    if skipped:
        left_out.append(f"{len(skipped)} films and pictures, such as {skipped[0]}")
    return media, used
