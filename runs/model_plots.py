"""Pictures of a model's training: curves, confusions, filters, the search for a step size."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..vision.explain import grid
from .plots import EVALUATION, TRAINING, dress, write_png

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "confusion_matrix",
    "embedding",
    "filters_grid",
    "labelled_grid",
    "rate_search",
    "training_curves",
]

DARK_TRAINING = "#7c8894"


def new_figure(width: float, height: float) -> Figure:
    """Without pyplot, so that no state is shared and no window system is needed."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12)
    return Figure(figsize=(width, height), dpi=100, layout=layout)


def training_curves(rows: Sequence[Mapping[str, Any]], path: Path, *, title: str = "") -> Path:
    """Write panels against epochs to a PNG: loss, accuracy with the gap between training and validation
    images, and, where it was measured, the length of updates relative to the weights'.

    Of each row is drawn what it has of train/loss, train/accuracy, validation/loss, validation/accuracy and
    train/update_to_weight.
    """

    def series(key: str) -> tuple[list[float], list[float]]:
        points = [(row["epoch"], row[key]) for row in rows if key in row and math.isfinite(row[key])]
        return [x for x, _ in points], [y for _, y in points]

    lengths = series("train/update_to_weight")
    panels = 3 if lengths[1] else 2
    figure = new_figure(5 * panels, 4.8)
    loss, accuracy, *others = figure.subplots(1, panels)
    for axes, name in ((loss, "loss"), (accuracy, "accuracy")):
        axes.plot(*series(f"train/{name}"), color=DARK_TRAINING, lw=1.3, label="training, while learning")
        axes.plot(
            *series(f"validation/{name}"), color=EVALUATION, lw=2.2, marker="o", ms=4, label="validation"
        )
        axes.set_title(name, fontsize=13, loc="left")
    _, losses = series("train/loss")
    if losses and min(losses) > 0 and max(losses) / min(losses) > 30:
        loss.set_yscale("log")
    at, valid = series("validation/accuracy")
    if at:
        train_at, train = series("train/accuracy")
        trained = np.interp(at, train_at, train)
        accuracy.fill_between(
            at, trained, valid, color=TRAINING, alpha=0.3, lw=0,
            label=f"gap, at the end {100 * (trained[-1] - valid[-1]):+.1f} points",
        )  # fmt: skip
        # The first epochs would flatten all that comes after them.
        low = float(np.percentile([*train, *valid], 10))
        accuracy.set_ylim(max(0.0, low - 0.05), min(1.0, max([*train, *valid]) + 0.02))
    for updates in others:
        updates.plot(*lengths, color=EVALUATION, lw=1.6, label="length of update / weights")
        if any(value > 0 for value in lengths[1]):
            updates.set_yscale("log")
        updates.axhline(1e-3, color="#3c434b", lw=1.1, ls=":", label="0.001, the usual size")
        updates.set_title("update to weight", fontsize=13, loc="left")
    for axes in (loss, accuracy, *others):
        log = axes.get_yscale() == "log"
        low, high = axes.get_ylim()
        dress(axes, ticks=7)
        if log:
            axes.yaxis.set_major_formatter("{x:g}")
        else:
            axes.set_ylim(low, high)
        axes.set_xlabel("epochs", fontsize=12)
        axes.legend(fontsize=10.5, framealpha=0.9, edgecolor="#e3e7eb", loc="best")
    figure.suptitle(title, fontsize=15, x=0.01, ha="left")
    return write_png(figure, path)


def confusion_matrix(
    labels: np.ndarray, predictions: np.ndarray, classes: Sequence[str], path: Path, *, title: str = ""
) -> Path:
    """Write how often each class (row) was taken for each (column), as shares of the row, to a PNG.

    Args:
        labels: (N,) true classes, counted from 0.
        predictions: (N,) classes given.
    """
    size = len(classes)
    counts = np.zeros((size, size), dtype=np.int64)
    np.add.at(counts, (labels, predictions), 1)
    shares = counts / counts.sum(1, keepdims=True).clip(min=1)
    side = min(14.0, max(6.0, 0.62 * size + 2))
    figure = new_figure(side + 1, side)
    axes = figure.add_subplot()
    # Mistakes are rare: a root makes one per cent visible.
    image = axes.imshow(np.sqrt(shares), cmap="Blues", vmin=0, vmax=1)
    if size <= 20:
        for (y, x), count in np.ndenumerate(counts):
            if count:
                ink = "white" if shares[y, x] > 0.35 else "#15202b"
                axes.text(x, y, f"{count:,}", ha="center", va="center", fontsize=10, color=ink)
    if size <= 100:
        axes.set_xticks(range(size), classes, rotation=90 if max(map(len, classes)) > 3 else 0)
        axes.set_yticks(range(size), classes)
    axes.tick_params(length=0, labelsize=11 if size <= 20 else 6)
    axes.set_xlabel("taken for", fontsize=12)
    axes.set_ylabel("true class", fontsize=12)
    wrong = int(counts.sum() - np.trace(counts))
    axes.set_title(f"{title}: {wrong:,} of {len(labels):,} wrong", fontsize=13, loc="left", pad=10)
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(image, shrink=0.8)
    shown = [0, 0.01, 0.05, 0.1, 0.25, 0.5, 1]
    bar.set_ticks([math.sqrt(share) for share in shown], labels=[f"{share:.0%}" for share in shown])
    bar.outline.set_visible(False)
    return write_png(figure, path)


def filters_grid(filters: np.ndarray, path: Path, *, title: str = "", most: int = 96) -> Path:
    """Write the weights (O, C, h, w) of a first layer to a PNG: in colour where C is 3, else one picture for
    each pair of filter and channel; each scaled to its own largest weight, at most `most` of them."""
    from matplotlib import colormaps

    pairs = filters if filters.shape[1] == 3 else filters.reshape(-1, 1, *filters.shape[2:])
    shown = pairs[:most]
    scale = np.abs(shown).max(axis=(1, 2, 3), keepdims=True).clip(min=1e-12)
    pictures = np.moveaxis(0.5 + 0.5 * shown / scale, 1, -1)
    if pictures.shape[-1] == 1:
        pictures = colormaps["RdBu_r"](pictures[..., 0])[..., :3]
    side = max(1, round(80 / max(pictures.shape[1:3])))
    enlarged = np.rint(255 * pictures).astype(np.uint8).repeat(side, 1).repeat(side, 2)
    whole = grid(list(enlarged), columns=min(len(enlarged), 12), gap=8)
    figure = new_figure(max(4.0, whole.shape[1] / 100), whole.shape[0] / 100 + 0.5)
    axes = figure.add_subplot()
    axes.imshow(whole, interpolation="nearest")
    axes.set_axis_off()
    more = f", {len(shown)} of {len(pairs)}" if len(pairs) > most else ""
    heading = f"{title}: first layer{more}" if title else f"first layer{more}"
    figure.suptitle(heading, fontsize=12, x=0.01, ha="left")
    return write_png(figure, path)


def rate_search(rates: Sequence[float], losses: Sequence[float], suggested: float, path: Path) -> Path:
    """Write the smoothed loss against the step size to a PNG, the suggestion marked."""
    figure = new_figure(9, 5.5)
    axes = figure.add_subplot()
    axes.plot(rates, losses, color=EVALUATION, lw=2)
    axes.axvline(suggested, color="#b5533c", lw=1.5, ls=(0, (5, 4)), label=f"suggested: {suggested:.2g}")
    dress(axes, ticks=8)
    axes.set_xscale("log")
    axes.set_xlim(min(rates), max(rates))
    axes.set_xlabel("learning_rate", fontsize=12)
    axes.set_ylabel("loss, smoothed", fontsize=12)
    axes.set_title("search for a step size", fontsize=14, loc="left", pad=10)
    axes.legend(fontsize=11)
    return write_png(figure, path)


def labelled_grid(
    rows: Sequence[Sequence[np.ndarray]], names: Sequence[str], columns: Sequence[str], path: Path
) -> Path:
    """Write pictures (H, W, 3) uint8, row by row, to a PNG, with a name for each row and column."""
    height, width = len(rows), max(len(row) for row in rows)
    figure = new_figure(1.55 * width + 1.2, 1.6 * height + 0.3)
    panels = figure.subplots(height, width, squeeze=False)
    for y, row in enumerate(rows):
        for x, panel in enumerate(panels[y]):
            panel.set_xticks([])
            panel.set_yticks([])
            panel.spines[:].set_visible(False)
            if x < len(row):
                panel.imshow(row[x], interpolation="nearest")
            if x == 0:
                panel.set_ylabel(names[y], fontsize=10, rotation=0, ha="right", va="center")
            if y == 0 and x < len(columns):
                panel.set_title(columns[x], fontsize=10)
    return write_png(figure, path)


def embedding(
    points: Mapping[str, np.ndarray], labels: np.ndarray, classes: Sequence[str], path: Path
) -> Path:
    """Write points (N, 2), a panel for each way in which they were put into the plane, coloured by label (N,)
    counted from 0, to a PNG."""
    from matplotlib import colormaps

    figure = new_figure(6.2 * len(points) + 1.6, 6)
    colors = colormaps["tab10" if len(classes) <= 10 else "turbo"]
    for panel, (name, plane) in zip(figure.subplots(1, len(points), squeeze=False)[0], points.items()):
        for number, label in enumerate(classes):
            here = labels == number
            if here.any():
                color = colors(number if len(classes) <= 10 else number / max(1, len(classes) - 1))
                panel.scatter(*plane[here].T, s=9, color=color, label=label, alpha=0.75, lw=0)
        panel.set_title(name, fontsize=13, loc="left")
        panel.set_xticks([])
        panel.set_yticks([])
        panel.spines[:].set_color("#e3e7eb")
    if len(classes) <= 30:
        handles, names = panel.get_legend_handles_labels()
        figure.legend(handles, names, loc="outside right upper", fontsize=10, markerscale=2, frameon=False)
    return write_png(figure, path)
