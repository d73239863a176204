"""The cells of a benchmark's JSON file as runs to compare, where their run folders are no longer needed.

A cell is one training: what was trained, on what, with which seed, its scores, and, where the benchmark kept
it, its learning curve: {"env_step": [...], "eval/return_mean": [...]} as `curve`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .history import History, flat

SCORES = {
    "chosen": "eval/return_mean", "last": "last/return_mean", "error": "test/error",
    "nats": "test/nats", "bits_per_dim": "test/bits_per_dim", "fid": "test/fid", "elbo": "test/elbo",
}  # fmt: skip
"""What cells call a score -> its key in a summary.json; others keep their names."""
AXES = {"steps": "env_step", "epochs": "epoch"}
"""How long a cell was trained, and the axis of that: without a curve its scores are one point there."""


def read_cells(path: Path) -> list[History]:
    """The cells of a benchmark's file, in its order. Raises ValueError where it is none, or has no cells."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} is no JSON file: {error}") from error
    cells = content.get("cells") if isinstance(content, dict) else None
    if not isinstance(cells, list) or not all(isinstance(cell, dict) and "seed" in cell for cell in cells):
        raise ValueError(f"{path} has no trainings to compare: takes a benchmark's file with cells")
    if not cells:
        raise ValueError(f"{path} has no finished cells yet")
    return [_of_cell(path, cell, content) for cell in cells]


def _of_cell(path: Path, cell: Mapping[str, Any], content: Mapping[str, Any]) -> History:
    # Scores of a GAN stand under the weights that they are of.
    flattened = {**cell, **(cell["best"] if isinstance(cell.get("best"), dict) else {})}
    numbers = {SCORES.get(k, k): float(v) for k, v in flattened.items() if _is_number(v)}
    agent = str(cell.get("agent") or cell.get("variant") or path.stem)
    task = str(cell.get("env") or cell.get("task") or cell.get("dataset") or path.stem)
    key = next((key for key in AXES if key in cell), "steps")
    end: Any = cell.get(key, content.get(key))
    table = {key: np.array([value]) for key, value in numbers.items()}
    if isinstance(curve := cell.get("curve"), dict):
        table = {key: np.array(values, np.float64) for key, values in curve.items()}
    elif _is_number(end):
        table[AXES[key]] = np.array([float(end)])
    fields = {
        **flat(cell.get("config") or {}),
        "agent": agent, "env_id": task, "seed": cell["seed"], "group": path.stem,
        "total_steps": cell.get("steps"), "epochs": cell.get("epochs"),
        "commit": str(cell.get("commit") or "")[:9] or None,
    }  # fmt: skip
    name = f"{agent}-{task}-seed{cell['seed']}"
    return History(path, name, "finished", fields, numbers, table)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
