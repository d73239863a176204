"""Generators and critics of a GAN: a perceptron, DCGAN's, and a small residual network.

DCGAN: Radford et al. 2015 (1511.06434), here with a linear layer on the last map where the paper has a
convolution of the map's size, which is the same. Residual networks: Miyato et al. 2018 (1802.05957), with
the critic's sum over the last map. Projection: Miyato and Koyama 2018 (1802.05637). Auxiliary classifier:
Odena et al. 2017 (1610.09585). Images are float32 in [-1, 1] in here.
"""

import itertools
import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from .growing import GrowingCritic, GrowingGenerator

Architecture = Literal["mlp", "dcgan", "resnet"]
Conditional = Literal["embedding", "projection", "acgan"]
CriticNorm = Literal["none", "batch", "layer"]


def doublings(height: int, width: int) -> tuple[int, int, int]:
    """How a generator that repeats pixels gets to an image: (doublings, height, width of its first map).

    ValueError where it cannot: a side is odd, or still larger than 24 when it can be halved no more.
    """
    count, h, w = 0, height, width
    while h % 2 == w % 2 == 0 and min(h, w) // 2 >= (4 if count >= 2 else 2):
        count, h, w = count + 1, h // 2, w // 2
    if not count or max(h, w) > 24:
        raise ValueError(
            f"architecture resnet, and growing dcgan, make images whose sides can be halved to at most 24 "
            f"(28, 32, 64, 84, 96...), got {height}x{width}; dcgan and mlp make any"
        )
    return count, h, w


def halvings(height: int, width: int) -> list[tuple[int, int]]:
    """Sides (h, w) of dcgan's maps, from the one next to the image to the smallest, each half as large as the
    last, rounded up, until the shorter is 4 to 6 (2 or 3 where it gets there in one or two halvings).
    ValueError for images of less than 3 pixels a side.

    From 7x7 it goes on to 4x4: without that map the networks of a 28x28 image see no more than 10 pixels at
    once, and draw strokes that make no digit (FID twice as high after as many steps).
    """
    maps: list[tuple[int, int]] = []
    h, w = height, width
    while min(h, w) > (6 if len(maps) >= 2 else 2):
        h, w = (h + 1) // 2, (w + 1) // 2
        maps.append((h, w))
    if not maps:
        raise ValueError(f"architecture dcgan makes images of 3 pixels a side or more, got {height}x{width}")
    return maps


def kernel(larger: tuple[int, int]) -> tuple[int, int]:
    """Of a convolution between a map and one half as large: 4 (the paper's) where a side is even, else 3."""
    return 4 - larger[0] % 2, 4 - larger[1] % 2


class Generator(nn.Module):
    """Noise (B, Z), and labels (B,) int64 where it is conditional -> images (B, C, H, W) in [-1, 1].

    A label's embedding, of as many numbers as the noise, stands beside the noise.
    """

    def __init__(self, latent_size: int, classes: int, body: nn.Module):
        super().__init__()
        self.latent_size = latent_size
        self.embedding = nn.Embedding(classes, latent_size) if classes else None
        if self.embedding is not None:
            # As long as a one-hot label. As long as the noise (standard normal numbers) it drowns it: each
            # class is then told from the others before the noise does anything, and stays one image.
            nn.init.normal_(self.embedding.weight, std=latent_size**-0.5)
        self.body = body

    def forward(self, noise: Tensor, labels: Tensor | None = None) -> Tensor:
        if self.embedding is not None:
            noise = torch.cat((noise, self.embedding(labels)), 1)
        return self.body(noise)


class Critic(nn.Module):
    """Images (B, C, H, W) in [-1, 1], and their labels (B,) where it is conditional -> a score (B,) each,
    high for real ones, and where it has an auxiliary classifier, logits (B, K).

    `body` gives features (B, F). Conditional on a label, it sees the label's embedding as one more channel
    (embedding), or adds its product with the features to the score (projection).
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        classes: int,
        conditional: Conditional | None,
        body: nn.Module,
        features: int,
    ):
        super().__init__()
        self.shape, self.conditional = shape, conditional
        self.body = body
        self.score = nn.Linear(features, 1)
        pixels = shape[1] * shape[2]
        self.embedding = nn.Embedding(classes, pixels) if conditional == "embedding" else None
        self.projection = nn.Embedding(classes, features) if conditional == "projection" else None
        self.classifier = nn.Linear(features, classes) if conditional == "acgan" else None
        if self.projection is not None:
            nn.init.normal_(self.projection.weight, std=features**-0.5)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        if self.embedding is not None:
            picture = self.embedding(labels).view(-1, 1, *self.shape[1:])
            images = torch.cat((images, picture), 1)
        features = self.body(images)
        score = self.score(features).squeeze(1)
        if self.projection is not None:
            score = score + (self.projection(labels) * features).sum(1)
        return score, self.classifier(features) if self.classifier is not None else None


class GeneratorBlock(nn.Module):
    """(B, C, h, w) -> (B, C', 2h, 2w), residual: both branches are added once, on top of nothing else."""

    def __init__(self, channels: int, out: int):
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(out)
        self.conv1 = nn.Conv2d(channels, out, 3, padding=1)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        self.skip = nn.Conv2d(channels, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        inner = F.interpolate(F.relu(self.norm1(x)), scale_factor=2)
        inner = self.conv2(F.relu(self.norm2(self.conv1(inner))))
        # A 1x1 convolution commutes with repeating pixels, and costs a quarter before it.
        return inner + F.interpolate(self.skip(x), scale_factor=2)


class CriticBlock(nn.Module):
    """(B, C, h, w) -> (B, C', h/2, w/2), or (B, C', h, w) without `down`, residual."""

    def __init__(self, channels: int, out: int, norm: CriticNorm, first: bool = False, down: bool = True):
        super().__init__()
        self.first, self.down = first, down
        self.norm1 = nn.Identity() if first else make_norm(norm, channels)
        self.norm2 = make_norm(norm, out)
        self.conv1 = nn.Conv2d(channels, out, 3, padding=1)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        self.skip = nn.Conv2d(channels, out, 1) if down or channels != out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        inner = x if self.first else F.relu(self.norm1(x))  # a picture is not cut at 0
        inner = self.conv2(F.relu(self.norm2(self.conv1(inner))))
        if not self.down:
            return inner + self.skip(x)
        return F.avg_pool2d(inner, 2) + self.skip(F.avg_pool2d(x, 2))


class SumPool(nn.Module):
    """(B, C, h, w) -> (B, C): the sum over the map of what is positive."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x).sum((2, 3))


def make_norm(norm: CriticNorm, channels: int) -> nn.Module:
    if norm == "batch":
        return nn.BatchNorm2d(channels)
    return nn.GroupNorm(1, channels) if norm == "layer" else nn.Identity()


def growing_sizes(width: int, count: int) -> list[int]:
    """Channels of a growing network's maps, the smallest one's first."""
    return [*(width * min(2**level, 8) for level in reversed(range(count))), max(1, width // 2)]


def make_generator(
    architecture: Architecture,
    shape: tuple[int, int, int],
    classes: int,
    latent_size: int,
    width: int,
    growing: bool = False,
) -> Generator:
    """A generator of images of a shape (C, H, W); `classes` is 0 where no label is wanted. One of the
    architecture dcgan may be `growing`.

    Raises ValueError for a shape that the architecture cannot make.
    """
    channels, height, width_px = shape
    inputs = 2 * latent_size if classes else latent_size
    if architecture == "mlp":
        units = 8 * width
        body: nn.Module = nn.Sequential(
            nn.Linear(inputs, units),
            nn.LeakyReLU(0.2),
            nn.Linear(units, units),
            nn.LeakyReLU(0.2),
            nn.Linear(units, math.prod(shape)),
            nn.Tanh(),
            nn.Unflatten(1, shape),
        )
        return Generator(latent_size, classes, body)
    if architecture == "dcgan" and not growing:
        maps = halvings(height, width_px)
        sizes = [width * min(2**level, 8) for level in reversed(range(len(maps)))]
        layers: list[nn.Module] = [
            nn.Linear(inputs, sizes[0] * math.prod(maps[-1]), bias=False),
            nn.Unflatten(1, (sizes[0], *maps[-1])),
        ]
        larger = [shape[1:], *maps][-2::-1]
        for size, out, target in zip(sizes, [*sizes[1:], channels], larger):
            layers += [
                nn.BatchNorm2d(size),
                nn.ReLU(),
                nn.ConvTranspose2d(size, out, kernel(target), 2, 1, bias=out == channels),
            ]
        generator = Generator(latent_size, classes, nn.Sequential(*layers, nn.Tanh()))
        generator.apply(dcgan_init)
        return generator
    count, h, w = doublings(height, width_px)
    if growing:
        growing_body = GrowingGenerator(inputs, growing_sizes(width, count), (h, w), channels)
        generator = Generator(latent_size, classes, growing_body)
        generator.apply(dcgan_init)
        for (
            image
        ) in growing_body.to_image:  # of one pixel, whose weights would leave all images grey for long
            nn.init.normal_(image[0].weight, std=image[0].in_channels ** -0.5)  # type: ignore[index]
        return generator
    blocks = [GeneratorBlock(width, width) for _ in range(count)]
    last = [nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, channels, 3, padding=1), nn.Tanh()]
    first = [nn.Linear(inputs, width * h * w), nn.Unflatten(1, (width, h, w))]
    generator = Generator(latent_size, classes, nn.Sequential(*first, *blocks, *last))
    generator.apply(residual_init)
    return generator


def make_critic(
    architecture: Architecture,
    shape: tuple[int, int, int],
    classes: int,
    conditional: Conditional | None,
    width: int,
    norm: CriticNorm,
    spectral: bool,
    growing: bool = False,
) -> Critic:
    """A critic of images of a shape (C, H, W). `spectral` divides every weight by its largest singular value,
    found by one power iteration a forward pass. Raises ValueError as `make_generator` does."""
    inputs = shape[0] + (conditional == "embedding")
    if architecture == "mlp":
        units = 8 * width
        features = units
        body: nn.Module = nn.Sequential(
            nn.Flatten(),
            nn.Linear(inputs * shape[1] * shape[2], units),
            nn.LeakyReLU(0.2),
            nn.Linear(units, units),
            nn.LeakyReLU(0.2),
        )
    elif growing:
        count, h, w = doublings(*shape[1:])
        sizes = growing_sizes(width, count)
        body = GrowingCritic(inputs, sizes, [make_norm(norm, size) for size in sizes[:-1]])
        features = sizes[0] * h * w
    elif architecture == "dcgan":
        maps = halvings(*shape[1:])
        sizes = [inputs, *(width * min(2**level, 8) for level in range(len(maps)))]
        layers: list[nn.Module] = []
        for level, (size, out) in enumerate(itertools.pairwise(sizes)):
            normed = make_norm(norm if level else "none", out)
            source = maps[level - 1] if level else shape[1:]
            layers += [nn.Conv2d(size, out, kernel(source), 2, 1), normed, nn.LeakyReLU(0.2)]
        body, features = nn.Sequential(*layers, nn.Flatten()), sizes[-1] * math.prod(maps[-1])
    else:
        count = doublings(*shape[1:])[0]
        downs = [CriticBlock(inputs if not i else width, width, norm, first=not i) for i in range(count)]
        body, features = nn.Sequential(*downs, CriticBlock(width, width, norm, down=False), SumPool()), width
    critic = Critic(shape, classes, conditional, body, features)
    if architecture == "dcgan" and norm == "batch" and not spectral:  # else the scores would begin at 0
        critic.apply(dcgan_init)
    elif architecture == "resnet":
        critic.apply(residual_init)
    if spectral:
        for module in list(critic.modules()):
            if isinstance(module, nn.Conv2d | nn.Linear | nn.Embedding):
                spectral_norm(module)
    return critic


def dcgan_init(module: nn.Module) -> None:
    """Weights of N(0, 0.02^2), normalisations around 1 (the paper, section 3)."""
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)


def residual_init(module: nn.Module) -> None:
    """Glorot's uniform: with gain sqrt(2) inside of a block, 1 on skips and ends, as SNGAN's code has it."""
    if isinstance(module, GeneratorBlock | CriticBlock):
        for conv in (module.conv1, module.conv2):
            nn.init.xavier_uniform_(conv.weight, math.sqrt(2))
        if isinstance(module.skip, nn.Conv2d):
            nn.init.xavier_uniform_(module.skip.weight)
    elif isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
