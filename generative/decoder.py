"""Decoders: from a vector to the parameters of an image's distribution, as the mirror of an encoder.

Of an mlp the widths are turned round; of convolutions each layer (a transposed convolution for a convolution,
an enlargement for a pooling, a residual block for a residual block); any other encoder, whose inside is not
known, gets convolutions and enlargements that double the side until it is the image's.
"""

import itertools
import math

import torch
from gymnasium import spaces
from torch import Tensor, nn

from ..vision import MLP, Encoder
from ..vision.encoder import ImageEncoder, Linear, ResidualBlock


def make_decoder(encoder: Encoder, inputs: int, space: spaces.Box, parameters: int) -> nn.Sequential:
    """(B, inputs) -> (B, parameters * C, H, W), for images (C, H, W) of `space`. See the module's page."""
    channels, height, width = space.shape
    shape = (parameters * channels, height, width)
    if isinstance(encoder, Linear):
        return nn.Sequential(nn.Linear(inputs, math.prod(shape)), nn.Unflatten(1, shape))
    if isinstance(encoder, MLP):
        return mirror_mlp(encoder, inputs, shape)
    if isinstance(encoder, ImageEncoder):
        return mirror_convolutions(encoder, inputs, shape)
    return pyramid(encoder, inputs, space, shape)


def mirror_mlp(encoder: MLP, inputs: int, shape: tuple[int, int, int]) -> nn.Sequential:
    linear = [layer for layer in encoder.layers if isinstance(layer, nn.Linear)]
    widths = [inputs, *(layer.out_features for layer in reversed(linear))]
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        norm = [nn.LayerNorm(after)] if encoder.layer_norm else []
        layers += [nn.Linear(before, after), *norm, encoder.activation()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], math.prod(shape)), nn.Unflatten(1, shape))


def mirror_convolutions(encoder: ImageEncoder, inputs: int, shape: tuple[int, int, int]) -> nn.Sequential:
    channels, height, width = encoder.observation_space.shape or ()
    sizes = [torch.Size((channels, height, width))]  # before each layer, and after the last
    x = torch.zeros(1, channels, height, width)
    with torch.no_grad():
        for layer in encoder.conv:
            x = layer(x)
            sizes.append(x.shape[1:])
    layers: list[nn.Module] = [
        nn.Linear(inputs, encoder.features_dim),
        nn.ReLU(),
        nn.Linear(encoder.features_dim, sizes[-1].numel()),
        nn.Unflatten(1, tuple(sizes[-1])),
    ]
    for number in reversed(range(len(encoder.conv))):
        match encoder.conv[number], sizes[number], sizes[number + 1]:
            case nn.Conv2d() as conv, (into, *large), (out, *small):
                kernel, stride, padding = conv.kernel_size, conv.stride, conv.padding
                left = [
                    big - ((little - 1) * stride[i] - 2 * int(padding[i]) + kernel[i])
                    for i, (big, little) in enumerate(zip(large, small))
                ]
                into = into if number else shape[0]
                layers += [
                    nn.ReLU(),
                    nn.ConvTranspose2d(out, into, kernel, stride, padding, output_padding=tuple(left)),  # type: ignore[arg-type]
                    *(encoder.norm(into) if number else []),
                ]
            case nn.MaxPool2d(), (_, *large), _:
                layers.append(nn.Upsample(size=tuple(large)))
            case ResidualBlock(), (into, *_), _:
                layers.append(ResidualBlock(into, encoder.layer_norm))
    return nn.Sequential(*layers)


SMALLEST = 7
"""Side of the map that a pyramid begins with, at most."""


def pyramid(encoder: Encoder, inputs: int, space: spaces.Box, shape: tuple[int, int, int]) -> nn.Sequential:
    sizes = [shape[1:]]
    while max(sizes[0]) > SMALLEST:
        sizes.insert(0, tuple(math.ceil(side / 2) for side in sizes[0]))  # type: ignore[arg-type]
    widths = [min(128, 32 * 2**number) for number in range(len(sizes))][::-1]
    layers: list[nn.Module] = [
        nn.Linear(inputs, widths[0] * math.prod(sizes[0])),
        nn.Unflatten(1, (widths[0], *sizes[0])),
    ]
    for size, before, after in zip(sizes[1:], widths, widths[1:]):
        layers += [nn.ReLU(), nn.Upsample(size=size), nn.Conv2d(before, after, 3, padding=1)]
    return nn.Sequential(*layers, nn.ReLU(), nn.Conv2d(widths[-1], shape[0], 3, padding=1))


def with_label(z: Tensor, labels: Tensor | None, classes: int) -> Tensor:
    """z (B, D) with a one-hot label behind it, where there is one: (B, D + classes)."""
    if labels is None:
        return z
    one_hot = (labels.unsqueeze(1) == torch.arange(classes, device=z.device)).to(z.dtype)
    return torch.cat([z, one_hot], dim=1)
