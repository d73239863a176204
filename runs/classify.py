"""What a classifier's run ends with: its score on test images, and pictures."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from ..agents import RAM
from ..vision import Dataset
from .lifecycle import say, summarize_model
from .model_plots import confusion_matrix, filters_grid, training_curves
from .run import Run


def conclude_classifier(run: Run, model: Any, dataset: Dataset, wall_s: float) -> None:
    """Score a classifier on the test images, draw its curves, its confusions and its first filters."""
    from ..vision.explain import first_layer_filters

    result = score(model, dataset)
    rows = run.rows()
    summarize_model(run, result, wall_s)
    say(result_text(result))
    folder, title = run.path / "plots", f"{run.config['agent']} on {dataset.name}"
    pictures: dict[str, Path] = {}
    if any("train/loss" in row for row in rows):
        pictures["training curves"] = training_curves(rows, folder / "training_curves.png", title=title)
    predictions = model.predict(dataset.test.images)
    pictures["confusions"] = confusion_matrix(
        dataset.test.labels.numpy(),
        predictions.numpy(),
        dataset.classes,
        folder / "confusion.png",
        title=title,
    )
    try:
        filters = first_layer_filters(model.network, dataset.space.shape)
    except ValueError:  # no convolution or linear layer comes first
        filters = None
    if filters is not None:
        pictures["first filters"] = filters_grid(filters.numpy(), folder / "filters.png", title=title)
    for what, picture in pictures.items():
        run.image(f"plots/{picture.stem}", picture, grad_step=model.grad_step)
        say(f"{what}: {picture}")


def score(model: Any, dataset: Dataset) -> dict[str, Any]:
    """Error on the test images, its 95 % interval (Wilson 1927), and the trivial baseline's."""
    scores = model.evaluate(dataset.test)
    low, high = wilson(scores.error, len(dataset.test))
    majority = int(dataset.train.labels.mode().values)
    result: dict[str, Any] = {
        "test/error": scores.error,
        "test/error_ci95_low": low,
        "test/error_ci95_high": high,
        "test/loss": scores.loss,
        "test/images": len(dataset.test),
        "baseline/commonest_class": (dataset.test.labels != majority).double().mean().item(),
    }
    if isinstance(model, RAM):  # one pass with mean looks is the error; these say how much depends on that
        result["test/error_sampled"] = model.evaluate(dataset.test, sampled=True).error
        if (passes := model.config.monte_carlo) > 1:
            averaged = model.evaluate(dataset.test, sampled=True, passes=passes)
            result |= {"test/error_monte_carlo": averaged.error, "test/monte_carlo": passes}
    return result


def result_text(result: dict[str, Any]) -> str:
    text = (
        f"test error: {result['test/error']:.2%} of {result['test/images']:,} images "
        f"(95 % interval {result['test/error_ci95_low']:.2%} to {result['test/error_ci95_high']:.2%}); "
        f"always the commonest class: {result['baseline/commonest_class']:.1%}"
    )
    if "test/error_sampled" in result:
        text += f"\none pass with mean looks; with drawn ones {result['test/error_sampled']:.2%}"
    if "test/error_monte_carlo" in result:
        passes = result["test/monte_carlo"]
        text += f", their answers averaged over {passes} passes {result['test/error_monte_carlo']:.2%}"
    return text


def wilson(share: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """The Wilson score interval of a share of n."""
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)
