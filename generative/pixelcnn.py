"""PixelCNN, Gated PixelCNN and PixelCNN++: images pixel by pixel, with exact likelihoods.

Van den Oord, Kalchbrenner and Kavukcuoglu 2016 (arXiv:1601.06759), van den Oord et al. 2016
(arXiv:1606.05328), Salimans et al. 2017 (arXiv:1701.05517). The networks are in `pixelcnn_networks`, what
they say of a pixel in `pixel_likelihoods`, the two ways to draw in `pixel_sampling`. `PixelModel` is what
PixelRNN shares.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..vision import Dataset
from .likelihood import bits_per_dim, independent_pixels
from .model import Generative, Moment
from .pixel_likelihoods import Likelihood, LogisticMixture, Softmax, scale
from .pixel_sampling import Drawing, Naive, draw
from .pixelcnn_cached import CachedGated, CachedPlain, CachedPlusPlus
from .pixelcnn_networks import GatedNetwork, PlainNetwork, PlusPlusNetwork


@dataclass(frozen=True)
class PixelConfig:
    """What all pixel by pixel models can be told."""

    likelihood: Literal["auto", "softmax", "logistic"] = "auto"
    """Of a pixel. softmax: a probability for each level. logistic: a mixture of logistics cut into levels.
    auto: logistic for more than 32 levels."""
    components: int = 10
    """Logistics in the mixture."""
    layers: int = 6
    """Layers after the first."""
    width: int = 32
    """Features of each pixel; with softmax and colour, a multiple of the channels."""
    dropout: float = 0.0
    """Share of features dropped in each layer, in [0, 1)."""
    conditional: bool = False
    """Give the label to each layer, so that images can be made of a class."""
    batch_size: int = 16
    """Images in one gradient step; as many as there are, at most."""
    learning_rate: float = 1e-3
    """Adam's step size before the schedule."""
    schedule: Literal["constant", "cosine", "linear"] = "cosine"
    """How the step size falls over the training: not, or to 0 by half a cosine, or linearly."""
    warmup: int = 100
    """Gradient steps over which the step size first rises from 0."""
    max_grad_norm: float | None = 1.0
    """L2 norm that gradients (of bits a dimension) are clipped to; None for no limit."""
    ema: float = 0.999
    """Decay a step of an average of the weights, which is then what is validated and saved; 0 for none."""
    validate_every: int = 1
    """Epochs between two validations."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the network; likelihoods stay float32."""

    def __post_init__(self) -> None:
        for name in ("components", "layers", "width", "batch_size", "validate_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}")
        for name in ("dropout", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 0 and less than 1, got {getattr(self, name)}")
        for name in ("learning_rate", "max_grad_norm"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"{name} must be greater than 0, got {getattr(self, name)}")
        if self.warmup < 0:
            raise ValueError(f"warmup must be 0 or more, got {self.warmup}")


@dataclass(frozen=True)
class PixelCNNConfig(PixelConfig):
    """Hyper-parameters. An epoch is one pass over the training images."""

    variant: Literal["plain", "gated", "plusplus"] = "gated"
    """plain: one stack of masked convolutions. gated: two stacks with gates. plusplus: two streams that go to
    half the size and back."""
    layers: int = 6
    """Layers after the first; of plusplus, blocks at each size on the way down and again on the way up."""
    kernel: int = 3
    """Side of the kernels of plain and gated, odd."""
    depth: int = 1
    """How often plusplus halves the size, which must be divisible by 2 ** depth."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.depth < 0:
            raise ValueError(f"depth must be 0 or more, got {self.depth}")
        if self.kernel < 3 or self.kernel % 2 == 0:
            raise ValueError(f"kernel must be odd and 3 or more, got {self.kernel}")


RECIPES: dict[str, dict[str, Any]] = {
    "digits": {"dropout": 0.1, "learning_rate": 3e-3, "ema": 0.99, "validate_every": 5},
    "mnist": {"learning_rate": 3e-3, "ema": 0.99, "warmup": 50},
    "fashion-mnist": {"learning_rate": 3e-3, "ema": 0.99, "warmup": 50},
}
"""What all models take for a dataset; each has something of its own beside."""
RUN_OPTIONS: dict[str, dict[str, Any]] = {
    "digits": {"epochs": 30.0},
    "mnist": {"epochs": 1.0, "binarize": "dynamic"},
    "fashion-mnist": {"epochs": 1.0, "binarize": "128"},
}


def recipe_of(kind: type, own: dict[str, dict[str, Any]]) -> Callable[..., Any]:
    """A model's `recipe`: what is known to work for a dataset, else the defaults, with `changes` made."""

    def recipe(
        backbone: str | None = None, dataset: str | None = None, encoder: str | None = None, **changes: Any
    ) -> Any:
        name = dataset or ""
        return kind(**{**RECIPES.get(name, {}), **own.get(name, {}), **changes})

    return recipe


def run_options(dataset: str) -> dict[str, Any]:
    """Defaults of `foveal train` for a dataset."""
    return RUN_OPTIONS.get(dataset, {})


class PixelModel(Generative):
    """Everything but the network: its likelihood, training, drawing and completing.

    A subclass has `build_network` and `cached`.
    """

    measures: tuple[str, ...] = ("loss", "bits_per_dim", "grad_norm")
    chosen_by: ClassVar[str] = "validation/log_prob"
    headline: ClassVar[str] = "test/bits_per_dim"
    run_options = staticmethod(run_options)
    config: Any

    def build_network(self, channels: int, outputs: int, groups: int, condition: int) -> nn.Module:
        """Images (B, C, H, W) in [-1, 1] and a condition (B, `condition`) or None -> (B, outputs, H, W)."""
        raise NotImplementedError

    def cached(self, n: int, condition: Tensor | None) -> Drawing:
        """The network at work on n images, one pixel at a time."""
        raise NotImplementedError

    def build(self) -> nn.Module:
        channels, levels, name = self.space.shape[0], self.high + 1, self.config.likelihood
        if name == "auto":
            name = "logistic" if levels > 32 else "softmax"
        self.likelihood: Likelihood = (
            Softmax(channels, levels)
            if name == "softmax"
            else LogisticMixture(channels, levels, self.config.components)
        )
        groups = self.likelihood.groups
        if self.config.width % groups:
            raise ValueError(f"width must be a multiple of the {groups} channels, got {self.config.width}")
        condition = len(self.classes) if self.conditional else 0
        return self.build_network(channels, self.likelihood.parameters, groups, condition)

    def condition(self, labels: Tensor | None, n: int) -> Tensor | None:
        """Labels as the network's vectors (n, classes). Of a floating type they are such vectors already."""
        if labels is not None and labels.is_floating_point() and self.conditional:
            if labels.shape != (n, len(self.classes)):
                raise ValueError(f"labels must be ({n}, {len(self.classes)}), got {tuple(labels.shape)}")
            return labels.to(self.device, self.dtype)
        labels = self.check_labels(labels, n)
        return None if labels is None else F.one_hot(labels, len(self.classes)).to(self.dtype)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.network.parameters()).dtype

    def log_levels(self, images: Tensor, condition: Tensor | None) -> Tensor:
        """ln p(x_i | x_<i) of each value of raw images on the device, (B, C, H, W), with a gradient."""
        values = images.to(torch.int64)
        with self.autocast():
            parameters = self.network(scale(values, self.high + 1, self.dtype), condition)
        parameters = parameters.float() if parameters.dtype != torch.float64 else parameters
        return self.likelihood.log_prob(parameters, values)

    def update(self, images: Tensor, labels: Tensor, moment: Moment) -> Tensor:
        """One step up the likelihood: nats an image, bits a dimension, and the gradient's norm."""
        given = F.one_hot(labels, len(self.classes)).to(self.dtype) if self.conditional else None
        bits = -self.log_levels(images, given).mean() / math.log(2)
        rate = self.rate_at(moment.progress) * min(1.0, (moment.step + 1) / max(1, self.config.warmup))
        norm = self.learners["network"].step(bits, rate, self.config.max_grad_norm)
        return torch.stack([bits * (math.log(2) * math.prod(self.space.shape)), bits, norm]).detach()

    # What is computed from images.

    @torch.no_grad()
    def log_prob_map(self, images: Tensor, labels: Tensor | None = None, batch_size: int = 250) -> Tensor:
        """ln p of each value of raw images (N, C, H, W) given those before it: nats (N, C, H, W)."""
        images = self.check_images(images)
        condition = self.condition(labels, len(images))
        with self.averaged():
            parts = [
                self.log_levels(
                    images[i : i + batch_size], None if condition is None else condition[i : i + batch_size]
                )
                for i in range(0, len(images), batch_size)
            ]
        return torch.cat(parts) if parts else images.to(self.dtype)

    def log_prob(self, images: Tensor, labels: Tensor | None = None, batch_size: int = 250) -> Tensor:
        """ln p of raw images (N, C, H, W): (N,) nats, exactly."""
        return self.log_prob_map(images, labels, batch_size).flatten(1).sum(1)

    def figures(self, images: Tensor, labels: Tensor) -> dict[str, float]:
        nats = -self.log_prob(images, labels if self.conditional else None).double().mean().item()
        return {"nats": nats, "bits_per_dim": bits_per_dim(nats, math.prod(self.space.shape))}

    def validate(self, dataset: Dataset) -> dict[str, float]:
        """Of the validation images: nats an image, bits a dimension."""
        found = self.figures(dataset.validation.images, dataset.validation.labels)
        return {"log_prob": -found["nats"], **found}

    def test(self, dataset: Dataset) -> dict[str, float]:
        """Of the test images: nats an image, bits a dimension."""
        return self.figures(dataset.test.images, dataset.test.labels)

    def baseline(self, dataset: Dataset) -> dict[str, float]:
        nats = independent_pixels(dataset)
        return {
            "independent_pixels_nats": nats,
            "independent_pixels": bits_per_dim(nats, math.prod(self.space.shape)),
        }

    # What is made.

    def sample(
        self,
        n: int,
        generator: torch.Generator | None = None,
        labels: Tensor | None = None,
        *,
        fast: bool = True,
        temperature: float = 1.0,
        uniforms: Tensor | None = None,
        each: Callable[[int, int, Tensor], object] | None = None,
    ) -> Tensor:
        """New images (n, C, H, W) uint8.

        Args:
            labels: int64 (n,), or vectors (n, classes) where a mixture of classes is wanted; of a conditional
                model only.
            fast: compute for a new pixel only what it changes. The images are the same.
            temperature: below 1 for likelier images, above for more varied ones.
            uniforms: (n, C, H, W) in [0, 1), which the images are made of; by default drawn with `generator`.
            each: called with a pixel's row and column and the images so far (n, C, H, W) after each pixel.
        """
        if not temperature > 0:
            raise ValueError(f"temperature must be greater than 0, got {temperature}")
        return self._draw(n, generator, labels, fast, temperature, uniforms, None, each)

    def complete(
        self,
        images: Tensor,
        mask: Tensor,
        generator: torch.Generator | None = None,
        labels: Tensor | None = None,
        *,
        fast: bool = True,
        temperature: float = 1.0,
    ) -> Tensor:
        """Raw images (N, C, H, W) with new pixels where `mask` (H, W) bool is False: uint8.

        Each new pixel depends on those before it in raster order, drawn or kept; kept ones after it are not
        looked at. Raises ValueError for a mask of another shape or type.
        """
        images = self.check_images(images)
        if mask.shape != self.space.shape[1:] or mask.dtype != torch.bool:
            raise ValueError(
                f"mask must be {tuple(self.space.shape[1:])} bool, got {tuple(mask.shape)} {mask.dtype}"
            )
        return self._draw(
            len(images), generator, labels, fast, temperature, None, (images.to(torch.int64), mask), None
        )

    @torch.no_grad()
    def _draw(
        self,
        n: int,
        generator: torch.Generator | None,
        labels: Tensor | None,
        fast: bool,
        temperature: float,
        uniforms: Tensor | None,
        known: tuple[Tensor, Tensor] | None,
        each: Callable[[int, int, Tensor], object] | None,
    ) -> Tensor:
        condition = self.condition(labels, n)
        if uniforms is None:
            uniforms = torch.rand(
                n, *self.space.shape, dtype=self.dtype, device=self.device, generator=generator
            )
        elif uniforms.shape != (n, *self.space.shape):
            raise ValueError(f"uniforms must be {(n, *self.space.shape)}, got {tuple(uniforms.shape)}")
        if n == 0:
            return torch.empty(0, *self.space.shape, dtype=torch.uint8, device=self.device)
        with self.averaged():
            drawing: Drawing
            if fast:
                drawing = self.cached(n, condition)
            else:
                drawing = Naive(self.network, n, self.space.shape, condition)
            values = draw(drawing, self.likelihood, uniforms.to(self.device), known, temperature, each)
        return values.to(torch.uint8)

    def pictures(self, dataset: Dataset) -> dict[str, Tensor]:
        """New images; and test images over what the model makes of their upper halves."""
        shown = dataset.test.take(torch.arange(min(10, len(dataset.test))))
        mask = torch.zeros(self.space.shape[1:], dtype=torch.bool)
        mask[: math.ceil(len(mask) / 2)] = True
        originals = torch.cat([shown.images] * 4)
        labels = torch.cat([shown.labels] * 4) if self.conditional else None
        completed = self.complete(originals, mask, self.fixed_noise(1), labels)
        rows = torch.stack([shown.images, *completed.cpu().split(len(shown))])
        return {**super().pictures(dataset), "completions": rows.float() / self.high}


class PixelCNN(PixelModel):
    """Learns each pixel's distribution given those above it and to its left, by convolutions.

    >>> from foveal.vision import binarize, load_dataset
    >>> from foveal.generative import PixelCNN
    >>> digits = binarize(load_dataset("digits", train_size=200), 8)
    >>> model = PixelCNN(digits.space, digits.classes, PixelCNN.Config(width=8)).fit(digits, epochs=1)
    >>> model.log_prob(digits.test.images[:5]).shape, model.sample(3).shape
    (torch.Size([5]), torch.Size([3, 1, 8, 8]))
    """

    name: ClassVar[str] = "pixelcnn"
    Config: ClassVar[type] = PixelCNNConfig
    recipe = staticmethod(
        recipe_of(
            PixelCNNConfig,
            {
                "digits": {"width": 24, "layers": 3, "kernel": 5},
                "mnist": {"width": 24, "layers": 5, "kernel": 5},
                "fashion-mnist": {"width": 24, "layers": 5, "kernel": 5},
            },
        )
    )
    config: PixelCNNConfig

    def build_network(self, channels: int, outputs: int, groups: int, condition: int) -> nn.Module:
        config = self.config
        if config.variant != "plusplus":
            kind = PlainNetwork if config.variant == "plain" else GatedNetwork
            return kind(
                channels, outputs, config.width, config.layers, config.kernel, config.dropout, groups,
                condition,
            )  # fmt: skip
        if groups > 1:
            raise ValueError("likelihood must be logistic for plusplus and colour images, got softmax")
        height, width = self.space.shape[1:]
        if height % 2**config.depth or width % 2**config.depth:
            raise ValueError(
                f"depth: images of {height}x{width} cannot be halved {config.depth} times: both sides must "
                f"be divisible by {2**config.depth}"
            )
        return PlusPlusNetwork(
            channels, outputs, config.width, config.layers, config.depth, config.dropout, condition
        )

    def cached(self, n: int, condition: Tensor | None) -> Drawing:
        kind = {"plain": CachedPlain, "gated": CachedGated, "plusplus": CachedPlusPlus}[self.config.variant]
        return kind(self.network, n, self.space.shape, condition)
