"""Drawing images pixel by pixel: the naive way, and the one that computes only what a new pixel changes.

Both turn the same uniform numbers into values by the inverse of the cumulative distribution, so that they can
be compared pixel by pixel.

The cached way is that of Ramachandran et al. 2017 (arXiv:1704.06001), with rows in place of single pixels
where that is possible: what depends on finished rows only is computed for a whole row at once, and the rest
for one column, of which every layer keeps what later columns need. All buffers are made once; a column's work
is a list of calls, each one kernel that writes into a buffer. `pixelcnn_cached` and `pixelrnn` have the
networks in that form.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .pixel_likelihoods import Likelihood, scale

Call = Callable[[], object]


class Drawing(Protocol):
    """A network at work on n images, of which it gives one pixel's parameters after the other's."""

    def row(self, r: int) -> None:
        """Begin row r: all rows above it are drawn."""

    def column(self, r: int, c: int) -> Tensor:
        """Parameters (n, P) of pixel (r, c), before which all are drawn; the next call may overwrite them."""

    def write(self, r: int, c: int, channel: int, scaled: Tensor) -> None:
        """The values (n,) that were drawn for a pixel, in [-1, 1]."""


@torch.no_grad()
def draw(
    drawing: Drawing,
    likelihood: Likelihood,
    uniforms: Tensor,
    known: tuple[Tensor, Tensor] | None = None,
    temperature: float = 1.0,
    each: Callable[[int, int, Tensor], object] | None = None,
) -> Tensor:
    """Images (n, C, H, W) int64, in raster order, a pixel's channels one after the other.

    Args:
        uniforms: (n, C, H, W) in [0, 1), one for each value.
        known: images (n, C, H, W) int64, and a mask (H, W) bool of what is kept of them.
        each: called with r, c and the images so far after each pixel.
    """
    n, channels, height, width = uniforms.shape
    images = torch.zeros(n, channels, height, width, dtype=torch.int64, device=uniforms.device)
    kept = known[1].tolist() if known is not None else [[False] * width] * height
    before = uniforms.new_zeros(n, channels)  # the pixel's earlier channels, scaled
    for r in range(height):
        drawing.row(r)
        for c in range(width):
            for channel in range(channels):
                if channel == 0 or likelihood.groups > 1:
                    parameters = drawing.column(r, c)
                if kept[r][c]:
                    values = known[0][:, channel, r, c]  # type: ignore[index]
                else:
                    cdf = likelihood.cdf(parameters, channel, before, temperature)
                    values = (uniforms[:, channel, r, c, None] >= cdf).sum(1)
                images[:, channel, r, c] = values
                before[:, channel] = scaled = scale(values, likelihood.levels, uniforms.dtype)
                drawing.write(r, c, channel, scaled)
            if each is not None:
                each(r, c, images)
    return images


class Naive:
    """The whole network on the whole image for every pixel."""

    def __init__(self, network: nn.Module, n: int, shape: tuple[int, ...], condition: Tensor | None = None):
        self.network, self.condition = network, condition
        like = next(network.parameters())
        self.image = torch.zeros(n, *shape, dtype=like.dtype, device=like.device)

    def row(self, r: int) -> None:
        pass

    def column(self, r: int, c: int) -> Tensor:
        return self.network(self.image, self.condition)[:, :, r, c]

    def write(self, r: int, c: int, channel: int, scaled: Tensor) -> None:
        self.image[:, channel, r, c] = scaled


# What the cached networks are made of.


class Line:
    """The row of a feature map that is at work, and those above it that convolutions still see.

    `data` (n, rows, left + W + right, C), channels last, so that the columns a convolution sees lie side by
    side; zero beyond the image.
    """

    def __init__(
        self, like: Tensor, n: int, channels: int, width: int, rows: int = 1, left: int = 0, right: int = 0
    ):
        self.data = like.new_zeros(n, rows, left + width + right, channels)
        self.left, self.width = left, width
        self.current = self.data[:, -1, left : left + width]  # (n, W, C)
        self.columns = [self.current[:, c] for c in range(width)]

    def advance(self) -> None:
        """The row is whole: it is now the one above."""
        self.data[:, :-1] = self.data[:, 1:].clone()

    def window(self, c: int, taps: int) -> Tensor:
        """Column c of the row and the `taps` - 1 before it: (n, taps * C), a view."""
        return self.data[:, -1, self.left + c - taps + 1 : self.left + c + 1].flatten(1)

    def rows(self, left: int, right: int) -> Tensor:
        """All rows with a border of so many columns: (n, C, rows, left + W + right)."""
        return self.data[:, :, self.left - left : self.left + self.width + right].permute(0, 3, 1, 2)


def convolve_row(conv: Any, line: Line) -> Tensor:
    """A convolution's row (n, outputs, 1, W'), of a line that holds all rows which it sees."""
    rows = line.rows(conv.left, conv.right)[:, :, -conv.rows :]
    return F.conv2d(rows, conv.masked(), conv.bias, conv.stride)


def last(row: Tensor) -> Tensor:
    """(n, C, 1, W) -> (n, W, C)."""
    return row.squeeze(2).transpose(1, 2)


class CachedConv:
    """A convolution, one column at a time: what it sees of the rows above is worked out once a row."""

    def __init__(self, conv: Any, line: Line):
        self.conv, self.line = conv, line
        weight = conv.masked()
        self.above = weight[:, :, :-1]
        self.taps = conv.left + 1
        # (taps * inputs, outputs): what a window of the line is multiplied with
        self.weight = weight[:, :, -1, : self.taps].permute(2, 1, 0).flatten(0, 1).contiguous()
        n, width = len(line.data), line.width // conv.stride
        self.context = weight.new_zeros(width, n, conv.outputs)
        self.out = weight.new_zeros(n, conv.outputs)

    def row(self, added: Tensor | float = 0.0) -> None:
        """Begin a row; `added` broadcasts with (n, outputs, 1, W)."""
        if self.conv.rows > 1:
            rows = self.line.rows(self.conv.left, self.conv.right)[:, :, -self.conv.rows : -1]
            context = F.conv2d(rows, self.above, self.conv.bias, (1, self.conv.stride)) + added
        else:
            context = self.conv.bias.view(1, -1, 1, 1) + added
        self.context[:] = context.expand(-1, -1, 1, len(self.context)).squeeze(2).permute(2, 0, 1)

    def calls(self, c: int) -> list[Call]:
        """Work out column c into `out`."""
        window = self.line.window(c * self.conv.stride, self.taps)
        return [partial(torch.addmm, self.context[c], window, self.weight, out=self.out)]
