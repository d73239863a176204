"""Which features samples are measured with: those of a classifier of the same data, or of Inception."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..generative.metrics import Extractor, classifier_extractor, inception_extractor
from ..vision import Classifier, Dataset, check_dataset, find_weights, read_weights
from .lifecycle import say


def find_extractor(
    name: str, dataset: Dataset, whole: Callable[[], Dataset], device: torch.device
) -> Extractor | None:
    """The extractor that --extractor means, or None for `none`.

    Args:
        name: auto (a classifier trained on the dataset once, and kept in the cache), none, inception, or the
            path of a classifier's run or weights.
        dataset: what is to be measured.
        whole: gives the same dataset as it is by default, whatever seed and sizes a run has, so that all runs
            on it share one extractor.

    Raises ValueError or FileNotFoundError for whatever does not fit the dataset.
    """
    if name == "none":
        return None
    if name == "inception":
        if dataset.high != 255 or dataset.space.shape[0] not in (1, 3):
            raise ValueError(
                f"extractor inception takes grey or RGB images of 256 levels, got {dataset.space}"
            )
        return inception_extractor(device)
    judge = cached_classifier(whole(), device) if name == "auto" else load_classifier(name, device)
    try:
        check_dataset(dataset, judge.space, judge.classes)
    except ValueError as error:
        raise ValueError(f"extractor {name}: {error}") from error
    return classifier_extractor(judge)


def load_classifier(name: str, device: torch.device) -> Classifier:
    path = Path(name)
    if not path.exists():
        raise ValueError(f"extractor must be auto, none, inception, or a classifier's run, got {name!r}")
    kind = read_weights(find_weights(path))[1].get("model")
    if kind != "classifier":
        raise ValueError(f"extractor must be a classifier's run, got {name}, which holds a {kind}")
    return Classifier.load(path, device=str(device))


def cached_classifier(dataset: Dataset, device: torch.device) -> Classifier:
    """A classifier of a dataset: read from the cache, or trained and put there."""
    config, epochs = recipe(dataset)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "foveal" / "extractors"
    path = cache / f"{Path(dataset.name).stem}-{dataset.digest[:16]}.safetensors"
    if path.exists():
        try:
            return Classifier.load(path, device=str(device))
        except ValueError:  # of another version
            path.unlink()
    say(f"extractor: training {config.encoder or config.backbone} on {dataset.name}, once; kept in {path}")
    judge = Classifier(dataset.space, dataset.classes, config, seed=0, device=str(device)).fit(
        dataset, epochs
    )
    say(f"extractor: {judge.evaluate(dataset.test).error:.2%} of {len(dataset.test):,} test images wrong")
    cache.mkdir(parents=True, exist_ok=True)
    judge.save(path)
    return judge


def recipe(dataset: Dataset) -> tuple[Any, float]:
    """Config and epochs of a dataset's extractor: LeNet-5 (84 features) for grey images, a ResNet-20 (64) for
    colours and for images that are too small for the former."""
    channels, height, width = dataset.space.shape
    small = min(height, width) < 14
    backbone = "lenet5" if channels == 1 and not small else "resnet20"
    epochs = 8.0 if small else 15.0
    return Classifier.recipe(backbone, dataset.name), epochs
