"""Pictures of a run."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .statistics import Statistic, bootstrap_band

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "draw_curves",
    "draw_learning_curve",
    "draw_values_on_map",
    "learning_curve",
    "values_on_map",
]

TRAINING, EVALUATION, BASELINE = "#a9b2bc", "#1f6fb4", "#b5533c"
WALL, GOAL, PIT = "#2b3038", "#009e73", "#d55e00"


def learning_curve(
    rows: Sequence[Mapping[str, Any]],
    path: str | Path,
    *,
    title: str = "",
    baseline: float | None = None,
    best: tuple[int, float] | None = None,
    steps_are: str = "environment steps",
) -> Path:
    """Write `draw_learning_curve`'s figure to `path`, a PNG of 1200 x 750 pixels; the path of it.

    The file is replaced at once, never half-written. Raises `OSError` where it cannot be written.
    """
    return write_png(
        draw_learning_curve(rows, title=title, baseline=baseline, best=best, steps_are=steps_are), path
    )


def draw_learning_curve(
    rows: Sequence[Mapping[str, Any]],
    *,
    title: str = "",
    baseline: float | None = None,
    best: tuple[int, float] | None = None,
    steps_are: str = "environment steps",
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
        steps_are: what `env_step` counts, below the axis.

    Built without pyplot, so that no state is shared and no window system is needed.
    """
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

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
    axes.set_xlabel(steps_are, fontsize=13)
    axes.set_ylabel("score per episode (undiscounted return)", fontsize=13)
    dress(axes, ticks=10)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=12, framealpha=0.9, edgecolor="#e3e7eb", loc="best")
    return figure


def dress(axes: Axes, ticks: int) -> None:
    """Numbers as people write them, a light grid, no box."""
    from matplotlib.ticker import EngFormatter, MaxNLocator, StrMethodFormatter

    large = EngFormatter(sep="")  # 20k, 1.5M
    axes.set_xlim(left=0)
    axes.margins(x=0.02, y=0.08)
    axes.xaxis.set_major_formatter(lambda x, _: large(x) if abs(x) >= 1 else f"{x:g}")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=ticks, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    axes.tick_params(labelsize=12, length=0)
    axes.grid(color="#e3e7eb", lw=0.9)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)


def write_png(figure: Figure, path: str | Path) -> Path:
    return write_figure(figure, path, "png")


def write_figure(figure: Figure, path: str | Path, form: str) -> Path:
    """Write a figure as "png" or "svg", replaced at once."""
    path = Path(path)
    beside = path.with_name(f".{path.name}.tmp")
    try:
        figure.savefig(beside, format=form)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    return path


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


def values_on_map(q: np.ndarray, rows: Sequence[str], path: str | Path, *, title: str = "") -> Path:
    """Write `draw_values_on_map`'s figure to `path`, a PNG; replaced at once, as in `learning_curve`."""
    return write_png(draw_values_on_map(q, rows, title=title), path)


def draw_values_on_map(q: np.ndarray, rows: Sequence[str], *, title: str = "") -> Figure:
    """A grid world's state values as colours and numbers, and its greedy actions as arrows.

    Args:
        q: (S, 4), the values of up, right, down and left in each cell that is no wall, row by row.
        rows: the map: `#` walls, `G` goals and `P` pits, which end an episode and have no value, `S` starts.
        title: above the picture.

    Of equal actions (to a millionth of the largest value) all are drawn. Small cells have no numbers.
    """
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.patches import Rectangle

    height, width = len(rows), len(rows[0])
    cell = min(1.5, 10 / width, 8 / height)  # inches
    layout = ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.15)
    figure = Figure(figsize=(cell * width + 2.2, cell * height + 1.3), dpi=100, layout=layout)
    axes = figure.add_subplot()
    cells = [(x, y, kind) for y, row in enumerate(rows) for x, kind in enumerate(row) if kind != "#"]
    ends = np.array([kind in "GP" for *_, kind in cells])
    values = q.max(axis=1)
    live = values[~ends]
    scale = Normalize(live.min(), live.max() if live.max() > live.min() else live.min() + 1)
    best = q >= values[:, None] - 1e-6 * np.abs(q).max()
    image = np.full((height, width), np.nan)
    for (x, y, _), value in zip(cells, values):
        image[y, x] = value
    colors = axes.imshow(image, cmap="cividis", norm=scale)
    axes.set_facecolor(WALL)
    points = 72 * cell  # a cell's side
    number = max(np.abs(live).max(), 1e-9)
    decimals = int(np.clip(2 - np.floor(np.log10(number)), 0, 3)) if number < 1e4 else 0
    for (x, y, kind), value, greedy in zip(cells, values, best):
        if kind in "GP":
            name, color, marker = ("goal", GOAL, "*") if kind == "G" else ("pit", PIT, "X")
            axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, fc=color, lw=0, zorder=2))
            axes.plot(x, y - 0.06, marker=marker, ms=0.34 * points, mfc="white", mec="none", zorder=3)
            if points > 40:
                axes.text(x, y + 0.33, name, color="white", fontsize=0.13 * points, ha="center", va="center")
            continue
        ink = "white" if scale(value) < 0.55 else "#15202b"
        arrow = {"arrowstyle": "-|>", "color": ink, "lw": 0.025 * points, "mutation_scale": 0.2 * points}
        directions = np.array([(0, -1), (1, 0), (0, 1), (-1, 0)])[greedy]
        for direction in directions:  # several begin in the middle, one is centred there
            begin, end = (-0.19, 0.21) if len(directions) == 1 else (0.02, 0.32)
            middle = np.array([x, y - 0.09])
            axes.annotate(
                "",
                middle + end * direction,
                middle + begin * direction,
                arrowprops={**arrow, "shrinkA": 0, "shrinkB": 0},
            )
        if points > 40:
            text = f"{value:.{decimals}f}"
            axes.text(x, y + 0.35, text, color=ink, fontsize=0.14 * points, ha="center", va="center")
        if kind == "S":
            inset = Rectangle(
                (x - 0.45, y - 0.45), 0.9, 0.9, fill=False, ec=ink, lw=0.018 * points, ls=(0, (3, 2))
            )
            axes.add_patch(inset)
    axes.set_xticks(np.arange(width + 1) - 0.5, [""] * (width + 1))
    axes.set_yticks(np.arange(height + 1) - 0.5, [""] * (height + 1))
    axes.tick_params(length=0)
    axes.grid(color="white", lw=1.2)
    axes.spines[:].set_visible(False)
    axes.set_title(title, fontsize=14, loc="left", pad=10)
    beside = axes.inset_axes((1 + 0.15 / (cell * width), 0, 0.22 / (cell * width), 1))
    bar = figure.colorbar(colors, cax=beside)
    bar.set_label("value of a state", fontsize=12)
    bar.outline.set_visible(False)
    return figure


AGENT_COLORS = {
    "a2c": "#d55e00", "sb3/a2c": "#e69f00", "ppo": "#0072b2", "sb3/ppo": "#56b4e9", "pqn": "#009e73",
    "dqn": "#882255", "sb3/dqn": "#cc79a7", "reinforce": "#444444",
}  # fmt: skip
"""Told apart by the colour-blind too (after Okabe and Ito); Stable-Baselines3's are the lighter of a pair."""
OTHER_COLORS = ("#117733", "#999933", "#332288", "#aa4499", "#b5533c", "#777777")


def draw_curves(
    curves: Mapping[str, Mapping[str, Sequence[tuple[np.ndarray, ...]]]],
    *,
    statistic: Statistic = np.mean,
    x_label: str = "environment steps",
    y_label: str = "score per episode",
) -> Figure:
    """A panel a task: the curves of what was trained on it, over seeds.

    Args:
        curves: task -> agent (or another label) -> (x, y) of each of its runs, x ascending. Labels that begin
            with "sb3/" are dashed. From three seeds on the line is their mean (or IQM) and the band its 95 %
            bootstrap interval (`mean_curve`); fewer, or ones that have no stretch of steps in common, are
            drawn one by one. Runs without values are left out.

    Built without pyplot, so that no state is shared and no window system is needed.
    """
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    columns = max(1, math.ceil(math.sqrt(len(curves))))
    lines = max(1, math.ceil(len(curves) / columns))
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12)
    figure = Figure(figsize=(6.4 * columns, 4.8 * lines), dpi=100, layout=layout)
    others = sorted({agent for agents in curves.values() for agent in agents} - AGENT_COLORS.keys())
    spare = {agent: OTHER_COLORS[i % len(OTHER_COLORS)] for i, agent in enumerate(others)}
    for number, (env, agents) in enumerate(curves.items(), start=1):
        axes = figure.add_subplot(lines, columns, number)
        for agent, every_seed in agents.items():
            seeds = [curve for curve in every_seed if len(curve[0])]
            color = {**AGENT_COLORS, **spare}[agent]
            style = (0, (4, 2)) if agent.startswith("sb3/") else "-"
            label = f"{agent}, {len(seeds)} seed{'s' * (len(seeds) != 1)}"
            band = mean_curve(seeds, statistic) if len(seeds) >= 3 else ()
            if not band or len(band[0]) < 2:
                for steps, scores in seeds:
                    marker = "o" if len(steps) == 1 else None  # a line of one point is not seen
                    axes.plot(
                        steps, scores, color=color, lw=1.4, ls=style, marker=marker, alpha=0.85, label=label
                    )
                    label = "_"  # one entry in the legend
                continue
            steps, middle, low, high = band
            axes.fill_between(steps, low, high, color=color, alpha=0.15, lw=0, zorder=2)
            axes.plot(steps, middle, color=color, lw=2.2, ls=style, label=label, zorder=3)
        if number > len(curves) - columns:
            axes.set_xlabel(x_label, fontsize=12)
        if number % columns == 1 % columns:
            axes.set_ylabel(y_label, fontsize=12)
        dress(axes, ticks=7)
        # Above the panel, where it hides no line.
        entries = len(axes.get_legend_handles_labels()[0])
        axes.set_title(env, fontsize=14, loc="left", pad=8 + 17 * math.ceil(entries / 3))
        if entries:
            legend = axes.legend(
                ncols=3, fontsize=10.5, handlelength=2.2, columnspacing=1.0, frameon=False, borderaxespad=0.1,
                loc="lower left", bbox_to_anchor=(-0.01, 1.0),
            )  # fmt: skip
            legend.set_in_layout(False)  # or a long one makes all panels narrow
    return figure


def mean_curve(
    curves: Sequence[tuple[np.ndarray, ...]], statistic: Statistic = np.mean
) -> tuple[np.ndarray, ...]:
    """Mean (or IQM) over seeds and its 95 % bootstrap interval, at every step at which one was evaluated.

    Args:
        curves: (steps, scores) of each seed, at least one, steps ascending.

    Returns:
        steps, mean, low and high, float64 (n,) each. Between its evaluations a seed's score is interpolated
        linearly. Before its first and after its last it has none: the steps are those that all seeds have.
    """
    first, last = max(steps[0] for steps, _ in curves), min(steps[-1] for steps, _ in curves)
    grid = np.unique(np.concatenate([steps for steps, _ in curves]))
    grid = grid[(grid >= first) & (grid <= last)]
    scores = np.stack([np.interp(grid, at, score) for at, score in curves], axis=1)  # (n, seeds)
    return grid, statistic(scores, axis=-1), *bootstrap_band(scores, statistic)
