"""Image transformer: images pixel by pixel, each of which attends to all those before it.

Parmar et al. 2018 (arXiv:1802.05751), section 3. Where we deviate: attention is over the whole image, not
over blocks of it; a position is a pixel, not a channel (see `Network`); a masked 7x7 convolution comes first;
layers are normalised before each part, and begin near the identity (GPT-2, Radford et al. 2019, section 2.3).
Everything but the network is `PixelModel`'s.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .pixel_sampling import CachedConv, Drawing
from .pixelcnn import PixelConfig, PixelModel, recipe_of
from .pixelcnn_cached import Cached
from .pixelcnn_networks import CausalConv, Condition, Head, image_mask, with_ones


@dataclass(frozen=True)
class ImageTransformerConfig(PixelConfig):
    """Hyper-parameters. An epoch is one pass over the training images."""

    layers: int = 4
    """Layers of attention, each followed by a network of two layers, four times as wide inside."""
    heads: int = 4
    """Of each attention; `width` is a multiple of them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.heads < 1 or self.width % self.heads:
            raise ValueError(
                f"heads must be 1 or more and divide width, got {self.heads} for a width of {self.width}"
            )


class Layer(nn.Module):
    """Attention, then a small network on each pixel by itself; both are added to what came in."""

    def __init__(self, width: int, heads: int, layers: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.attention_norm, self.norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention, self.attention_out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.inner, self.out = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)
        with torch.no_grad():  # 2 `layers` branches add up to what one would
            for linear in (self.attention_out, self.out):
                linear.weight /= math.sqrt(2 * layers)

    def asked(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features (B, T, C) -> queries, keys and values (B, heads, T, C / heads)."""
        parts = self.attention(self.attention_norm(x)).unflatten(2, (3, self.heads, -1))
        return parts.permute(2, 0, 3, 1, 4).unbind(0)

    def answered(self, x: Tensor, values: Tensor) -> Tensor:
        """Features, and what attention brought (B, heads, T, C / heads) -> features after this layer."""
        x = x + self.dropout(self.attention_out(values.transpose(1, 2).flatten(2)))
        return x + self.dropout(self.out(F.gelu(self.inner(self.norm(x)))))

    def forward(self, x: Tensor) -> Tensor:
        return self.answered(x, F.scaled_dot_product_attention(*self.asked(x), is_causal=True))


class Network(nn.Module):
    """A masked convolution, layers of attention, and two 1x1 convolutions.

    A position's features are of the pixels before it only, so that it may attend to itself: what the
    convolution sees, and the last one drawn, which at the left border is out of its sight. With a softmax and
    colour, the pixel's own earlier channels come in after the last layer, through `own`.
    """

    def __init__(
        self, shape: tuple[int, ...], outputs: int, width: int, layers: int, heads: int, dropout: float,
        groups: int, condition: int,
    ):  # fmt: skip
        super().__init__()
        channels, height, columns = shape
        self.first = CausalConv(channels + 1, width, 4, 3, 3, mask=image_mask(width, channels, 1))
        self.latest = nn.Linear(channels + 1, width, bias=False)
        self.places = nn.ParameterList(
            0.1 * torch.randn(width, *size) for size in ((height, 1), (1, columns))
        )
        self.condition = Condition(condition, width)
        self.layers = nn.ModuleList(Layer(width, heads, layers, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.own = CausalConv(channels + 1, width, 1, 0, 0, mask=image_mask(width, channels, groups))
        self.head = Head(width, outputs, groups)

    def added(self, condition: Tensor | None) -> Tensor:
        """What the place and the condition add to the convolution, (1 or B, C, H, W)."""
        return (self.places[0] + self.places[1])[None] + self.condition(condition)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        image = with_ones(x)
        h = (self.first(image) + self.added(condition)).flatten(2).transpose(1, 2)  # (B, H W, C)
        h = h + self.latest(F.pad(image.flatten(2)[:, :, :-1], (1, 0)).transpose(1, 2))
        for layer in self.layers:
            h = layer(h)
        h = self.norm(h).transpose(1, 2).unflatten(2, x.shape[2:])
        return self.head(h + self.own(image))


class ImageTransformer(PixelModel):
    """Learns each pixel's distribution given those above it and to its left, by attention.

    >>> from foveal.vision import binarize, load_dataset
    >>> from foveal.generative import ImageTransformer
    >>> digits = binarize(load_dataset("digits", train_size=200), 8)
    >>> config = ImageTransformer.Config(width=8, layers=1, heads=2)
    >>> model = ImageTransformer(digits.space, digits.classes, config).fit(digits, epochs=1)
    >>> model.log_prob(digits.test.images[:5]).shape, model.sample(3).shape
    (torch.Size([5]), torch.Size([3, 1, 8, 8]))
    """

    name: ClassVar[str] = "image-transformer"
    Config: ClassVar[type] = ImageTransformerConfig
    recipe = staticmethod(recipe_of(ImageTransformerConfig, {"digits": {"width": 40}}))
    config: ImageTransformerConfig

    def build_network(self, channels: int, outputs: int, groups: int, condition: int) -> nn.Module:
        config = self.config
        return Network(
            self.space.shape, outputs, config.width, config.layers, config.heads, config.dropout, groups,
            condition,
        )  # fmt: skip

    def cached(self, n: int, condition: Tensor | None) -> Drawing:
        return CachedNetwork(self.network, n, self.space.shape, condition)  # type: ignore[arg-type]


class CachedNetwork(Cached):
    """One pixel at a time: each layer keeps the keys and values of those before; see `pixel_sampling`."""

    def __init__(self, network: Network, n: int, shape: tuple[int, ...], condition: Tensor | None = None):
        first, own = network.first, network.own
        super().__init__(first.weight, n, shape, first.left, first.rows)
        self.network, self.added = network, network.added(condition)
        self.first, self.own = CachedConv(first, self.image), CachedConv(own, self.image)
        layers: list[Any] = list(network.layers)
        heads, size, places = layers[0].heads, first.outputs, shape[1] * shape[2]
        self.layers = [(layer, self.like.new_zeros(2, n, heads, places, size // heads)) for layer in layers]
        self.at: tuple[int, int] | None = None
        self.before, both = self.like.new_zeros(
            2, n, size
        )  # what pixels before say, and the pixel itself too
        for c, tail in enumerate(self.head(network.head, [both] * self.width)):
            join = partial(torch.add, self.before, self.own.out, out=both)
            self.programs.append([*self.own.calls(c), join, *tail])

    def row(self, r: int) -> None:
        self.begin()
        self.first.row()
        self.own.row()

    def column(self, r: int, c: int) -> Tensor:
        if self.at != (r, c):  # else it is the turn of another channel of the same pixel
            self.at = (r, c)
            self.before.copy_(self.attend(r, c))
        return super().column(r, c)

    def attend(self, r: int, c: int) -> Tensor:
        """What the pixels before (r, c) say of it, (n, C)."""
        for call in self.first.calls(c):
            call()
        latest = self.image.columns[c - 1] if c else self.image.data[:, -2, self.image.left + self.width - 1]
        x = (self.first.out + self.added[:, :, r, c] + self.network.latest(latest)).unsqueeze(1)
        place = r * self.width + c
        for layer, (keys, values) in self.layers:
            query, keys[:, :, place, None], values[:, :, place, None] = layer.asked(x)
            seen = keys[:, :, : place + 1], values[:, :, : place + 1]
            x = layer.answered(x, F.scaled_dot_product_attention(query, *seen))
        return self.network.norm(x).squeeze(1)
