"""RAM: "Recurrent Models of Visual Attention" (Mnih et al. 2014, 1406.6247).

A network that classifies an image by a few small glimpses, and learns where to look: a core with memory takes
in glimpse after glimpse; a Gaussian around what the locator makes of its state says where the next one is
taken; after the last the classifier answers. The hybrid loss of the paper's section 3.2 is

    CE(answer) + sum_t (b_t - R)^2 - sum_t log pi(l_t) (R - b_t),    mean over the batch,

with the reward R = 1 for a right answer. The cross-entropy trains classifier, core and glimpse network;
REINFORCE trains the locator alone, for its loss sees the state and the locations as given; so does the
baseline b_t. The paper weighs the last term; Adam takes each weight's steps as long whatever its loss is
multiplied by, so what is set here is the locator's step size (`locator_rate`). Where we deviate: Adam for
momentum; what and where are multiplied, not added (`GlimpseEncoder`); the locator's bias is another one for
each look, which begin on a ring around the centre; the Gaussian may narrow over the training; and as options
an LSTM or GRU as core, answers that are asked for after every glimpse, and random looks.

Images go to the device once, and a batch of whole episodes is one graph: `unroll` plays them. The environment
`foveal/Glimpse-v0` plays the same episodes step by step.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from gymnasium import spaces
from torch import Tensor, nn

from ..vision import Dataset, Split, check_dataset, make_augment
from ..vision.classifier import Scores, check_finite
from ..vision.datasets import fits
from ..vision.glimpse import GlimpseEncoder, check_glimpse, framed, look
from ..vision.model import Model, Row, Shuffle, seeds_of
from ..vision.optimization import (
    Adam,
    adam_state,
    adam_step,
    flatten_parameters,
    keep_freed_memory,
    linear,
    take_gradient,
    views_of,
)
from .initialization import orthogonal
from .recurrent import CORES, RNN


@dataclass(frozen=True)
class RAMConfig:
    """Hyper-parameters. Lengths of looks are in units of half the canvas: locations go from -1 to 1."""

    glimpses: int = 6
    """Glimpses before the answer; the first is taken before anything is known."""
    patch: int | None = None
    """Side of a glimpse's finest patch in pixels; None for the paper's: 8 on canvases below 60 pixels, else
    12."""
    scales: int | None = None
    """Patches of a glimpse, each twice as wide as the one before; None for the paper's: 1 below 60 pixels, 3
    below 100, else 4."""
    first: Literal["random", "centre"] = "centre"
    """Where the first glimpse is taken; anywhere is the paper's, and on MNIST much harder to learn from."""
    looking: Literal["learned", "random"] = "learned"
    """Where the others are: by the locator, or anywhere, which is the baseline."""
    std: float = 0.1
    """Standard deviation of the Gaussian that looks are drawn from, greater than 0."""
    std_final: float | None = None
    """What it falls to, in a straight line over the training, and what drawn looks have after it; None keeps
    it. Wide at first to find better places, narrow at last because answers are given at the means."""
    core: Literal["rnn", "lstm", "gru"] = "rnn"
    """What remembers: the paper's rectified network, or one with gates."""
    hidden: int = 256
    """Width of the core."""
    glimpse_hidden: int = 256
    """Width of the glimpse network, of what and of where."""
    answers: Literal["last", "every"] = "last"
    """Which answers the cross-entropy counts: the paper's last one, or the mean over all. Only the last is
    rewarded."""
    batch_size: int = 128
    """Images in one gradient step; as many as there are, at most."""
    learning_rate: float = 2e-3
    """Step size of Adam before the schedule."""
    locator_rate: float = 0.3
    """The locator's step size in parts of the others'. REINFORCE's gradient is noise for the most part, which
    Adam turns into steps of full length: at 1 the looks soon walk off to the borders."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """How the step size falls: to 0 by half a cosine over the training, or never."""
    augment: tuple[str, ...] = ()
    """As a classifier's, in this order: crop:P (padding P), flip, shift:P, cutout:S (square of side S)."""
    background: int = 0
    """Value of all pixels outside of the canvas, in the images' units."""
    monte_carlo: int = 1
    """Episodes with drawn looks over which `test/error_monte_carlo` averages an image's answers; 1 leaves it
    out. No other figure averages."""

    def __post_init__(self) -> None:
        for name in ("glimpses", "patch", "scales", "hidden", "glimpse_hidden", "batch_size", "monte_carlo"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}")
        for name in ("std", "std_final", "learning_rate", "locator_rate"):
            if getattr(self, name) is not None and not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be greater than 0, got {getattr(self, name)}")
        for name, known in (
            ("first", ("random", "centre")),
            ("looking", ("learned", "random")),
            ("core", tuple(RAM_CORES)),
            ("answers", ("last", "every")),
            ("schedule", ("cosine", "constant")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        make_augment(self.augment)


RAM_CORES: dict[str, Any] = {"rnn": RNN, **CORES}


def recipe(
    backbone: str | None = None, dataset: str | None = None, encoder: str | None = None, **changes: Any
) -> RAMConfig:
    """The settings known to work on a dataset, with `changes` made. ValueError for a backbone or an encoder:
    it has its own."""
    for name, given in (("backbone", backbone), ("encoder", encoder)):
        if given is not None:
            raise ValueError(f"{name}: ram has a glimpse network of its own, got {given!r}")
    settings: dict[str, Any] = {"std_final": 0.03}
    if dataset == "mnist":
        settings["augment"] = ("crop:1",)
    return RAMConfig(**{**settings, **changes})


class RAMNetwork(nn.Module):
    """Glimpse network, core, locator, baseline and classifier."""

    def __init__(self, values: int, classes: int, config: RAMConfig):
        super().__init__()
        self.encoder = GlimpseEncoder(values, config.glimpse_hidden)
        self.core = RAM_CORES[config.core](config.glimpse_hidden, config.hidden)
        self.locator = nn.Linear(config.hidden, 2)
        self.baseline = nn.Linear(config.hidden, 1)
        self.classifier = nn.Linear(config.hidden, classes)
        orthogonal(self.encoder)
        spread_kinks(self.encoder.where)
        for head, gain in ((self.locator, 0.01), (self.baseline, 0.01), (self.classifier, 0.01)):
            orthogonal(head, gain)
        self.scan = nn.Parameter(ring(config.glimpses - 1))

    def forward(self, glimpses: Tensor, locations: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """One glimpse in [0, 1] (B, ...) at locations (B, 2): what the core gives (B, hidden), and its state
        (B, S)."""
        return self.core.step(self.core.project(self.encoder(glimpses, locations)), state)

    def means(self, hidden: Tensor, taken: int | Tensor) -> Tensor:
        """Where to look when so many glimpses are `taken`, from 1, and the core gave (B, hidden): (B, 2) in
        (-1, 1). No gradient goes on to the core."""
        return (self.locator(hidden.detach()) + self.scan[taken - 1]).tanh()

    def taken(self, time: Tensor) -> Tensor:
        """How many glimpses are taken, int64 (B,), of the environment's "time" (B, 1), their share; all but
        the last at most, since no look comes after that."""
        looks = len(self.scan)
        return (time.flatten() * (looks + 1)).round().long().clamp(1, looks)


def ring(looks: int) -> Tensor:
    """Looks before anything is learned, (looks, 2), in front of the tanh: in turn around the centre, half way
    to the border, one alone at the centre. Were they all there, the classifier would learn from nothing else
    at first."""
    angle = 2 * math.pi * torch.arange(looks) / max(1, looks)
    radius = 0.45 if looks > 1 else 0.0
    return torch.atanh(radius * torch.stack([angle.cos(), angle.sin()], 1))


@torch.no_grad()
def spread_kinks(layer: nn.Linear) -> None:
    """Let each rectified unit of a layer of locations (B, 2) bend along a line of its own, all over
    [-1, 1]^2: slopes of length 1 in any direction, biases from -1 to 1. With biases of zero all bend at the
    centre, and with orthogonal columns 128 slopes are so small that a location is lost beside the pixels."""
    angle = 2 * math.pi * torch.rand(layer.out_features)
    layer.weight.copy_(torch.stack([angle.cos(), angle.sin()], 1))
    layer.bias.uniform_(-1, 1)


# The algorithm, as functions that touch only what they are given.


class Episodes(NamedTuple):
    """Whole episodes of B images: T glimpses and the T - 1 looks between them."""

    locations: Tensor
    """(T, B, 2): where each glimpse was taken."""
    samples: Tensor
    """(T - 1, B, 2): the looks as drawn, before they were cut to [-1, 1]."""
    hidden: Tensor
    """(T, B, hidden): what the core gave after each glimpse."""


def unroll(
    network: RAMNetwork,
    frames: Tensor,
    first: Tensor,
    noise: Tensor,
    config: RAMConfig,
    high: float,
    see: Callable[[Tensor], None] | None = None,
) -> Episodes:
    """Play an episode on each of B images, framed by `framed`.

    Args:
        frames: (B, C, H', W') in the images' own units, of which `high` is the largest.
        first: (B, 2), where the first glimpse is taken.
        noise: (T - 1, B, 2), standard normal; zeros look at the means. With random looking the looks
            themselves.
        see: is given each glimpse (B, ...), scaled to [0, 1].
    """
    patch, scales = resolved(config)
    location, state = first, first.new_zeros(len(frames), network.core.state_size)
    locations, samples, outputs = [first], [], []
    for t in range(len(noise) + 1):
        glimpses = look(frames, location, patch, scales).div_(high).to(first.dtype)
        if see is not None:
            see(glimpses)
        output, state = network(glimpses, location, state)
        outputs.append(output)
        if t < len(noise):
            if config.looking == "random":
                sample = noise[t]
            else:
                with torch.no_grad():  # the loss makes the means again, of all steps at once
                    sample = network.means(output, t + 1) + config.std * noise[t]
            location = sample.clamp(-1, 1)
            locations.append(location)
            samples.append(sample)
    return Episodes(
        torch.stack(locations),
        torch.stack(samples) if samples else noise,
        torch.stack(outputs),
    )


def log_density(samples: Tensor, means: Tensor, std: float) -> Tensor:
    """log of the Gaussian density around `means` at samples (..., 2), which are given: (...)."""
    scaled = (samples.detach() - means) / std
    return -0.5 * scaled.square().sum(-1) - 2 * math.log(std * math.sqrt(2 * math.pi))


class Losses(NamedTuple):
    """The three parts of the hybrid loss, the log-loss of the last answer, and how many of the B answers were
    right; scalars."""

    classifier_loss: Tensor
    baseline_loss: Tensor
    look_loss: Tensor
    right: Tensor


def ram_losses(network: RAMNetwork, episodes: Episodes, labels: Tensor, config: RAMConfig) -> Losses:
    """The parts of the hybrid loss of episodes whose right answers are labels (B,)."""
    hidden = episodes.hidden if config.answers == "every" else episodes.hidden[-1:]
    logits = network.classifier(hidden)  # (T or 1, B, K)
    classifier_loss = F.cross_entropy(logits.flatten(0, 1), labels.repeat(len(logits)))
    right = logits[-1].argmax(-1) == labels
    reward = right.to(logits.dtype)
    before = episodes.hidden[:-1].detach()  # what each look was chosen by, (T - 1, B, hidden)
    baselines = network.baseline(before).squeeze(-1)  # (T - 1, B)
    baseline_loss = (baselines - reward).square().sum(0).mean()
    look_loss = logits.new_zeros(())
    if config.looking == "learned":
        taken = torch.arange(1, len(before) + 1, device=before.device).unsqueeze(1)
        log_p = log_density(episodes.samples, network.means(before, taken), config.std)
        look_loss = -(log_p * (reward - baselines.detach())).sum(0).mean()
    return Losses(classifier_loss, baseline_loss, look_loss, right.sum())


class Looks(NamedTuple):
    """How images were looked at, and what was answered."""

    locations: Tensor
    """(T, N, 2): where each glimpse was taken."""
    probabilities: Tensor
    """(T, N, K): the classifier's answer after each glimpse; the last is the answer."""


class RAM(Model):
    """Learns to classify images by a few glimpses, and where to look.

    >>> from foveal.agents import RAM
    >>> from foveal.vision import load_dataset
    >>> digits = load_dataset("digits")
    >>> ram = RAM(digits.space, digits.classes, RAM.Config(glimpses=3, patch=4)).learn(digits, epochs=1)
    >>> ram.classify(digits.test.images[:3]).shape
    torch.Size([3])
    """

    name: ClassVar[str] = "ram"
    Config: ClassVar[type] = RAMConfig
    recipe = staticmethod(recipe)
    chosen_by: ClassVar[str] = "validation/accuracy"
    config: RAMConfig
    network: RAMNetwork

    def __init__(
        self,
        space: spaces.Box,
        classes: Sequence[str],
        config: RAMConfig | None = None,
        seed: int = 0,
        device: str = "auto",
    ):
        super().__init__(space, tuple(classes), config, seed, device)
        channels, height, width = space.shape
        patch, scales = resolved(self.config, min(height, width))
        self.config = replace(self.config, patch=patch, scales=scales)
        check_glimpse(patch, scales, (height, width))
        self.high = float(np.max(space.high))
        if not 0 <= self.config.background <= self.high:
            raise ValueError(f"background must be from 0 to {self.high:g}, got {self.config.background}")
        weights_seed, self.shuffle_seed, noise_seed, augment_seed, predict_seed = seeds_of(seed, 5)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(weights_seed)
            self.network = RAMNetwork(scales * channels * patch**2, len(self.classes), self.config)
        self.network.to(self.device)
        self.flat = flatten_parameters(self.network)
        self.parameters = list(self.network.parameters())
        keep_freed_memory()
        self.gradient = torch.zeros_like(self.flat, requires_grad=False)
        self.gradients = views_of(self.gradient, self.parameters)
        self.adam: Adam = adam_state(self.flat.detach())
        self.augment = make_augment(self.config.augment)
        self.noise_rng = torch.Generator().manual_seed(noise_seed)
        self.augment_rng = torch.Generator().manual_seed(augment_seed)
        self.predict_rng = torch.Generator().manual_seed(predict_seed)
        self.shuffle: Shuffle | None = None
        self.stored_shuffle: dict[str, Tensor] | None = None

    learn = Model.fit

    def training(self, dataset: Dataset, epochs: float, log_every: int = 100) -> Iterator[Row]:
        check_dataset(dataset, self.space, self.classes)
        if not len(dataset.train):
            raise ValueError(f"{dataset.name} has no training images")
        train = dataset.train.to(self.device) if fits(dataset.train, self.device) else dataset.train
        self.shuffle = Shuffle(len(train), self.config.batch_size, self.shuffle_seed)
        if self.stored_shuffle is not None:
            self.shuffle.restore(self.stored_shuffle)
            self.stored_shuffle = None
        total_steps = self.total_steps(dataset, epochs)
        sums = torch.zeros(4, device=self.device)
        images, steps, clock = 0, 0, time.perf_counter()
        while self.grad_step < total_steps:
            batch = train.take(self.shuffle.next()).to(self.device)
            rate = self.config.learning_rate
            if self.config.schedule == "cosine":
                rate *= 0.5 * (1 + math.cos(math.pi * self.grad_step / total_steps))
            std = linear(self.config.std, self.config.std_final, self.grad_step / total_steps)
            sums += self.update(batch.images, batch.labels, rate, std)
            images, steps, self.grad_step = images + len(batch), steps + 1, self.grad_step + 1
            reporting = self.grad_step % log_every == 0 or self.shuffle.at_end
            if not reporting and self.grad_step < total_steps:
                continue
            *losses, right = sums.tolist()
            check_finite(sum(losses) / steps, self.grad_step)
            check_finite(float(self.flat.detach().sum()), self.grad_step)
            row: Row = {
                "grad_step": self.grad_step,
                "epoch": self.grad_step / self.shuffle.batches,
                "train/loss": losses[0] / steps,
                "train/baseline_loss": losses[1] / steps,
                "train/look_loss": losses[2] / steps,
                "train/accuracy": right / images,
                "train/learning_rate": rate,
                "speed/images_per_s": images / (time.perf_counter() - clock),
            }
            if (self.shuffle.at_end or self.grad_step >= total_steps) and len(dataset.validation):
                scores = self.evaluate(dataset.validation)
                row |= {"validation/loss": scores.loss, "validation/accuracy": 1 - scores.error}
            yield row
            sums.zero_()
            images, steps, clock = 0, 0, time.perf_counter()

    def update(self, images: Tensor, labels: Tensor, learning_rate: float, std: float) -> Tensor:
        """One gradient step on raw images (B, C, H, W) and labels (B,), with looks drawn with `std`: the
        losses and right answers (4,)."""
        frames = self.frame(self.augment(images, self.augment_rng))
        first, noise = self.draw(len(images), self.noise_rng)
        config = replace(self.config, std=std)
        episodes = unroll(self.network, frames, first, noise, config, self.high)
        losses = ram_losses(self.network, episodes, labels, config)
        loss = losses.classifier_loss + losses.baseline_loss + losses.look_loss
        take_gradient(loss, self.parameters, self.gradients)
        locator = [self.network.scan, *self.network.locator.parameters()]
        before = [weight.detach().clone() for weight in locator]
        adam_step(self.flat, self.gradient, self.adam, learning_rate)
        with torch.no_grad():  # Adam's steps are proportional to its rate, so a part of a step is its rate's
            for weight, old in zip(locator, before):
                weight.copy_(torch.lerp(old, weight, self.config.locator_rate))
        return torch.stack([part.detach().float() for part in losses])

    def frame(self, images: Tensor) -> Tensor:
        patch, scales = resolved(self.config)
        return framed(images, patch, scales, self.config.background)

    def draw(self, count: int, generator: torch.Generator, sampled: bool = True) -> tuple[Tensor, Tensor]:
        """First locations (B, 2) and the noise of the looks (T - 1, B, 2), zeros where none is `sampled`."""

        def uniform(*shape: int) -> Tensor:
            return (2 * torch.rand(*shape, 2, generator=generator) - 1).to(self.device)

        first = uniform(count)
        if self.config.first == "centre":
            first.zero_()
        between = self.config.glimpses - 1
        if self.config.looking == "random":
            return first, uniform(between, count)
        if not sampled:
            return first, torch.zeros(between, count, 2, device=self.device)
        return first, torch.randn(between, count, 2, generator=generator).to(self.device)

    @property
    def std(self) -> float:
        """Of looks that are drawn after the training."""
        return self.config.std if self.config.std_final is None else self.config.std_final

    # What it is used for.

    @torch.no_grad()
    def watch(self, images: Tensor, sampled: bool = False, seed: int = 0, batch_size: int = 500) -> Looks:
        """One pass over raw images (N, C, H, W): how they are looked at, on the CPU.

        Looks go to the means of the locator, or are drawn where `sampled`. `seed` is of all that is random:
        first locations, drawn looks, and all locations of a model that looks at random.
        """
        generator = torch.Generator().manual_seed(seed)
        if not len(images):
            raise ValueError("images must be one or more, got none")
        config = replace(self.config, std=self.std)
        locations, probabilities = [], []
        for part in images.split(batch_size):
            frames = self.frame(part.to(self.device))
            first, noise = self.draw(len(part), generator, sampled)
            episodes = unroll(self.network, frames, first, noise, config, self.high)
            locations.append(episodes.locations.cpu())
            probabilities.append(self.network.classifier(episodes.hidden).softmax(-1).cpu())
        return Looks(torch.cat(locations, 1), torch.cat(probabilities, 1))

    def classify(self, images: Tensor) -> Tensor:
        """Raw images (N, C, H, W) -> the answer to each, int64 (N,), by one pass with mean looks."""
        return self.watch(images).probabilities[-1].argmax(-1)

    def evaluate(self, split: Split, sampled: bool = False, passes: int = 1, seed: int = 0) -> Scores:
        """Loss and error on a split by one pass; more `passes` are averaged. Nothing of the training
        changes."""
        labels = split.labels.cpu()
        total = self.watch(split.images, sampled, seed).probabilities[-1]
        for other in range(1, passes):
            total = total + self.watch(split.images, sampled, seed + other).probabilities[-1]
        loss = F.nll_loss((total / passes).clamp(min=1e-12).log(), labels)
        predictions = total.argmax(-1)
        return Scores(loss.item(), (predictions != labels).double().mean().item(), predictions)

    @torch.no_grad()
    def predict(
        self,
        obs: dict[str, np.ndarray],
        state: Tensor | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[dict[str, np.ndarray], Tensor]:
        """Actions of `foveal/Glimpse-v0` for its observations, one or a batch, in Stable-Baselines3's
        convention: {"look": float32 (B, 2), "answer": int64 (B,)}, and the core's state (B, S) for the next
        ones. Without `deterministic` looks are drawn. ValueError for glimpses of another kind."""
        glimpses, locations = (torch.as_tensor(obs[key]).to(self.device) for key in ("glimpse", "location"))
        single = locations.ndim == 1
        if single:
            glimpses, locations = glimpses.unsqueeze(0), locations.unsqueeze(0)
        patch, scales = resolved(self.config)
        wanted = (len(locations), scales * self.space.shape[0], patch, patch)
        if glimpses.shape != wanted:
            raise ValueError(f"obs['glimpse'] must be {wanted}, got {tuple(glimpses.shape)}")
        if state is None:
            state = torch.zeros(len(locations), self.network.core.state_size, device=self.device)
        elif episode_start is not None:
            state = state * ~torch.as_tensor(episode_start, device=self.device).view(-1, 1)
        output, state = self.network(glimpses, locations, state)
        _, noise = self.draw(len(locations), self.predict_rng, sampled=not deterministic)
        where = locations  # no other look comes after the last glimpse
        if len(noise) and self.config.looking == "random":
            where = noise[0]
        elif len(noise):
            taken = self.network.taken(torch.as_tensor(obs["time"]).to(self.device))
            where = self.network.means(output, taken) + self.std * noise[0]
        actions = {
            "look": where.clamp(-1, 1).cpu().numpy(),
            "answer": self.network.classifier(output).argmax(-1).cpu().numpy(),
        }
        return ({key: part[0] for key, part in actions.items()} if single else actions), state

    # Checkpoints.

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = {f"adam.{name}": tensor for name, tensor in self.adam._asdict().items()}
        for name in ("noise_rng", "augment_rng", "predict_rng"):
            tensors[name] = getattr(self, name).get_state()
        if self.shuffle is not None:
            tensors |= {f"shuffle.{name}": tensor for name, tensor in self.shuffle.state().items()}
        return tensors, {}

    def restore(
        self, tensors: dict[str, Tensor], meta: dict[str, Any], load: Callable[[str], dict[str, Tensor]]
    ) -> bool:
        for name, tensor in self.adam._asdict().items():
            tensor.copy_(tensors[f"adam.{name}"])
        for name in ("noise_rng", "augment_rng", "predict_rng"):
            getattr(self, name).set_state(tensors[name])
        stored = {k.removeprefix("shuffle."): v for k, v in tensors.items() if k.startswith("shuffle.")}
        self.stored_shuffle = stored or None
        return True


def resolved(config: RAMConfig, side: int = 0) -> tuple[int, int]:
    """patch and scales, by the canvas's shorter side where the config leaves them open."""
    patch = config.patch or (8 if side < 60 else 12)
    scales = config.scales or (1 if side < 60 else 3 if side < 100 else 4)
    return patch, scales
