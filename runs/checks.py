"""Two checks before a long training: which step size, and whether the network can learn at all."""

import math
from dataclasses import replace
from pathlib import Path

import torch

from ..vision import Classifier, ClassifierConfig, Dataset
from .fit import FitOptions, open_dataset
from .lifecycle import say
from .model_plots import rate_search


def check_classifier(options: FitOptions, config: ClassifierConfig, search: bool, overfit: bool) -> int:
    """Run the checks asked for, and say what they found; the exit code is 1 where a batch was not learned."""
    dataset = open_dataset(options)

    def fresh(settings: ClassifierConfig) -> Classifier:
        return Classifier(dataset.space, dataset.classes, settings, seed=options.seed, device=options.device)

    failed = False
    if overfit:
        loss, accuracy = overfit_one_batch(fresh(plain(config)), dataset)
        failed = not accuracy > 0.99
        verdict = "FAILED: it should be below 0.01 at 100 %" if failed else "passed"
        say(f"one batch by heart: loss {loss:.2g}, accuracy {accuracy:.0%}; {verdict}")
    if search:
        path = Path("learning_rate.png")
        suggested = find_learning_rate(fresh(config), dataset, path)
        say(f"suggested: --learning-rate {suggested:.2g}; the search: {path}")
    return int(failed)


def find_learning_rate(
    model: Classifier,
    dataset: Dataset,
    path: Path,
    lowest: float = 1e-6,
    highest: float = 10.0,
    steps: int = 150,
) -> float:
    """A step size from one sweep (Smith 2015, 1506.01186): steps with rates that grow from `lowest` to
    `highest`, until the loss is four times its lowest. What is suggested is a tenth of the rate at which the
    smoothed loss was lowest. Draws the sweep to `path`. The model is spoiled by it.
    """
    rng = torch.Generator().manual_seed(model.seed)
    train = dataset.train.to(model.device)
    rates: list[float] = []
    smooth: list[float] = []
    average = 0.0
    for number in range(steps):
        rate = lowest * (highest / lowest) ** (number / (steps - 1))
        index = torch.randint(len(train), (min(model.config.batch_size, len(train)),), generator=rng)
        index = index.to(model.device)
        loss = model.update(train.images[index], train.labels[index], rate)[0].item()
        average = 0.9 * average + 0.1 * loss
        value = average / (1 - 0.9 ** (number + 1))
        if not math.isfinite(value) or (smooth and value > 4 * min(smooth)):
            break
        rates.append(rate)
        smooth.append(value)
    if len(smooth) < 2:
        raise ValueError(f"the loss is not finite even at a learning_rate of {lowest:g}")
    suggested = rates[int(torch.tensor(smooth).argmin())] / 10
    rate_search(rates, smooth, suggested, path)
    return suggested


def overfit_one_batch(model: Classifier, dataset: Dataset, steps: int = 300) -> tuple[float, float]:
    """Loss and accuracy after training on one batch only: a right network with a right loss reaches 0 and 1.

    Nothing is augmented and nothing regularises, so the model must be made that way (`plain`).
    """
    for module in model.network.modules():
        if isinstance(module, torch.nn.Dropout | torch.nn.Dropout2d):
            module.p = 0.0
    split = dataset.train.take(torch.arange(min(model.config.batch_size, len(dataset.train))))
    split = split.to(model.device)
    loss, right = math.inf, 0.0
    for _ in range(steps):
        loss, right = model.update(split.images, split.labels, model.config.learning_rate).tolist()
        if loss < 1e-3:
            break
    return loss, right / len(split)


def plain(config: ClassifierConfig) -> ClassifierConfig:
    """A classifier's config without all that keeps it from learning one batch by heart."""
    return replace(
        config, augment=(), mixup=0.0, weight_decay=0.0, l1=0.0, max_norm=None, dropout=0.0,
        label_smoothing=0.0, ema=0.0,
    )  # fmt: skip
