"""The Generative contract: a Model that learns what images look like, and makes new ones.

    model = VAE(dataset.space, dataset.classes, VAE.Config(...), seed=0)
    model.fit(dataset, epochs)            # vision.Model's: fit, training, save, load, state, restore
    model.sample(64, generator)           # (64, C, H, W) uint8, new images: what the model says images are
    model.log_prob(x)                     # where the likelihood is exact: (N,) nats
    model.elbo(x), model.iwae(x, k)       # where there is a bound on it: (N,) nats

A model offers only what it has: there is no `log_prob` that raises. Images are raw everywhere, uint8 in
[0, high] of the model's space, as a Dataset has them; what a model calls an image of its own (a mean, a
reconstruction) is a float in [0, 1].

What a subclass says, in this order on its page:

    name, Config, recipe        as every Model; fields of the Config that are read here: batch_size,
                                learning_rate, schedule, validate_every, precision, and, where there are any,
                                ema and conditional
    run_options(dataset)        defaults of `foveal train` for a dataset: {"epochs": 50.0, "binarize": "8"}
    measures                    names of the numbers that `update` returns: rows have train/NAME
    chosen_by                   the key of rows whose highest value marks the best weights
    headline                    the key of summary.json that sums a run up
    build()                     the network, all of it (a GAN's: generator and critic); may raise ValueError
    make_learners()             a Learner for each network with an optimizer of its own; by default one
    update(images, labels, moment)
                                one gradient step on raw images (B, C, H, W): a tensor (len(measures),) of
                                means over the batch, without `.item()`. Randomness comes from torch's global
                                generator, which is the model's own during a step (for dropout too), and is
                                resumed
    validate(dataset)           quick figures of dataset.validation, without prefix; the training's
                                randomness is not touched (`fixed_noise`)
    test(dataset)               the figures of dataset.test, without prefix, for summary.json's test/...
    baseline(dataset)           what something trivial gets, for baseline/...
    sample(n, generator, labels)
                                as above; labels (n,) int64 where the model is conditional, else None
    pictures(dataset)           name -> (rows, columns, C, H, W) float in [0, 1], of the same noise each time:
                                drawn into plots/ on a fixed schedule and at the end

A model with latents has `latent_dim`, `decode(z, labels) -> images in [0, 1]`, and where it can
`encode(images, labels) -> z`; what is drawn from these two is in `latent.py`. What a checkpoint holds beyond
learners, noise and shuffle goes through `extra_state` and `restore_extra`. To join: a line in MODELS and in
CONCLUSIONS of runs/fit.py.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from gymnasium import spaces
from torch import Tensor, nn

from ..vision import Dataset, Model
from ..vision.classifier import check_dataset
from ..vision.datasets import fits
from ..vision.encoder import preprocess
from ..vision.model import Row, Shuffle, seeds_of
from ..vision.optimization import (
    Adam,
    adam_state,
    adam_step,
    clip_norm,
    flatten_parameters,
    keep_freed_memory,
    set_training,
    take_gradient,
    views_of,
    with_modes,
)
from .latent import line


class Moment(NamedTuple):
    """When a step is taken, for schedules."""

    step: int
    """Gradient steps taken before it."""
    epoch: float
    """Passes over the training images before it."""
    progress: float
    """Share of the training that lies behind, in [0, 1)."""


class Learner:
    """The weights of a network as one vector, with its gradient, Adam's state and an average of the weights.

    Make it after the network is on its device. Weights that do not require a gradient are left out.
    """

    def __init__(self, network: nn.Module, ema: float = 0.0, betas: tuple[float, float] = (0.9, 0.999)):
        self.parameters = [p for p in network.parameters() if p.requires_grad]
        self.weights = flatten_parameters(network).detach()  # (P,)
        self.gradient = torch.zeros_like(self.weights)
        self.views = views_of(self.gradient, self.parameters)
        self.adam = adam_state(self.weights)
        self.betas, self.ema = betas, ema
        self.average = self.weights.clone() if ema else None

    def step(self, loss: Tensor, learning_rate: float, max_norm: float | None = None) -> Tensor:
        """One step of Adam down the gradient of a loss; the gradient's L2 norm before it was clipped."""
        take_gradient(loss, self.parameters, self.views)
        return self.descend(learning_rate, max_norm)

    def descend(self, learning_rate: float, max_norm: float | None = None) -> Tensor:
        """The same of a gradient that is in its place."""
        norm = torch.linalg.vector_norm(self.gradient)
        if max_norm is not None:
            clip_norm(self.gradient, max_norm)
        adam_step(self.weights, self.gradient, self.adam, learning_rate, betas=self.betas)
        if self.average is not None:
            # An average over fewer steps at first, else it remembers the random beginning for long.
            steps = self.adam.steps
            self.average.lerp_(self.weights, 1 - ((1 + steps) / (10 + steps)).clamp(max=self.ema))
        return norm

    def state(self) -> dict[str, Tensor]:
        tensors = {"weights": self.weights, **self.adam._asdict()}
        return tensors if self.average is None else {**tensors, "average": self.average}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        self.weights.copy_(tensors["weights"])
        self.adam = Adam(*(tensors[name].to(self.weights.device) for name in Adam._fields))
        if self.average is not None:
            self.average.copy_(tensors["average"])


class Generative(Model):
    """Base of the generative models; see the module's page for what a subclass gives."""

    run_options: ClassVar[Callable[..., Any]]
    measures: tuple[str, ...]
    headline: ClassVar[str]
    sample: Callable[..., Tensor]
    """`sample(n, generator=None, labels=None)`, see above; only where the model has it."""

    def __init__(
        self,
        space: spaces.Box,
        classes: Sequence[str],
        config: Any = None,
        seed: int = 0,
        device: str = "auto",
    ):
        super().__init__(space, tuple(classes), config, seed, device)
        weights_seed, self.shuffle_seed, noise_seed, self.draw_seed = seeds_of(seed, 4)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(weights_seed)
            self.network = self.build()
        self.network.to(self.device).eval()
        self.moded = with_modes(self.network)
        self.learners = self.make_learners()
        self.noise = {"cpu": torch.Generator().manual_seed(noise_seed).get_state()}
        if self.device.type == "cuda":
            self.noise["cuda"] = torch.Generator(self.device).manual_seed(noise_seed).get_state()
        self.shuffle: Shuffle | None = None
        self.stored_shuffle: dict[str, Tensor] | None = None

    # What a subclass gives.

    def build(self) -> nn.Module:
        raise NotImplementedError

    def make_learners(self) -> dict[str, Learner]:
        return {"network": Learner(self.network, ema=getattr(self.config, "ema", 0.0))}

    def update(self, images: Tensor, labels: Tensor, moment: Moment) -> Tensor:
        raise NotImplementedError

    def validate(self, dataset: Dataset) -> dict[str, float]:
        raise NotImplementedError

    def test(self, dataset: Dataset) -> dict[str, float]:
        raise NotImplementedError

    def baseline(self, dataset: Dataset) -> dict[str, float]:
        return {}

    def pictures(self, dataset: Dataset) -> dict[str, Tensor]:
        """Sixty-four new images; of a conditional model, a column a class."""
        columns = min(len(self.classes), 10) if self.conditional else 8
        labels = self.labels_for(8 * columns)
        images = self.sample(8 * columns, self.fixed_noise(), labels).float().cpu() / self.high
        return {"samples": images.unflatten(0, (8, columns))}

    # What they share.

    @property
    def high(self) -> int:
        """The largest value of a pixel: pixels have high + 1 levels."""
        return int(self.space.high.max())

    @property
    def conditional(self) -> bool:
        """Whether labels are given to the model."""
        return bool(getattr(self.config, "conditional", False))

    def labels_for(self, n: int) -> Tensor | None:
        """Labels (n,) that take the classes in turn; None where the model takes none."""
        if not self.conditional:
            return None
        return torch.arange(n, device=self.device) % len(self.classes)

    def check_labels(self, labels: Tensor | None, n: int) -> Tensor | None:
        """The labels of n images, on the device. ValueError where there are none, or the model takes none."""
        if not self.conditional:
            if labels is not None:
                raise ValueError(f"labels: this {self.name} was trained without labels (--conditional)")
            return None
        if labels is None:
            raise ValueError(f"labels: this {self.name} is conditional, it takes a label for each image")
        if labels.shape != (n,) or labels.is_floating_point():
            raise ValueError(f"labels must be ({n},) integers, got {tuple(labels.shape)} {labels.dtype}")
        if n and not 0 <= int(labels.min()) <= int(labels.max()) < len(self.classes):
            wrong = int(labels.min()) if int(labels.min()) < 0 else int(labels.max())
            raise ValueError(f"labels must be from 0 to {len(self.classes) - 1}, got {wrong}")
        return labels.to(self.device, torch.int64)

    def check_images(self, images: Tensor, whole: bool = True) -> Tensor:
        """Raw images (N, C, H, W), on the device. ValueError where they are of another shape, have values
        outside of [0, high], or, if `whole`, others than whole numbers."""
        if tuple(images.shape[1:]) != self.space.shape:
            raise ValueError(
                f"images must be (N, {', '.join(map(str, self.space.shape))}), got {tuple(images.shape)}"
            )
        images = images.to(self.device)
        if images.numel():
            low, high = images.min().item(), images.max().item()
            if not 0 <= low <= high <= self.high:
                raise ValueError(f"images must have values from 0 to {self.high}, got {low:g} to {high:g}")
            if whole and images.is_floating_point() and bool((images != images.round()).any()):
                raise ValueError(
                    f"images must have whole values from 0 to {self.high}: this likelihood is of "
                    f"{self.high + 1} levels, and these lie between them"
                )
        return images

    def fixed_noise(self, number: int = 0) -> torch.Generator:
        """A generator on the device that draws the same each time; of several the `number` chooses one."""
        return torch.Generator(self.device).manual_seed(self.draw_seed + number)

    def rate_at(self, progress: float) -> float:
        """The step size: constant, or falling to 0 by half a cosine or linearly, as `schedule` says."""
        factors = {
            "constant": 1.0,
            "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
            "linear": 1.0 - progress,
        }
        return self.config.learning_rate * factors[self.config.schedule]

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """For networks, not for likelihoods: these take `.float()` of what comes out."""
        if self.config.precision == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def training(self, dataset: Dataset, epochs: float, log_every: int = 100) -> Iterator[Row]:
        self.check_dataset(dataset)
        keep_freed_memory()
        train = dataset.train.to(self.device) if fits(dataset.train, self.device) else dataset.train
        self.shuffle = Shuffle(len(train), self.config.batch_size, self.shuffle_seed)
        if self.stored_shuffle is not None:
            self.shuffle.restore(self.stored_shuffle)
            self.stored_shuffle = None
        total_steps, batches = self.total_steps(dataset, epochs), self.shuffle.batches
        sums = torch.zeros(len(self.measures), device=self.device)
        images, steps, clock = 0, 0, time.perf_counter()
        while self.grad_step < total_steps:
            index = self.shuffle.next().to(train.images.device)
            batch = train.take(index)
            moment = Moment(self.grad_step, self.grad_step / batches, self.grad_step / total_steps)
            with self.own_noise():
                drawn = dataset.draw(batch.images.to(self.device))
                set_training(self.moded, True)
                sums += self.update(drawn, batch.labels.to(self.device), moment)
                set_training(self.moded, False)
            images, steps, self.grad_step = images + len(index), steps + 1, self.grad_step + 1
            over = self.grad_step >= total_steps
            due = over or (
                self.shuffle.at_end and self.grad_step // batches % self.config.validate_every == 0
            )
            if not due and self.grad_step % log_every:
                continue
            self.check_finite(dict(zip(self.measures, (sums / steps).tolist())))
            row: Row = {
                "grad_step": self.grad_step,
                "epoch": self.grad_step / batches,
                **{f"train/{name}": value / steps for name, value in zip(self.measures, sums.tolist())},
                "train/learning_rate": self.rate_at(moment.progress),
                "speed/images_per_s": images / (time.perf_counter() - clock),
            }
            if due and len(dataset.validation):
                row |= {f"validation/{name}": value for name, value in self.validate(dataset).items()}
            yield row
            sums.zero_()
            images, steps, clock = 0, 0, time.perf_counter()

    def check_dataset(self, dataset: Dataset) -> None:
        """ValueError where a dataset is not of the images (and classes) that the model was built for."""
        check_dataset(dataset, self.space, self.classes)

    def check_finite(self, measured: dict[str, float]) -> None:
        """FloatingPointError that names what is NaN or infinite: a measure, or a network's weights."""
        for name, value in measured.items():
            if not math.isfinite(value):
                raise FloatingPointError(
                    f"{name} is {value} at grad_step {self.grad_step}; a smaller learning_rate may help"
                )
        for name, learner in self.learners.items():
            if not bool(learner.weights.isfinite().all()):
                raise FloatingPointError(
                    f"the {name}'s weights are no longer finite at grad_step {self.grad_step}; "
                    "a smaller learning_rate may help"
                )

    @contextlib.contextmanager
    def own_noise(self) -> Iterator[None]:
        """Within it torch's global generators are the model's own, and go on where they were left."""
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.set_rng_state(self.noise["cpu"])
            if devices:
                torch.cuda.set_rng_state(self.noise["cuda"], self.device)
            yield
            self.noise = {"cpu": torch.get_rng_state()}
            if devices:
                self.noise["cuda"] = torch.cuda.get_rng_state(self.device)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Within it the networks have their averaged weights, where there are any."""
        learners = [learner for learner in self.learners.values() if learner.average is not None]
        mine = [learner.weights.clone() for learner in learners]
        for learner in learners:
            learner.weights.copy_(learner.average)  # type: ignore[arg-type]
        try:
            yield
        finally:
            for learner, weights in zip(learners, mine):
                learner.weights.copy_(weights)

    def weights(self) -> dict[str, Tensor]:
        with self.averaged():
            return {name: tensor.clone() for name, tensor in self.network.state_dict().items()}

    def load_weights(self, tensors: dict[str, Tensor]) -> None:
        self.network.load_state_dict(tensors)
        for learner in self.learners.values():
            if learner.average is not None:
                learner.average.copy_(learner.weights)

    # Checkpoints.

    def extra_state(self) -> dict[str, Tensor]:
        """Tensors of a checkpoint beyond learners, noise and shuffle."""
        return {}

    def restore_extra(self, tensors: dict[str, Tensor]) -> None:
        """Undo `extra_state`."""

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        parts = {
            "noise": self.noise,
            "extra": self.extra_state(),
            "shuffle": {} if self.shuffle is None else self.shuffle.state(),
            **{f"learner.{name}": learner.state() for name, learner in self.learners.items()},
        }
        return {f"{part}.{k}": v for part, tensors in parts.items() for k, v in tensors.items()}, {}

    def restore(
        self, tensors: dict[str, Tensor], meta: dict[str, Any], load: Callable[[str], dict[str, Tensor]]
    ) -> bool:
        def part(name: str) -> dict[str, Tensor]:
            return {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")}

        self.noise = part("noise")
        self.stored_shuffle = part("shuffle") or None
        for name, learner in self.learners.items():
            learner.restore(part(f"learner.{name}"))
        self.restore_extra(part("extra"))
        return True


def reconstruction_rows(model: Any, dataset: Dataset, rows: int = 3, columns: int = 10) -> Tensor:
    """Test images, a row of them over a row of their reconstructions: (2 * rows, columns, C, H, W) in [0, 1].

    For a model with `encode` and `decode`; fewer rows where there are fewer images.
    """
    columns = min(columns, len(dataset.test))
    rows = min(rows, len(dataset.test) // columns)
    shown = dataset.test.take(torch.arange(rows * columns))
    labels = shown.labels if model.conditional else None
    again = model.decode(model.encode(shown.images, labels), labels).cpu()
    pairs = torch.stack([preprocess(shown.images, model.space), again])  # (2, n, C, H, W)
    return pairs.unflatten(1, (rows, columns)).transpose(0, 1).flatten(0, 1)


def interpolation(
    model: Any, dataset: Dataset, rows: int = 6, columns: int = 10, spherical: bool = True
) -> Tensor:
    """Ways between the codes of two test images, a row each: (rows, columns, C, H, W) in [0, 1].

    Of a conditional model both images' codes are decoded with the first one's label.
    """
    rows = min(rows, len(dataset.test) // 2)
    ends = dataset.test.take(torch.arange(2 * rows))
    labels = ends.labels if model.conditional else None
    codes = model.encode(ends.images, labels)
    ways = line(codes[:rows], codes[rows:], columns, spherical)
    given = None if labels is None else labels[:rows].repeat_interleave(columns)
    return model.decode(ways.flatten(0, 1), given).cpu().unflatten(0, (rows, columns))
