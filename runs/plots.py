"""Pictures of a run."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw_learning_curve", "learning_curve"]

TRAINING, EVALUATION, BASELINE = "#a9b2bc", "#1f6fb4", "#b5533c"


def learning_curve(
    rows: Sequence[Mapping[str, Any]],
    path: str | Path,
    *,
    title: str = "",
    baseline: float | None = None,
    best: tuple[int, float] | None = None,
) -> Path:
    """Write `draw_learning_curve`'s figure to `path`, a PNG of 1200 x 750 pixels; the path of it.

    The file is replaced at once, never half-written. Raises `OSError` where it cannot be written.
    """
    path = Path(path)
    figure = draw_learning_curve(rows, title=title, baseline=baseline, best=best)
    beside = path.with_name(f".{path.name}.tmp")
    try:
        figure.savefig(beside, format="png")
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    return path


def draw_learning_curve(
    rows: Sequence[Mapping[str, Any]],
    *,
    title: str = "",
    baseline: float | None = None,
    best: tuple[int, float] | None = None,
) -> Figure:
    """The score per episode against environment steps.

    Args:
        rows: a run's metrics, flat, with `env_step`; of each is drawn what it has of `train/return_mean` (a
            thin
            line: it explores, so it lies below the greedy policy's) and of `eval/return_mean`, with the
            interval `eval/return_ci95_low` to `eval/return_ci95_high` as a band. Values that are no finite
            numbers are left out.
        title: above the picture.
        baseline: the random policy's score, a dashed line.
        best: (env_step, score) of the checkpoint that was chosen, marked with a star.

    Built without pyplot, so that no state is shared and no window system is needed.
    """
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.ticker import EngFormatter, MaxNLocator, StrMethodFormatter

    figure = Figure(figsize=(12, 7.5), dpi=100, layout=ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.15))
    axes = figure.add_subplot()

    evaluated, scores = _series(rows, "eval/return_mean")
    if len(evaluated):
        axes.plot(
            evaluated, scores, color=EVALUATION, lw=2.2, marker="o", ms=5, label="evaluation, mean", zorder=4
        )
    steps, low, high = _series(rows, "eval/return_ci95_low", "eval/return_ci95_high")
    if len(steps):
        axes.fill_between(
            steps, low, high, color=EVALUATION, alpha=0.18, lw=0, label="95 % interval of that mean", zorder=3
        )
    steps, scores = _series(rows, "train/return_mean")
    if len(steps):
        axes.plot(steps, scores, color=TRAINING, lw=1.2, label="training episodes, exploring", zorder=2)
    if baseline is not None:
        axes.axhline(
            baseline,
            color=BASELINE,
            lw=1.5,
            ls=(0, (5, 4)),
            label=f"random policy: {baseline:,.1f}",
            zorder=1,
        )
    if best is not None:
        axes.plot(
            *best, ls="", marker="*", ms=20, mfc="#f2b134", mec="#5f4206", zorder=5,
            label=f"best checkpoint: {best[1]:,.1f} at {best[0]:,} steps",
        )  # fmt: skip
    if not axes.has_data():
        axes.text(0.5, 0.5, "no episode has finished yet", transform=axes.transAxes, ha="center", fontsize=14)

    axes.set_title(title, fontsize=16, loc="left", pad=12)
    axes.set_xlabel("environment steps", fontsize=13)
    axes.set_ylabel("score per episode (undiscounted return)", fontsize=13)
    axes.set_xlim(left=0)
    axes.margins(x=0.02, y=0.08)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))  # 20k, 1.5M
    axes.xaxis.set_major_locator(MaxNLocator(nbins=10, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    axes.tick_params(labelsize=12, length=0)
    axes.grid(color="#e3e7eb", lw=0.9)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=12, framealpha=0.9, edgecolor="#e3e7eb", loc="best")
    return figure


def _series(rows: Sequence[Mapping[str, Any]], *keys: str) -> tuple[np.ndarray, ...]:
    """env_step and the columns `keys` of the rows that have them all: float64 (n,) each, by step."""
    table = [
        [row["env_step"], *(row[key] for key in keys)]
        for row in rows
        if "env_step" in row and all(row.get(key) is not None for key in keys)
    ]
    array = np.array(table, dtype=np.float64).reshape(-1, 1 + len(keys))
    array = array[np.isfinite(array).all(axis=1)]
    return tuple(array[np.argsort(array[:, 0], kind="stable")].T)
