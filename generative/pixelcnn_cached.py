"""The networks of `pixelcnn_networks`, one pixel at a time; see `pixel_sampling`."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from .pixel_sampling import CachedConv, Call, Line, convolve_row, last
from .pixelcnn_networks import (
    GatedNetwork,
    PlainNetwork,
    PlusPlusNetwork,
    gate,
    glu,
    twofold,
)


def matrix(conv: Any) -> Tensor:
    """A 1x1 convolution's weights and, as the last row, its biases: (inputs + 1, outputs)."""
    return torch.cat([conv.masked().flatten(1), conv.bias[:, None]], 1).T.contiguous()


def room(like: Tensor, n: int, size: int) -> tuple[Tensor, Tensor]:
    """A buffer (n, size) and, for matrices with biases, the same with a column of ones."""
    whole = like.new_ones(n, size + 1)
    return whole[:, :size], whole


class Cached:
    """What all have in common: the image, and the head's work on a column."""

    def __init__(self, like: Tensor, n: int, shape: tuple[int, ...], border: int, rows: int):
        channels, _, self.width = shape
        self.image = Line(like, n, channels + 1, self.width, rows, border, border)
        self.like, self.n = like, n
        self.programs: list[list[Call]] = []

    def write(self, r: int, c: int, channel: int, scaled: Tensor) -> None:
        self.image.columns[c][:, channel] = scaled

    def begin(self) -> None:
        """Set the image's lines for a new row, of which only the ones are known."""
        self.image.advance()
        self.image.current[:, :, -1] = 1

    def column(self, r: int, c: int) -> Tensor:
        for call in self.programs[c]:
            call()
        return self.parameters

    def head(self, head: Any, features: list[Tensor]) -> list[list[Call]]:
        """Calls that turn each column's features into parameters."""
        (_, first, _, second), n = head, self.n
        one, one_whole = room(self.like, n, first.weight.shape[1])
        two, two_whole = room(self.like, n, first.outputs)
        self.parameters = self.like.new_zeros(n, second.outputs)
        return [
            [
                partial(torch.clamp_min, column, 0, out=one),
                partial(torch.mm, one_whole, matrix(first), out=two),
                two.relu_,
                partial(torch.mm, two_whole, matrix(second), out=self.parameters),
            ]
            for column in features
        ]


class CachedPlain(Cached):
    """Each layer keeps the rows above and the columns before of its rectified input."""

    def __init__(
        self, network: PlainNetwork, n: int, shape: tuple[int, ...], condition: Tensor | None = None
    ):
        first = network.first
        super().__init__(first.weight, n, shape, first.left, first.rows)
        layers: list[Any] = list(network.layers)
        channels = first.outputs
        lines = [
            Line(self.like, n, channels, self.width, layer.rows, layer.left, layer.right) for layer in layers
        ]
        self.lines, self.biases = lines, [bias(condition) for bias in network.conditions]
        self.first = CachedConv(first, self.image)
        self.convs = [CachedConv(layer, line) for layer, line in zip(layers, lines)]
        h = self.first.out
        tails = self.head(network.head, [h] * self.width)
        for c in range(self.width):
            program = self.first.calls(c)
            for conv, line in zip(self.convs, lines):
                program += [
                    partial(torch.clamp_min, h, 0, out=line.columns[c]),
                    *conv.calls(c),
                    partial(h.add_, conv.out),
                ]
            self.programs.append(program + tails[c])

    def row(self, r: int) -> None:
        self.begin()
        self.first.row()
        for conv, line, bias in zip(self.convs, self.lines, self.biases):
            line.advance()
            conv.row(bias)


class CachedGated(Cached):
    """The vertical stack once a row, the horizontal one once a column."""

    def __init__(
        self, network: GatedNetwork, n: int, shape: tuple[int, ...], condition: Tensor | None = None
    ):
        layers: list[Any] = list(network.layers)
        like, first = layers[0].vertical.weight, layers[0].vertical
        super().__init__(like, n, shape, first.left, 1)
        self.layers, size = layers, layers[0].out.outputs
        self.biases = [[bias(condition) for bias in layer.conditions] for layer in layers]
        self.above = Line(like, n, shape[0] + 1, self.width, first.rows, first.left, first.right)
        self.verticals = [self.above] + [
            Line(like, n, size, self.width, v.rows, v.left, v.right) for v in (x.vertical for x in layers[1:])
        ]
        lines = [self.image] + [
            Line(like, n, size, self.width, 1, layer.horizontal.left) for layer in layers[1:]
        ]
        lines.append(Line(like, n, size, self.width))  # what the head sees
        self.convs = [CachedConv(layer.horizontal, line) for layer, line in zip(layers, lines)]
        tails = self.head(network.head, lines[-1].columns)
        gated, gated_whole = room(like, n, size)
        outs = [matrix(layer.out) for layer in layers]
        for c in range(self.width):
            program: list[Call] = []
            for layer, conv, out, line, after in zip(layers, self.convs, outs, lines, lines[1:]):
                one, other = conv.out.chunk(2, 1)
                program += [
                    *conv.calls(c),
                    one.tanh_,
                    other.sigmoid_,
                    partial(torch.mul, one, other, out=gated),
                    partial(torch.addmm, line.columns[c], gated_whole, out, out=after.columns[c])
                    if layer.residual
                    else partial(torch.mm, gated_whole, out, out=after.columns[c]),
                ]
            self.programs.append(program + tails[c])

    def row(self, r: int) -> None:
        if r:
            self.above.current[:] = self.image.current
        for layer, conv, biases, line, after in zip(
            self.layers, self.convs, self.biases, self.verticals, [*self.verticals[1:], None]
        ):
            gates = convolve_row(layer.vertical, line) + biases[0]
            conv.row(layer.across(gates) + biases[1])
            if after is not None:
                new = last(gate(gates))
                after.current[:] = line.current + new if layer.residual else new
            line.advance()
        self.image.current[:, :, -1] = 1


class CachedBlock:
    """A block of PixelCNN++: the down stream once a row, the right one once a column, from `h` into `out`."""

    def __init__(self, block: Any, h: Tensor, width: int, skip: Tensor | None, condition: Tensor | None):
        self.block, self.h, self.skip, n, size = block, h, skip, *h.shape
        self.biases = [bias(condition) for bias in block.conditions]
        self.down_lines = [Line(h, n, 2 * size, width, 2, 1, 1) for _ in range(2)]
        self.right_lines = [Line(h, n, 2 * size, width, 2, 1) for _ in range(2)]
        convs = zip((block.right, block.right_out), self.right_lines)
        self.right, self.right_out = (CachedConv(conv, line) for conv, line in convs)
        if skip is not None:  # of [v, skip, -v, -skip]
            parts = block.right_skip.masked().flatten(1).T.chunk(4)
            self.skip_weight, self.skip_twofold = torch.cat([parts[1], parts[3]]), h.new_zeros(n, 2 * size)
        self.sigmoid, self.out = h.new_zeros(n, size), h.new_zeros(n, size)

    def row(self, v: Tensor, skip: Tensor | None) -> Tensor:
        """(n, C, 1, W) of the down stream -> the same after this block."""
        block, (one, two) = self.block, self.down_lines
        one.current[:] = last(twofold(v))
        inner = convolve_row(block.down, one)
        if skip is not None:
            inner = inner + block.down_skip(twofold(skip))
        two.current[:] = last(twofold(inner))
        v = v + glu(convolve_row(block.down_out, two) + self.biases[0])
        beside = (
            v if skip is None else torch.cat([v, torch.zeros_like(v)], 1)
        )  # the column's part comes later
        for line in (*self.down_lines, *self.right_lines):
            line.advance()
        self.right.row(block.right_skip(twofold(beside)))
        self.right_out.row(self.biases[1])
        return v

    def calls(self, c: int) -> list[Call]:
        (one, two), inner = (line.columns[c] for line in self.right_lines), self.right.out
        value, gates = self.right_out.out.chunk(2, 1)
        program = [*write_twofold(self.h, one), *self.right.calls(c)]
        if self.skip is not None:
            program += write_twofold(self.skip, self.skip_twofold)
            program += [partial(inner.addmm_, self.skip_twofold, self.skip_weight)]
        return [
            *program,
            *write_twofold(inner, two),
            *self.right_out.calls(c),
            partial(torch.sigmoid, gates, out=self.sigmoid),
            partial(torch.addcmul, self.h, value, self.sigmoid, out=self.out),
        ]


def write_twofold(x: Tensor, out: Tensor) -> list[Call]:
    """`twofold` of (n, C) into (n, 2 C)."""
    plus, minus = out.chunk(2, 1)
    return [partial(plus.copy_, x), partial(torch.neg, x, out=minus), partial(torch.nn.functional.elu_, out)]


class CachedLevel:
    """The blocks of one size, and the level of half the size, which runs at even rows and columns only."""

    def __init__(self, level: Any, h: Tensor, width: int, condition: Tensor | None):
        self.level, self.fall, self.rise = level, [], []
        for block in level.fall:
            self.fall.append(CachedBlock(block, h, width, None, condition))
            h = self.fall[-1].out
        self.inner = None
        if level.inner is not None:
            n, size = h.shape
            self.down_line, self.right_line = Line(h, n, size, width, 2, 1, 1), Line(h, n, size, width, 2, 1)
            self.shrink, self.fallen = CachedConv(level.shrink_right, self.right_line), h
            self.inner = CachedLevel(level.inner, self.shrink.out, width // 2, condition)
            self.grow, (_, self.inner_out) = matrix(level.grow_right), room(h, n, size)
            self.grown_down, self.grown_right = h.new_zeros(n, size, 2, width), h.new_zeros(n, size, 2, width)
            h = h.new_zeros(n, size)
        self.risen = h
        for block, skip in zip(level.rise, reversed(self.fall)):
            self.rise.append(CachedBlock(block, h, width, skip.out, condition))
            h = self.rise[-1].out
        self.out = h
        self.programs = [
            [[call for block in blocks for call in block.calls(c)] for blocks in (self.fall, self.rise)]
            for c in range(width)
        ]

    def row(self, r: int, v: Tensor) -> Tensor:
        """(n, C, 1, W) of the down stream -> the same after this level."""
        skips = []
        for block in self.fall:
            v = block.row(v, None)
            skips.append(v)
        if self.inner is not None:
            self.down_line.current[:] = last(v)
            self.right_line.advance()
            if r % 2 == 0:
                shrunk = convolve_row(self.level.shrink_down, self.down_line)
                self.shrink.row()
                grown = self.level.grow_down(self.inner.row(r // 2, shrunk))
                self.grown_down[:] = torch.nn.functional.pixel_shuffle(grown, 2)
            self.down_line.advance()
            v = self.grown_down[:, :, r % 2, None]
        for block in self.rise:
            v = block.row(v, skips.pop())
        return v

    def column(self, r: int, c: int) -> None:
        fall, rise = self.programs[c]
        for call in fall:
            call()
        if self.inner is not None:
            self.right_line.columns[c].copy_(self.fallen)
            if r % 2 == 0 and c % 2 == 0:
                for call in self.shrink.calls(c // 2):
                    call()
                self.inner.column(r // 2, c // 2)
                self.inner_out[:, :-1] = self.inner.out
                grown = (self.inner_out @ self.grow)[:, :, None, None]
                self.grown_right[:, :, :, c : c + 2] = torch.nn.functional.pixel_shuffle(grown, 2)
            self.risen.copy_(self.grown_right[:, :, r % 2, c])
        for call in rise:
            call()


class CachedPlusPlus(Cached):
    """Both streams through all sizes."""

    def __init__(
        self, network: PlusPlusNetwork, n: int, shape: tuple[int, ...], condition: Tensor | None = None
    ):
        like = network.right.weight.detach()
        super().__init__(like, n, shape, 1, 2)
        self.network = network
        self.above = Line(like, n, shape[0] + 1, self.width, 2, 1, 1)
        self.first = CachedConv(network.right, self.image)
        self.level = CachedLevel(network.level, self.first.out, self.width, condition)
        self.features, self.whole = room(like, n, network.right.outputs)
        self.out = matrix(network.head[1])
        self.programs = [self.first.calls(c) for c in range(self.width)]

    def row(self, r: int) -> None:
        if r:
            self.above.current[:] = self.image.current
        self.begin()
        self.first.row(convolve_row(self.network.beside, self.above))
        self.level.row(r, convolve_row(self.network.down, self.above))
        self.above.advance()

    def column(self, r: int, c: int) -> Tensor:
        for call in self.programs[c]:
            call()
        self.level.column(r, c)
        torch.nn.functional.elu_(self.features.copy_(self.level.out))
        return self.whole @ self.out
