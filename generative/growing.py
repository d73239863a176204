"""Networks of a GAN that grow while it trains (Karras et al. 2017, 1710.10196, section 2 and figure 2).

Both begin with the smallest map. A doubling adds a block to each, which fades in: the image is a mixture of
what the larger network makes and of the smaller one's, enlarged; the critic mixes what the new block says of
an image with what it sees of one half as large. Images stay of the whole size outside: a smaller network's is
enlarged, and the critic reduces what it gets. Blocks are DCGAN's, which the paper's are not.
"""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WHOLE = 1024
"""A block that has faded in, in the units of a stage."""


class Growing(nn.Module):
    """What both bodies share: how far they have grown."""

    def __init__(self, count: int):
        super().__init__()
        self.count = count
        # An integer, so that the average of the generator's statistics leaves it as it is.
        self.register_buffer("stage", torch.tensor(count * WHOLE))
        self.stage: Tensor

    def at(self) -> tuple[int, float]:
        """Doublings, and the share of the last one that has faded in, in (0, 1]."""
        stage = int(self.stage)
        level = -(-stage // WHOLE)
        return level, (stage - (level - 1) * WHOLE) / WHOLE if level else 1.0


def stage_of(progress: float, share: float, count: int) -> int:
    """The stage at a point of the training, in 1024ths of a doubling: each size is trained as it is for as
    long as the next one then fades in, and after `share` of the training all are there."""
    if progress >= share:
        return count * WHOLE
    level, part = divmod(progress / share * count, 1.0)
    return round((level + max(0.0, 2 * part - 1)) * WHOLE)


def enlarged(images: Tensor, times: int) -> Tensor:
    return F.interpolate(images, scale_factor=2**times) if times else images


def reduced(images: Tensor, times: int) -> Tensor:
    return F.avg_pool2d(images, 2**times) if times else images


def faded(images: Tensor, count: int, level: int, alpha: float) -> Tensor:
    """Whole images as a generator at that stage could make them: real ones are no finer than made ones."""
    x = reduced(images, count - level)
    if alpha < 1:
        x = torch.lerp(enlarged(reduced(x, 1), 1), x, alpha)
    return enlarged(x, count - level)


class GrowingGenerator(Growing):
    """(B, Z) -> (B, C, H, W) in [-1, 1]. `sizes` are the channels of the maps, the smallest map's first."""

    def __init__(self, inputs: int, sizes: list[int], first: tuple[int, int], channels: int):
        super().__init__(len(sizes) - 1)
        h, w = first
        self.first = nn.Sequential(
            nn.Linear(inputs, sizes[0] * h * w, bias=False),
            nn.Unflatten(1, (sizes[0], h, w)),
            nn.BatchNorm2d(sizes[0]),
            nn.ReLU(),
        )
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.ConvTranspose2d(size, out, 4, 2, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU())
            for size, out in itertools.pairwise(sizes)
        )
        self.to_image = nn.ModuleList(
            nn.Sequential(nn.Conv2d(size, channels, 1), nn.Tanh()) for size in sizes
        )

    def forward(self, noise: Tensor) -> Tensor:
        return self.draw(noise, *self.at())

    def draw(self, noise: Tensor, level: int, alpha: float) -> Tensor:
        x = before = self.first(noise)
        for block in self.blocks[:level]:
            before, x = x, block(x)
        image = self.to_image[level](x)
        if alpha < 1:
            image = torch.lerp(enlarged(self.to_image[level - 1](before), 1), image, alpha)
        return enlarged(image, self.count - level)


class GrowingCritic(Growing):
    """(B, C, H, W) -> features (B, F). `norm` makes the normalisation of a block's channels."""

    def __init__(self, inputs: int, sizes: list[int], norms: list[nn.Module]):
        super().__init__(len(sizes) - 1)
        self.from_image = nn.ModuleList(
            nn.Sequential(nn.Conv2d(inputs, size, 1), nn.LeakyReLU(0.2)) for size in sizes
        )
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(b, a, 4, 2, 1), norm, nn.LeakyReLU(0.2))
            for (a, b), norm in zip(itertools.pairwise(sizes), norms)
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.look(images, *self.at())

    def look(self, images: Tensor, level: int, alpha: float) -> Tensor:
        seen = reduced(images, self.count - level)
        x = self.from_image[level](seen)
        for number in reversed(range(level)):
            x = self.blocks[number](x)
            if alpha < 1 and number == level - 1:
                x = torch.lerp(self.from_image[number](reduced(seen, 1)), x, alpha)
        return x.flatten(1)
