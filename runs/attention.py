"""What a recurrent attention model's run ends with: its errors, those of what it is compared with on the same
images and for as many epochs, and pictures of where it looks."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ..agents import RAM, load_checkpoint, newest_first, save_checkpoint
from ..agents.progress import progress as progress_display
from ..vision import Classifier, Dataset, Model
from ..vision.explain import grid
from ..vision.fixations import RIGHT, WRONG, draw_fixations
from .classify import result_text, score
from .lifecycle import say, summarize_model
from .model_plots import new_figure, training_curves
from .plots import BASELINE, EVALUATION, dress, write_png
from .run import Run

SHOWN, ROWS = 12, 6
"""Test images in the film, and in the sheet of all steps: the first ones, whatever comes of them."""


def conclude_ram(run: Run, model: RAM, dataset: Dataset, wall_s: float) -> None:
    """Score a model on the test images, train and score its baselines, draw all of it."""
    result = score(model, dataset)
    rows = run.rows()
    summarize_model(run, result, wall_s)
    say(result_text(result))
    folder, title = run.path / "plots", f"ram on {dataset.name}"
    pictures = {
        "training curves": training_curves(rows, folder / "training_curves.png", title=title),
        "where it looked": fixation_sheet(model, dataset, folder / "glimpses.png"),
        "film of it": fixation_film(model, dataset, folder / "glimpses.gif"),
    }
    curves = {"ram": errors_by_glimpse(model, dataset)}
    flat: dict[str, float] = {}
    if run.config["options"]["baseline"]:
        for name, other in baselines(model, dataset).items():
            trained, seconds = train_beside(run, name, other, dataset)
            flat[name] = trained.evaluate(dataset.test).error  # type: ignore[attr-defined]
            run.summarize({f"baseline/{name}": flat[name], f"baseline/{name}_wall_s": seconds})
            if isinstance(trained, RAM):
                curves["random looking"] = errors_by_glimpse(trained, dataset)
        say(table(result, flat, run.config["options"]["epochs"]))
    pictures["errors"] = error_curve(curves, flat, folder / "error_by_glimpses.png", title=title)
    for what, picture in pictures.items():
        run.image(f"plots/{picture.stem}_{picture.suffix[1:]}", picture, grad_step=model.grad_step)
        say(f"{what}: {picture}")


# What it is compared with.


def baselines(model: RAM, dataset: Dataset) -> dict[str, Model]:
    """New models for the same images, by the names under which the summary has their errors.

    Random looking is the same network with the same settings; the others are the paper's, two layers of 256
    and a convolution under one, with the same batches and augmentation.
    """
    common: dict[str, Any] = {"batch_size": model.config.batch_size, "augment": model.config.augment}
    classifiers = {"fully_connected": "mlp"}
    if min(dataset.space.shape[1:]) >= 10:
        classifiers["conv"] = "strided"
    seed, device = model.seed, str(model.device)
    others: dict[str, Model] = {}
    if model.config.looking == "learned":
        config = replace(model.config, looking="random")
        others["random_looking"] = RAM(dataset.space, dataset.classes, config, seed, device)
    for name, encoder in classifiers.items():
        settings = Classifier.recipe(encoder=encoder, **common)
        others[name] = Classifier(dataset.space, dataset.classes, settings, seed, device)
    return others


def train_beside(run: Run, name: str, model: Model, dataset: Dataset) -> tuple[Model, float]:
    """Train a baseline as the run's own model was, with checkpoints of its own in the run's folder, from
    which a run that was killed goes on. Returns the weights that did best on the validation images, and the
    seconds that this took here."""
    folder, options = run.path / "baselines" / name, run.config["options"]
    epochs, began = options["epochs"], time.perf_counter()
    if checkpoints := newest_first(folder):
        model = type(model).load(checkpoints[0], device=str(model.device))
        load_checkpoint(checkpoints[0], model)
    best_file = folder / "best.safetensors"
    best = float("-inf")
    if best_file.exists():
        before = type(model).load(best_file, device=str(model.device))
        best = 1 - before.evaluate(dataset.validation).error  # type: ignore[attr-defined]
    total, last = model.total_steps(dataset, epochs), model.grad_step
    label = f"baseline {name.replace('_', ' ')}"
    shown = progress_display(total, last, enabled=options["progress"], label=label, axis="grad_step")
    with shown as show:
        for row in model.training(dataset, epochs, options["log_every"]):
            show(row)
            now = row["grad_step"]
            if row.get(model.chosen_by, float("-inf")) >= best and model.chosen_by in row:
                best = row[model.chosen_by]
                folder.mkdir(parents=True, exist_ok=True)
                model.save(best_file)
            every = options["checkpoint_every"]
            if now // every > last // every or now >= total:
                save_checkpoint(model, folder, keep=1)
            last = now
    chosen = best_file if best_file.exists() else newest_first(folder)[0]
    return type(model).load(chosen, device=str(model.device)), time.perf_counter() - began


def table(result: Mapping[str, Any], others: Mapping[str, float], epochs: float) -> str:
    """Errors side by side, as lines of text."""
    errors = {
        "ram, mean looks": result["test/error"],
        "ram, drawn looks": result["test/error_sampled"],
        **{name.replace("_", " "): error for name, error in others.items()},
    }
    lines = [f"error on {result['test/images']:,} test images, {epochs:g} epochs each"]
    return "\n".join([*lines, *(f"  {name:<18} {error:7.2%}" for name, error in errors.items())])


# Pictures.


def errors_by_glimpse(model: RAM, dataset: Dataset) -> np.ndarray:
    """Error on the test images of what the model would answer after each glimpse, (T,)."""
    answers = model.watch(dataset.test.images).probabilities.argmax(-1)  # (T, N)
    return (answers != dataset.test.labels.cpu()).double().mean(1).numpy()


def error_curve(
    curves: Mapping[str, np.ndarray], flat: Mapping[str, float], path: Path, *, title: str = ""
) -> Path:
    """Write the error against the number of glimpses to a PNG; `flat` are the errors of nets that see all."""
    figure = new_figure(8.5, 5.2)
    axes = figure.add_subplot()
    colors = {"ram": EVALUATION, "random looking": BASELINE}
    for name, errors in curves.items():
        steps = np.arange(1, len(errors) + 1)
        axes.plot(steps, 100 * errors, marker="o", lw=2.2, color=colors[name], label=name)
    styles = {"fully_connected": (0, (5, 4)), "conv": (0, (1, 2))}
    for name, style in styles.items():
        if name in flat:
            axes.axhline(
                100 * flat[name], ls=style, lw=1.6, color="#3c434b", label=f"{name.replace('_', ' ')} net"
            )
    dress(axes, ticks=max(len(errors) for errors in curves.values()))
    longest = max(len(errors) for errors in curves.values())
    axes.set_xlim(0.7, longest + 0.3)
    axes.set_xticks(range(1, longest + 1), map(str, range(1, longest + 1)))
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.set_xlabel("glimpses taken", fontsize=12)
    axes.set_ylabel("test error, %", fontsize=12)
    axes.set_title(f"{title}: the answer after so many glimpses", fontsize=13, loc="left", pad=10)
    axes.legend(fontsize=11)
    return write_png(figure, path)


def fixation_pictures(model: RAM, images: Tensor, labels: Tensor) -> list[list[np.ndarray]]:
    """Of each image (N, C, H, W) a picture after each glimpse, with the boxes so far and what the model would
    answer then; green where that is right, else red."""
    looks = model.watch(images)
    patch, scales = model.config.patch, model.config.scales
    assert patch is not None
    assert scales is not None
    pictures: list[list[np.ndarray]] = []
    for n, (image, label) in enumerate(zip(images.cpu().numpy(), labels.tolist())):
        steps = []
        for t, answers in enumerate(looks.probabilities[:, n]):
            answer = int(answers.argmax())
            color = RIGHT if answer == label else WRONG
            path = looks.locations[: t + 1, n].numpy()
            picture = draw_fixations(image, model.high, path, patch, scales, color)
            text = f"{t + 1}: {model.classes[answer]}  {answers[answer]:.0%}"
            steps.append(captioned(picture, text, color))
        pictures.append(steps)
    return pictures


def captioned(picture: np.ndarray, text: str, color: tuple[int, int, int]) -> np.ndarray:
    """A picture (H, W, 3) uint8 with a line of text below."""
    from PIL import Image, ImageDraw, ImageFont

    strip = Image.new("RGB", (picture.shape[1], 26), (24, 24, 24))
    ImageDraw.Draw(strip).text((8, 13), text, fill=color, font=ImageFont.load_default(15), anchor="lm")
    return np.concatenate([picture, np.asarray(strip)])


def fixation_sheet(model: RAM, dataset: Dataset, path: Path) -> Path:
    """Write the first test images, a row each, after every glimpse to a PNG."""
    from PIL import Image

    images, labels = dataset.test.images[:ROWS], dataset.test.labels[:ROWS]
    rows = fixation_pictures(model, images, labels)
    sheet = grid([picture for row in rows for picture in row], columns=model.config.glimpses)
    Image.fromarray(sheet).save(path)
    return path


def fixation_film(model: RAM, dataset: Dataset, path: Path) -> Path:
    """Write the first test images, glimpse after glimpse, to a GIF."""
    from PIL import Image

    images, labels = dataset.test.images[:SHOWN], dataset.test.labels[:SHOWN]
    rows = fixation_pictures(model, images, labels)
    frames = [Image.fromarray(grid(list(step), columns=4)) for step in zip(*rows)]
    milliseconds = [700] * (len(frames) - 1) + [2500]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=milliseconds, loop=0)
    return path
