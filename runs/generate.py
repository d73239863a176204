"""What a generative model's run shows while it goes on, and at its end: pictures, and test figures."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..agents import newest_first
from ..generative import GAN, Generative
from ..vision import Dataset
from ..vision.explain import embed, grid
from .lifecycle import say, summarize_model
from .model_plots import DARK_TRAINING, embedding, new_figure
from .plots import EVALUATION, dress, write_png
from .run import Run

__all__ = ["Generative", "conclude_generative", "draw_pictures", "image_grid", "result_text", "score"]


def image_grid(images: Tensor, path: Path, side: int = 64, gap: int = 2) -> Path:
    """Write images (rows, columns, C, H, W) in [0, 1] to a PNG, each enlarged to a side of about `side`.

    Three channels are red, green and blue, one is grey; of any other number each channel has a colour of its
    own, and of several on one pixel the last is seen (MinAtar's planes).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    from PIL import Image

    Image.fromarray(grid_pixels(images, side, gap)).save(path)
    return path


def grid_pixels(images: Tensor, side: int = 64, gap: int = 2) -> np.ndarray:
    """What `image_grid` writes: (H, W, 3) uint8."""
    columns = images.shape[1]
    pixels = np.rint(255 * to_rgb(images.flatten(0, 1).float().cpu().numpy())).astype(np.uint8)
    scale = max(1, round(side / max(pixels.shape[1:3])))
    enlarged = pixels.repeat(scale, 1).repeat(scale, 2)
    return grid(list(enlarged), columns=columns, gap=gap)


def to_rgb(images: np.ndarray) -> np.ndarray:
    """(N, C, H, W) in [0, 1] -> (N, H, W, 3) in [0, 1]."""
    if images.shape[1] in (1, 3):
        return np.broadcast_to(np.moveaxis(images.clip(0, 1), 1, -1), (len(images), *images.shape[2:], 3))
    from matplotlib import colormaps

    sheet = np.zeros((len(images), *images.shape[2:], 3))
    for number, channel in enumerate(np.moveaxis(images.clip(0, 1), 1, 0)):
        color = np.asarray(colormaps["tab10"](number % 10)[:3])
        sheet = sheet * (1 - channel[..., None]) + channel[..., None] * color
    return sheet


def draw_pictures(
    run: Run, model: Generative, dataset: Dataset, epoch: float | None = None
) -> dict[str, Path]:
    """Write the model's pictures into plots/, under the epoch's number or, without one, as the last ones."""
    when = "" if epoch is None else f"-epoch{round(epoch):05d}"
    drawn: dict[str, Path] = {}
    for name, images in model.pictures(dataset).items():
        drawn[name] = image_grid(images, run.path / "plots" / f"{name}{when}.png")
        run.image(f"plots/{name}", drawn[name], grad_step=model.grad_step)
    return drawn


def score(model: Generative, dataset: Dataset, effort: dict[str, Any] | None = None) -> dict[str, Any]:
    """The model's figures of the test images, as test/..., and the trivial ones, as baseline/..."""
    try:
        figures = model.test(dataset, **(effort or {}))
    except TypeError as error:
        raise ValueError(f"{model.name} has no {' and no '.join(effort or {})}") from error
    return {
        **{f"test/{name}": value for name, value in figures.items()},
        "test/images": len(dataset.test),
        **{f"baseline/{name}": value for name, value in model.baseline(dataset).items()},
    }


def result_text(result: dict[str, Any]) -> str:
    """One line a figure."""
    width = max(map(len, result))
    forms = {float: ".6g", int: ","}
    return "\n".join(
        f"{name:<{width}}  {value:{forms.get(type(value), '')}}" for name, value in result.items()
    )


def conclude_generative(run: Run, model: Generative, dataset: Dataset, wall_s: float) -> None:
    """Score a generative model on the test images, draw its curves and its last pictures."""
    result = score(model, dataset)
    rows = run.rows()
    summarize_model(run, result, wall_s)
    say(result_text(result))
    pictures = draw_pictures(run, model, dataset)
    title = f"{run.config['agent']} on {dataset.name}"
    if hasattr(model, "encode") and getattr(model, "latent_dim", 0) > 1 and len(dataset.test) > 2:
        pictures["latent map"] = latent_map(model, dataset, run.path / "plots" / "latent_map.png")
        run.image("plots/latent_map", pictures["latent map"], grad_step=model.grad_step)
    curves = measure_curves(rows, run.path / "plots" / "training_curves.png", title=title)
    run.image("plots/training_curves", curves, grad_step=model.grad_step)
    for name, path in {"training curves": curves, **pictures}.items():
        say(f"{name}: {path}")


def latent_map(model: Any, dataset: Dataset, path: Path, most: int = 500) -> Path:
    """Write the codes of test images, put into the plane by PCA and t-SNE and coloured by class, to a PNG."""
    part = dataset.test.take(torch.arange(min(most, len(dataset.test))))
    codes = model.encode(part.images, part.labels if model.conditional else None).float().cpu()
    points = {name: embed(codes, method) for name, method in (("PCA", "pca"), ("t-SNE", "tsne"))}
    return embedding(points, part.labels.numpy(), dataset.classes, path)


def conclude_gan(run: Run, model: GAN, dataset: Dataset, wall_s: float) -> None:
    """The same of a GAN's best weights; and beside them what its last ones get, as last/..."""
    newest = newest_first(run.path / "checkpoints")[0]
    last = GAN.load(newest, device=str(model.device))
    last.extractor = model.extractor
    figures = {f"last/{name}": value for name, value in last.test(dataset).items() if name != "fid_extractor"}
    run.summarize({"best/grad_step": model.grad_step, "last/grad_step": last.grad_step, **figures})
    conclude_generative(run, model, dataset, wall_s)
    if "last/fid" in figures:
        say(f"FID of the last weights: {figures['last/fid']:.6g}")


UNDRAWN = ("learning_rate", "log_prob", "fit", "closeness")
"""The schedule, and what is minus another measure, kept because the highest marks the best weights."""


def measure_curves(rows: list[dict[str, Any]], path: Path, *, title: str = "") -> Path:
    """Write what was measured in training against epochs, a panel a measure (train/X and validation/X share
    one), to a PNG."""
    names = dict.fromkeys(
        key.partition("/")[2]
        for row in rows
        for key in row
        if key.startswith(("train/", "validation/")) and key.partition("/")[2] not in UNDRAWN
    )
    columns = min(3, max(1, len(names)))
    lines = math.ceil(len(names) / columns) or 1
    figure = new_figure(5 * columns, 4 * lines)
    panels = figure.subplots(lines, columns, squeeze=False).flatten()
    for panel in panels[len(names) :]:
        panel.set_axis_off()
    for panel, name in zip(panels, names):
        for part, color, width in (("train", DARK_TRAINING, 1.3), ("validation", EVALUATION, 2.2)):
            key = f"{part}/{name}"
            points = [(row["epoch"], row[key]) for row in rows if key in row and math.isfinite(row[key])]
            if points:
                alone = "o" if len(points) == 1 else ""  # a line through one point is none
                panel.plot(*zip(*points), color=color, lw=width, marker=alone, label=part)
        values = [row[f"{p}/{name}"] for row in rows for p in ("train", "validation") if f"{p}/{name}" in row]
        # The first epochs would flatten all that comes after them.
        late = [v for v in values[len(values) // 20 :] if math.isfinite(v)]
        if late and max(late) > min(late):
            margin = 0.05 * (max(late) - min(late))
            panel.set_ylim(min(late) - margin, max(late) + margin)
        low, high = panel.get_ylim()
        dress(panel, ticks=6)
        panel.set_ylim(low, high)
        panel.set_title(name, fontsize=13, loc="left")
        panel.set_xlabel("epochs", fontsize=11)
        panel.legend(fontsize=10, framealpha=0.9, edgecolor="#e3e7eb", loc="best")
    figure.suptitle(title, fontsize=15, x=0.01, ha="left")
    return write_png(figure, path)
