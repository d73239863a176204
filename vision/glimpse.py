"""Glimpses: small square patches of an image at several scales, and an encoder of what was seen and where.

From "Recurrent Models of Visual Attention" (Mnih et al. 2014, 1406.6247, section 3.1 and figure 1). Where we
deviate: patches begin at whole pixels, and coarser ones are exact means over squares of pixels.

Locations (B, 2) are (x, y): x from -1, the left edge of the image, to 1, the right edge; y from the upper to
the lower edge. A patch is centred on its location, up to half a pixel, so that at the edges half of it lies
outside, where everything is background.
"""

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def glimpse(
    images: Tensor, locations: Tensor, patch: int, scales: int = 1, background: float = 0.0
) -> Tensor:
    """What is seen of each image: (B, scales * C, patch, patch) float32, in the images' own units.

    Args:
        images: (B, C, H, W), any dtype.
        locations: (B, 2) floating point, (x, y) in [-1, 1].
        patch: side of the finest patch in pixels, odd or even.
        scales: how many patches around one centre: the k-th has sides of patch * 2^k pixels, and each of its
            values is the mean of 2^k x 2^k pixels.
        background: the value of all that lies outside, in the images' units.

    Raises ValueError for a patch larger than the image, no scale, or other shapes.

    >>> image = torch.arange(1.0, 17.0).view(1, 1, 4, 4)
    >>> glimpse(image, torch.tensor([[0.0, 0.0]]), patch=2)[0, 0]
    tensor([[ 6.,  7.],
            [10., 11.]])
    >>> glimpse(image, torch.tensor([[-1.0, -1.0]]), patch=2)[0, 0]
    tensor([[0., 0.],
            [0., 1.]])
    """
    if locations.shape != (len(images), 2):
        raise ValueError(f"locations must be ({len(images)}, 2), one an image, got {tuple(locations.shape)}")
    return look(framed(images, patch, scales, background), locations, patch, scales)


def framed(images: Tensor, patch: int, scales: int = 1, background: float = 0.0) -> Tensor:
    """Images (B, C, H, W) in a frame of background, as wide as half the largest patch, for `look`."""
    check_glimpse(patch, scales, tuple(images.shape[2:]))
    side = patch << (scales - 1)
    before, after = side // 2, side - side // 2
    return F.pad(images, (before, after, before, after), value=background)


def look(frames: Tensor, locations: Tensor, patch: int, scales: int = 1) -> Tensor:
    """`glimpse` of images that are `framed` already, as they are by whoever looks often."""
    batch, channels, height, width = frames.shape
    largest = patch << (scales - 1)
    flat, device = frames.view(-1), frames.device
    image = torch.arange(batch * channels, device=device).view(batch, channels, 1) * height
    seen = []
    for scale in range(scales):
        side, step = patch << scale, 1 << scale
        corner = patch_corners(locations, side, (height - largest, width - largest)) + largest // 2
        rows = image + corner[:, 1, None, None] + torch.arange(side, device=device)  # (B, C, side)
        first = rows * width + corner[:, 0, None, None]
        # Every run of `side` pixels as a row of a table: copying rows is several times as fast as gathering
        # pixels.
        table = flat.as_strided((len(flat) - side + 1, side), (1, 1))
        pixels = table.index_select(0, first.view(-1)).float()
        if step > 1:  # one sum after the other, which is faster than pooling, and exact for integers
            pixels = add(pixels.view(-1, step, side).unbind(1))  # (B * C * patch, side)
            pixels = add(pixels.view(-1, patch, step).unbind(2)) / step**2  # (B * C * patch, patch)
        seen.append(pixels.view(batch, channels, patch, patch))
    return seen[0] if scales == 1 else torch.cat(seen, 1)


def add(parts: Sequence[Tensor]) -> Tensor:
    return functools.reduce(torch.add, parts)


def patch_corners(locations: Tensor, side: int, size: tuple[int, int]) -> Tensor:
    """The first pixels (x, y) of patches of `side` pixels at `locations` (..., 2), in images of `size` (H,
    W): int64 (..., 2), from -(side // 2), where half of the patch lies outside, to the image's side less
    that. Locations beyond the edges are those at them.
    """
    lengths = torch.tensor([size[1], size[0]], device=locations.device)
    corners = torch.floor((locations + 1) / 2 * lengths - (side - 1) / 2).long()
    # Whatever comes, NaN of a training that diverged too, no pixel outside of the frame is read.
    return corners.clamp(min=-(side // 2)).minimum(lengths - side // 2)


def check_glimpse(patch: int, scales: int, size: tuple[int, ...]) -> None:
    """ValueError where there are no such glimpses of images of `size` (H, W)."""
    if patch < 1 or patch > min(size):
        raise ValueError(
            f"patch must be from 1 to the shorter side of the {size[0]}x{size[1]} canvas, got {patch}"
        )
    if scales < 1:
        raise ValueError(f"scales must be 1 or more, got {scales}")


class GlimpseEncoder(nn.Module):
    """What was seen and where, as one vector: ReLU(Linear(glimpse)) times ReLU(Linear(location)).

    The product is that of "Multiple Object Recognition with Visual Attention" (Ba et al. 2014, 1412.7755,
    section 3): from a sum, which the older paper has, it is learned more slowly what a stroke means at which
    place. Pixels are multiplied by 3 first: digits on black have a root mean square of a third, and of 1
    after that.

    values: numbers in a glimpse, scales * C * patch * patch.
    features_dim: width of both and of the result.
    """

    def __init__(self, values: int, features_dim: int = 256):
        super().__init__()
        self.features_dim = features_dim
        self.what, self.where = nn.Linear(values, features_dim), nn.Linear(2, features_dim)

    def forward(self, glimpses: Tensor, locations: Tensor) -> Tensor:
        """Glimpses (B, ...) scaled to [0, 1], locations (B, 2) -> (B, features_dim) float32."""
        return self.what(3 * glimpses.flatten(1)).relu() * self.where(locations).relu()
