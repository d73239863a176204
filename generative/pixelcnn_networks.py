"""The convolutional networks of PixelCNN, which see of an image only what comes before each pixel.

`PlainNetwork`: PixelCNN of van den Oord, Kalchbrenner and Kavukcuoglu 2016 (arXiv:1601.06759, section 3.4),
with kernels that end at the pixel's row and residual connections around each masked convolution.
`GatedNetwork`: van den Oord et al. 2016 (arXiv:1606.05328, fig. 2); the vertical stack is residual too.
`PlusPlusNetwork`: PixelCNN++ of Salimans et al. 2017 (arXiv:1701.05517, fig. 2 and the authors' kernels of
2x3 and 2x2), which goes to half the size and back by strides; upsampling is a 1x1 convolution and a pixel
shuffle.

All take images (B, C, H, W) scaled to [-1, 1] and give (B, outputs, H, W), of which the part of channel c
depends on earlier pixels and on the same pixel's channels before c. A channel of ones beside the image shows
where its border is. `pixel_sampling` runs the same layers one pixel at a time.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm


def group_mask(outputs: int, inputs: int, groups: int, see: Literal["before", "up to"]) -> Tensor:
    """Which inputs the outputs see of their own pixel, both in `groups` equal parts: (outputs, inputs)."""
    mine, other = torch.arange(outputs) * groups // outputs, torch.arange(inputs) * groups // inputs
    return (other < mine[:, None] if see == "before" else other <= mine[:, None]).float()


class CausalConv(nn.Module):
    """A convolution over this row and `rows` - 1 above it, from `left` columns before to `right` after.

    With `mask` (outputs, inputs), the weights of the pixel itself are multiplied by it, and those right of it
    in its own row are zero.
    """

    weight: Tensor
    bias: Tensor
    mask: Tensor | None

    def __init__(
        self,
        inputs: int,
        outputs: int,
        rows: int,
        left: int,
        right: int,
        stride: int = 1,
        mask: Tensor | None = None,
    ):
        super().__init__()
        self.outputs = outputs
        self.rows, self.left, self.right, self.stride = rows, left, right, stride
        convolution = nn.Conv2d(inputs, outputs, (rows, left + 1 + right))  # for its initial weights
        self.weight, self.bias = convolution.weight, convolution.bias  # type: ignore[assignment]
        self.register_buffer("mask", None, persistent=False)
        if mask is not None:
            self.mask = torch.ones_like(self.weight)
            self.mask[:, :, -1, left], self.mask[:, :, -1, left + 1 :] = mask, 0
            with torch.no_grad():  # fewer inputs count than initialisation reckoned with
                self.weight /= self.mask.mean((1, 2, 3), keepdim=True).clamp(min=1e-3).sqrt()

    def masked(self) -> Tensor:
        """The weights that count: (outputs, inputs, rows, columns)."""
        return self.weight if self.mask is None else self.weight * self.mask

    def forward(self, x: Tensor) -> Tensor:
        padded = F.pad(x, (self.left, self.right, self.rows - 1, 0))
        return F.conv2d(padded, self.masked(), self.bias, self.stride)


def pointwise(inputs: int, outputs: int, groups: int = 1, parts: int = 1) -> CausalConv:
    """A 1x1 convolution; in each of its `parts` a group of features sees those up to itself."""
    mask = None if groups == 1 else group_mask(outputs // parts, inputs, groups, "up to").repeat(parts, 1)
    return CausalConv(inputs, outputs, 1, 0, 0, mask=mask)


def image_mask(outputs: int, channels: int, groups: int, parts: int = 1) -> Tensor:
    """What the first layer sees of the pixel itself: channels before its own, and the ones."""
    mask = group_mask(outputs // parts, channels, groups, "before").repeat(parts, 1)
    return torch.cat([mask, torch.ones(outputs, 1)], 1)


def with_ones(x: Tensor) -> Tensor:
    """Images (B, C, H, W) -> (B, C + 1, H, W)."""
    return torch.cat([x, torch.ones_like(x[:, :1])], 1)


def gate(x: Tensor) -> Tensor:
    """tanh of one half of the channels times sigmoid of the other (Gated PixelCNN, eq. 2)."""
    one, other = x.chunk(2, 1)
    return torch.tanh(one) * torch.sigmoid(other)


def glu(x: Tensor) -> Tensor:
    """One half of the channels times sigmoid of the other."""
    return F.glu(x, 1)


def twofold(x: Tensor) -> Tensor:
    """elu of x and of -x: twice the channels."""
    return F.elu(torch.cat([x, -x], 1))


class Condition(nn.Module):
    """A vector (B, D) as biases (B, outputs, 1, 1), or none."""

    def __init__(self, size: int, outputs: int):
        super().__init__()
        self.linear = nn.Linear(size, outputs, bias=False) if size else None

    def forward(self, condition: Tensor | None) -> Tensor | float:
        if self.linear is None or condition is None:
            return 0.0
        return self.linear(condition)[:, :, None, None]


class Head(nn.Sequential):
    """Features -> outputs, each group of which sees the groups up to itself."""

    def __init__(self, width: int, outputs: int, groups: int):
        super().__init__(
            nn.ReLU(), pointwise(width, width, groups), nn.ReLU(), pointwise(width, outputs, groups)
        )


class PlainNetwork(nn.Module):
    """One stack of masked convolutions, which never see a part of what is above to the right (blind spot)."""

    def __init__(
        self, channels: int, outputs: int, width: int, layers: int, kernel: int, dropout: float = 0.0,
        groups: int = 1, condition: int = 0,
    ):  # fmt: skip
        super().__init__()
        half, first = kernel // 2, 3
        mask = group_mask(width, width, groups, "up to")
        self.first = CausalConv(
            channels + 1, width, first + 1, first, first, mask=image_mask(width, channels, groups)
        )
        self.layers = nn.ModuleList(
            CausalConv(width, width, half + 1, half, half, mask=mask) for _ in range(layers)
        )
        self.conditions = nn.ModuleList(Condition(condition, width) for _ in range(layers))
        self.dropout = nn.Dropout(dropout)
        self.head = Head(width, outputs, groups)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        h = self.first(with_ones(x))
        for layer, bias in zip(self.layers, self.conditions):
            h = h + self.dropout(layer(F.relu(h)) + bias(condition))
        return self.head(h)


class GatedLayer(nn.Module):
    """A layer of the vertical stack, which sees rows above, and one of the horizontal, which sees it too."""

    def __init__(
        self,
        inputs: tuple[int, int],
        width: int,
        kernel: int,
        groups: int,
        condition: int,
        mask: Tensor,
        dropout: float,
    ):
        super().__init__()
        half = kernel // 2
        self.vertical = CausalConv(inputs[0], 2 * width, half + 1, half, half)
        self.across = pointwise(2 * width, 2 * width)
        self.horizontal = CausalConv(inputs[1], 2 * width, 1, half, 0, mask=mask)
        self.out = pointwise(width, width, groups)
        self.conditions = nn.ModuleList(Condition(condition, 2 * width) for _ in range(2))
        self.dropout = nn.Dropout(dropout)
        self.residual = inputs[1] == width

    def forward(self, v: Tensor, h: Tensor, condition: Tensor | None) -> tuple[Tensor, Tensor]:
        v_gates = self.vertical(v) + self.conditions[0](condition)
        h_gates = self.horizontal(h) + self.across(v_gates) + self.conditions[1](condition)
        new_v, new_h = self.dropout(gate(v_gates)), self.out(self.dropout(gate(h_gates)))
        return (v + new_v, h + new_h) if self.residual else (new_v, new_h)


class GatedNetwork(nn.Module):
    """Two stacks without a blind spot, with gates in place of rectifiers."""

    def __init__(
        self, channels: int, outputs: int, width: int, layers: int, kernel: int, dropout: float = 0.0,
        groups: int = 1, condition: int = 0,
    ):  # fmt: skip
        super().__init__()
        image = image_mask(2 * width, channels, groups, parts=2)
        inner = group_mask(width, width, groups, "up to").repeat(2, 1)
        first = GatedLayer((channels + 1, channels + 1), width, 7, groups, condition, image, dropout)
        others = (
            GatedLayer((width, width), width, kernel, groups, condition, inner, dropout)
            for _ in range(layers)
        )
        self.layers = nn.ModuleList([first, *others])
        self.head = Head(width, outputs, groups)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        h = with_ones(x)
        v = F.pad(h, (0, 0, 1, 0))[:, :, :-1]  # each row sees the one above
        for layer in self.layers:
            v, h = layer(v, h, condition)
        return self.head(h)


class PlusPlusBlock(nn.Module):
    """A gated residual block of two streams: what comes from the rows above, and what comes from the left.
    The second sees the first, and on the way up both see `skip`, what they were on the way down.
    """

    def __init__(self, width: int, skip: bool, condition: int, dropout: float):
        super().__init__()
        self.down = weight_norm(CausalConv(2 * width, width, 2, 1, 1))
        self.down_out = weight_norm(CausalConv(2 * width, 2 * width, 2, 1, 1))
        self.right = weight_norm(CausalConv(2 * width, width, 2, 1, 0))
        self.right_out = weight_norm(CausalConv(2 * width, 2 * width, 2, 1, 0))
        self.down_skip = weight_norm(pointwise(2 * width, width)) if skip else None
        self.right_skip = weight_norm(pointwise(4 * width if skip else 2 * width, width))
        self.conditions = nn.ModuleList(Condition(condition, 2 * width) for _ in range(2))
        self.dropout = nn.Dropout(dropout)
        with torch.no_grad():  # a block begins near the identity, however many there are
            for convolution in (self.down_out, self.right_out):
                convolution.parametrizations.weight.original0 *= 0.1

    def forward(
        self, v: Tensor, h: Tensor, skip: tuple[Tensor, Tensor] | None, condition: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        inner = self.down(twofold(v))
        if skip is not None and self.down_skip is not None:
            inner = inner + self.down_skip(twofold(skip[0]))
        v = v + glu(self.down_out(self.dropout(twofold(inner))) + self.conditions[0](condition))
        beside = v if skip is None else torch.cat([v, skip[1]], 1)
        inner = self.right(twofold(h)) + self.right_skip(twofold(beside))
        h = h + glu(self.right_out(self.dropout(twofold(inner))) + self.conditions[1](condition))
        return v, h


class PlusPlusLevel(nn.Module):
    """Blocks at one size, on the way down and on the way up, and the level of half the size between them."""

    def __init__(self, width: int, blocks: int, depth: int, condition: int, dropout: float):
        super().__init__()
        self.fall = nn.ModuleList(PlusPlusBlock(width, False, condition, dropout) for _ in range(blocks))
        self.rise = nn.ModuleList(PlusPlusBlock(width, True, condition, dropout) for _ in range(blocks))
        self.inner = PlusPlusLevel(width, blocks, depth - 1, condition, dropout) if depth else None
        if depth:
            self.shrink_down = weight_norm(CausalConv(width, width, 2, 1, 1, stride=2))
            self.shrink_right = weight_norm(CausalConv(width, width, 2, 1, 0, stride=2))
            self.grow_down = weight_norm(pointwise(width, 4 * width))
            self.grow_right = weight_norm(pointwise(width, 4 * width))

    def forward(self, v: Tensor, h: Tensor, condition: Tensor | None) -> tuple[Tensor, Tensor]:
        skips = []
        for block in self.fall:
            v, h = block(v, h, None, condition)
            skips.append((v, h))
        if self.inner is not None:
            v, h = self.inner(self.shrink_down(v), self.shrink_right(h), condition)
            v, h = F.pixel_shuffle(self.grow_down(v), 2), F.pixel_shuffle(self.grow_right(h), 2)
        for block in self.rise:
            v, h = block(v, h, skips.pop(), condition)
        return v, h


class PlusPlusNetwork(nn.Module):
    """Gated residual blocks at several sizes, joined by short cuts; sides are divisible by 2 ** `depth`."""

    def __init__(
        self, channels: int, outputs: int, width: int, blocks: int, depth: int, dropout: float = 0.0,
        condition: int = 0,
    ):  # fmt: skip
        super().__init__()
        image = image_mask(width, channels, 1)
        self.depth = depth
        self.down = weight_norm(CausalConv(channels + 1, width, 2, 1, 1))
        self.beside = weight_norm(CausalConv(channels + 1, width, 1, 1, 1))
        self.right = weight_norm(CausalConv(channels + 1, width, 2, 1, 0, mask=image))
        self.level = PlusPlusLevel(width, blocks, depth, condition, dropout)
        self.head = nn.Sequential(nn.ELU(), weight_norm(pointwise(width, outputs)))

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        image = with_ones(x)
        above = F.pad(image, (0, 0, 1, 0))[:, :, :-1]
        v = self.down(above)
        h = self.right(image) + self.beside(above)
        return self.head(self.level(v, h, condition)[1])
