"""PixelRNN: images pixel by pixel, with a memory that runs over the whole image.

Van den Oord, Kalchbrenner and Kavukcuoglu 2016, "Pixel Recurrent Neural Networks" (arXiv:1601.06759),
sections 3.1 to 3.3. Both variants begin with a masked 7x7 convolution, and each LSTM layer is a residual
block of constant width. Everything but the networks is `PixelModel`'s.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .pixel_sampling import CachedConv, Call, Drawing, Line, last
from .pixelcnn import PixelConfig, PixelModel, recipe_of
from .pixelcnn_cached import Cached
from .pixelcnn_networks import CausalConv, Condition, Head, group_mask, image_mask, pointwise, with_ones


@dataclass(frozen=True)
class PixelRNNConfig(PixelConfig):
    """Hyper-parameters. An epoch is one pass over the training images."""

    variant: Literal["row", "diagonal"] = "row"
    """row: an LSTM from row to row, of which a pixel sees a triangle above it. diagonal: two, along both
    diagonals; a pixel sees everything before it."""
    layers: int = 2
    """LSTM layers."""


def lstm(gates: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
    """Gates (B, 4 C, ...), before their nonlinearities and in the order of input, forget, output and content;
    memory (B, C, ...) -> state and memory after this step."""
    i, f, o, content = gates.chunk(4, 1)
    memory = f.sigmoid() * memory + i.sigmoid() * content.tanh()
    return o.sigmoid() * memory.tanh(), memory


class RowLSTM(nn.Module):
    """Row by row from the top: the state of three columns above comes into a pixel's (section 3.1)."""

    def __init__(self, width: int, groups: int):
        super().__init__()
        mask = group_mask(width, width, groups, "up to").repeat(4, 1)
        self.input = CausalConv(width, 4 * width, 1, 1, 0, mask=mask)
        self.above = CausalConv(width, 4 * width, 1, 1, 1)

    def forward(self, x: Tensor, bias: Tensor | float) -> Tensor:
        gates, states = self.input(x) + bias, []
        state = memory = torch.zeros_like(x[:, :, :1])
        for row in gates.split(1, 2):
            state, memory = lstm(row + self.above(state), memory)
            states.append(state)
        return torch.cat(states, 2)


class DiagonalLSTM(nn.Module):
    """Diagonal by diagonal: the states to the left and above come into a pixel's (section 3.2)."""

    def __init__(self, width: int, groups: int):
        super().__init__()
        self.input = pointwise(width, 4 * width, groups, parts=4)
        self.left = nn.Linear(width, 4 * width, bias=False)
        self.above = nn.Linear(width, 4 * width, bias=False)

    def forward(self, x: Tensor, bias: Tensor | float) -> Tensor:
        gates = (self.input(x) + bias).permute(0, 2, 3, 1)  # (B, H, W, 4 C)
        b, height, width, size = gates.shape
        # Row r moves r columns to the right, so that a diagonal becomes a column.
        skewed = F.pad(gates, (0, 0, 0, height)).flatten(1, 2)[:, : height * (width + height - 1)]
        skewed = skewed.unflatten(1, (height, width + height - 1))
        state = memory = gates.new_zeros(b, height, size // 4)
        states = []
        for d, gate in enumerate(skewed.unbind(2)):
            gate = gate + self.left(state) + self.above(F.pad(state[:, :-1], (0, 0, 1, 0)))
            state, memory = lstm(gate.flatten(0, 1), memory.flatten(0, 1))
            state, memory = state.unflatten(0, (b, height)), memory.unflatten(0, (b, height))
            if d < height - 1:  # rows that this diagonal has not reached
                reached = (torch.arange(height, device=x.device) <= d)[:, None]
                state, memory = state * reached, memory * reached
            states.append(state)
        whole = F.pad(torch.stack(states, 2).flatten(1, 2), (0, 0, 0, height))  # back, (B, H, W, C)
        return whole.unflatten(1, (height, width + height))[:, :, :width].permute(0, 3, 1, 2)


class RowLayer(nn.Module):
    def __init__(self, width: int, groups: int, condition: int):
        super().__init__()
        self.lstm = RowLSTM(width, groups)
        self.out = pointwise(width, width, groups)
        self.condition = Condition(condition, 4 * width)

    def forward(self, x: Tensor, condition: Tensor | None, dropout: nn.Module) -> Tensor:
        return x + self.out(dropout(self.lstm(x, self.condition(condition))))


class DiagonalLayer(nn.Module):
    """One LSTM from the left and one from the right, whose states count in the next row (section 3.2)."""

    def __init__(self, width: int, groups: int, condition: int):
        super().__init__()
        self.lstms = nn.ModuleList(DiagonalLSTM(width, groups) for _ in range(2))
        self.out = pointwise(width, width, groups)
        self.condition = Condition(condition, 4 * width)

    def forward(self, x: Tensor, condition: Tensor | None, dropout: nn.Module) -> Tensor:
        bias = self.condition(condition)
        left = self.lstms[0](x, bias)
        right = self.lstms[1](x.flip(3), bias).flip(3)
        return x + self.out(dropout(left + F.pad(right, (0, 0, 1, 0))[:, :, :-1]))


class RecurrentNetwork(nn.Module):
    """A masked 7x7 convolution, LSTM layers, and two 1x1 convolutions."""

    def __init__(
        self, channels: int, outputs: int, width: int, layers: int, dropout: float, groups: int,
        condition: int, layer: type[RowLayer] | type[DiagonalLayer],
    ):  # fmt: skip
        super().__init__()
        self.first = CausalConv(channels + 1, width, 4, 3, 3, mask=image_mask(width, channels, groups))
        self.layers = nn.ModuleList(layer(width, groups, condition) for _ in range(layers))
        self.dropout = nn.Dropout(dropout)
        self.head = Head(width, outputs, groups)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        h = self.first(with_ones(x))
        for layer in self.layers:
            h = layer(h, condition, self.dropout)
        return self.head(h)


class PixelRNN(PixelModel):
    """Learns each pixel's distribution given those above it and to its left, by LSTMs.

    >>> from foveal.vision import binarize, load_dataset
    >>> from foveal.generative import PixelRNN
    >>> digits = binarize(load_dataset("digits", train_size=200), 8)
    >>> model = PixelRNN(digits.space, digits.classes, PixelRNN.Config(width=8)).fit(digits, epochs=1)
    >>> model.log_prob(digits.test.images[:5]).shape, model.sample(3).shape
    (torch.Size([5]), torch.Size([3, 1, 8, 8]))
    """

    name: ClassVar[str] = "pixelrnn"
    Config: ClassVar[type] = PixelRNNConfig
    recipe = staticmethod(recipe_of(PixelRNNConfig, {"digits": {"width": 24}}))
    config: PixelRNNConfig

    def build_network(self, channels: int, outputs: int, groups: int, condition: int) -> nn.Module:
        config = self.config
        layer = RowLayer if config.variant == "row" else DiagonalLayer
        return RecurrentNetwork(
            channels, outputs, config.width, config.layers, config.dropout, groups, condition, layer
        )

    def cached(self, n: int, condition: Tensor | None) -> Drawing:
        return CachedRecurrent(self.network, n, self.space.shape, condition)  # type: ignore[arg-type]


# The same networks, one pixel at a time; see `pixel_sampling`.


def lstm_calls(gates: Tensor, before: Tensor, memory: Tensor, state: Tensor) -> list[Call]:
    """`lstm` on buffers (n, 4 C) and (n, C): from `gates`, which it overwrites, and the memory `before`."""
    size = memory.shape[1]
    i, f, o, content = gates.split(size, 1)
    return [
        gates[:, : 3 * size].sigmoid_,
        content.tanh_,
        partial(torch.mul, i, content, out=memory),
        partial(memory.addcmul_, f, before),
        partial(torch.tanh, memory, out=content),
        partial(torch.mul, o, content, out=state),
    ]


class CachedRowLayer:
    """What comes from above once a row, the rest of the gates once a column, from `x` into `out`."""

    def __init__(self, layer: Any, x: Tensor, width: int, condition: Tensor | None):
        n, size = x.shape
        self.layer, self.x, self.out = layer, x, torch.zeros_like(x)
        self.bias = layer.condition(condition)
        self.inputs, self.states = Line(x, n, size, width, 1, 1), Line(x, n, size, width, 1, 1, 1)
        self.input = CachedConv(layer.lstm.input, self.inputs)
        self.memory = x.new_zeros(2, width, n, size)  # of the row above, and of this one

    def row(self, r: int) -> None:
        self.memory[0] = self.memory[1]
        above = F.conv2d(self.states.rows(1, 1), self.layer.lstm.above.masked(), self.layer.lstm.above.bias)
        self.input.row(above + self.bias)

    def calls(self, c: int) -> list[Call]:
        state, out = self.states.columns[c], self.layer.out
        return [
            partial(self.inputs.columns[c].copy_, self.x),
            *self.input.calls(c),
            *lstm_calls(self.input.out, self.memory[0, c], self.memory[1, c], state),
            partial(torch.addmm, self.x, state, out.masked().flatten(1).T.contiguous(), out=self.out),
            partial(self.out.add_, out.bias),
        ]


class CachedDiagonalLayer:
    """The LSTM from the right once a row, for the row above; that from the left once a column."""

    def __init__(self, layer: Any, x: Tensor, width: int, condition: Tensor | None):
        n, size = x.shape
        self.layer, self.x, self.out = layer, x, torch.zeros_like(x)
        self.bias = layer.condition(condition)
        self.inputs = Line(x, n, size, width)
        self.input = CachedConv(layer.lstms[0].input, self.inputs)
        self.states, self.memories = (Line(x, n, size, width, 1, 1) for _ in range(2))
        self.from_right = x.new_zeros(width, n, size)
        self.sum = torch.zeros_like(x)

    def row(self, r: int) -> None:
        left, right = self.layer.lstms
        if r:
            row = self.inputs.current.transpose(1, 2).unsqueeze(2)  # (n, C, 1, W)
            gates = last(right.input(row) + self.bias).transpose(0, 1) + right.above(self.from_right)
            state = memory = torch.zeros_like(self.x)
            for c in reversed(range(len(gates))):
                state, memory = lstm(gates[c] + right.left(state), memory)
                self.from_right[c] = state
        above = left.above(self.states.current).transpose(1, 2).unsqueeze(2)
        self.input.row(above + self.bias)

    def calls(self, c: int) -> list[Call]:
        before, memory_before = (line.window(c, 2) for line in (self.states, self.memories))
        state, memory = self.states.columns[c], self.memories.columns[c]
        size, gates, out = self.x.shape[1], self.input.out, self.layer.out
        return [
            partial(self.inputs.columns[c].copy_, self.x),
            *self.input.calls(c),
            partial(gates.addmm_, before[:, :size], self.layer.lstms[0].left.weight.T.contiguous()),
            *lstm_calls(gates, memory_before[:, :size], memory, state),
            partial(torch.add, state, self.from_right[c], out=self.sum),
            partial(torch.addmm, self.x, self.sum, out.masked().flatten(1).T.contiguous(), out=self.out),
            partial(self.out.add_, out.bias),
        ]


class CachedRecurrent(Cached):
    """The first convolution, the layers and the head."""

    def __init__(
        self, network: RecurrentNetwork, n: int, shape: tuple[int, ...], condition: Tensor | None = None
    ):
        first = network.first
        super().__init__(first.weight, n, shape, first.left, first.rows)
        self.first = CachedConv(first, self.image)
        h, self.layers = self.first.out, []
        for layer in network.layers:
            kind: Any = CachedRowLayer if isinstance(layer, RowLayer) else CachedDiagonalLayer
            self.layers.append(kind(layer, h, self.width, condition))
            h = self.layers[-1].out
        tails = self.head(network.head, [h] * self.width)
        self.programs = [
            [*self.first.calls(c), *(call for layer in self.layers for call in layer.calls(c)), *tails[c]]
            for c in range(self.width)
        ]

    def row(self, r: int) -> None:
        self.begin()
        self.first.row()
        for layer in self.layers:
            layer.row(r)
