"""FractalNet: "FractalNet: ultra-deep neural networks without residuals" (Larsson et al. 2016, 1605.07648).

Drop-path draws a new subnetwork for each batch; paths that it drops are computed and multiplied by 0, so
that the network can be compiled and stacked, and their batch statistics still count. Blocks join first and
pool then, as in the paper's figure (its Caffe files pool first). The paper gives 38.6M parameters for depth
21; the layers that it describes, and its authors' generator, have 33.7M.
"""

import torch
from torch import Tensor, nn

from .backbone import Backbone, variant
from .norm import make_norm, resolve_norm

WIDTHS = (64, 128, 256, 512, 512)


def local_mask(inputs: int, drop: float, device: torch.device) -> Tensor:
    """Which inputs of a join are kept, (inputs,) bool: each dropped with probability `drop`, never all."""
    kept = torch.rand(inputs, device=device) >= drop
    spare = torch.rand(inputs, device=device)
    return torch.where(kept.any(), kept, spare == spare.max())


def join(paths: list[Tensor], columns: Tensor | None, drop: float) -> Tensor:
    """Mean of the paths, each (B, C, h, w), or of those that drop-path keeps.

    `columns` (number of columns,) bool are those that global drop-path keeps: all of them where the batch has
    local drop-path. None keeps everything (evaluation). Paths are those of the last columns.
    """
    if columns is None:
        return sum(paths[1:], start=paths[0]) / len(paths)
    here = columns[-len(paths) :]
    kept = torch.where(columns.all(), local_mask(len(paths), drop, columns.device), here)
    # A join that the one kept column does not pass is not seen by it either; it only must not divide by 0.
    share = kept / kept.sum().clamp(min=1)
    return sum((path * s for path, s in zip(paths[1:], share[1:])), start=paths[0] * share[0])


class ConvNorm(nn.Sequential):
    """3x3 convolution, dropout, norm, ReLU."""

    def __init__(self, inputs: int, outputs: int, norm: str, dropout: float):
        super().__init__(
            nn.Conv2d(inputs, outputs, kernel_size=3, padding=1, bias=norm == "none"),
            nn.Dropout(dropout),
            make_norm(norm, outputs),
            nn.ReLU(inplace=True),
        )


class Fractal(nn.Module):
    """f_C: one convolution beside two f_(C-1) in a row.

    (B, inputs, h, w) -> C paths, each (B, outputs, h, w). The first path is the shallow one. Those that
    end at the same place are joined at once.
    """

    def __init__(self, columns: int, inputs: int, outputs: int, norm: str, dropout: float, drop: float):
        super().__init__()
        self.drop = drop
        self.conv = ConvNorm(inputs, outputs, norm, dropout)
        self.first: Fractal | None = None
        self.second: Fractal | None = None
        if columns > 1:
            self.first = Fractal(columns - 1, inputs, outputs, norm, dropout, drop)
            self.second = Fractal(columns - 1, outputs, outputs, norm, dropout, drop)

    def forward(self, x: Tensor, columns: Tensor | None) -> list[Tensor]:
        paths = [self.conv(x)]
        if self.first is not None and self.second is not None:
            middle = join(self.first(x, columns), columns, self.drop)
            paths += self.second(middle, columns)
        return paths


class FractalBlock(nn.Module):
    """A fractal, its join, and 2x2 max pooling: (B, inputs, h, w) -> (B, outputs, h // 2, w // 2)."""

    def __init__(self, columns: int, inputs: int, outputs: int, norm: str, dropout: float, drop: float):
        super().__init__()
        self.drop = drop
        self.fractal = Fractal(columns, inputs, outputs, norm, dropout, drop)
        self.pool = nn.MaxPool2d(2)

    def forward(self, x: Tensor, columns: Tensor | None = None) -> Tensor:
        return self.pool(join(self.fractal(x, columns), columns, self.drop))


class FractalNet(Backbone):
    """FractalNet for CIFAR: 33,724,618 parameters with 3 columns and 10 classes, 76,106,634 with 4.

    Five blocks of 2^(columns - 1) layers in their deepest column. On 32x32, after each block: 16x16x64,
    8x8x128, 4x4x256, 2x2x512, 1x1x512, then one linear layer. Larger maps are averaged.

    In training a batch has, with probability `global_share`, global drop-path (one column, drawn for the
    whole network, is all there is), else local drop-path: each join drops each input with probability
    `drop_path`, but never all. In evaluation a join is the mean of all its inputs.

    `dropout` is the rate in the last block, reached linearly from 0 in the first; it comes after each
    convolution. Raises ValueError for fewer than 1 column and for shares outside their range.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 3,
        norm: str | None = None,
        *,
        columns: int = 3,
        drop_path: float = 0.15,
        global_share: float = 0.5,
        dropout: float = 0.4,
    ):
        super().__init__(num_classes, in_channels)
        if columns < 1:
            raise ValueError(f"columns must be 1 or more, got {columns!r}")
        for argument, value in (("drop_path", drop_path), ("global_share", global_share)):
            if not 0 <= value <= 1:
                raise ValueError(f"{argument} must be between 0 and 1, got {value!r}")
        norm = resolve_norm(norm, "batch")
        self.columns, self.global_share = columns, global_share
        inputs = in_channels
        for i, width in enumerate(WIDTHS, start=1):
            rate = dropout * (i - 1) / (len(WIDTHS) - 1)
            self.add_module(f"block{i}", FractalBlock(columns, inputs, width, norm, rate, drop_path))
            self.stages[f"block{i}"] = [f"block{i}"]
            inputs = width
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(inputs, num_classes)
        self.head = ["avgpool", "flatten", "fc"]
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def draw_columns(self, device: torch.device) -> Tensor:
        """Which columns global drop-path keeps, (columns,) bool: one of them, or all where it is local."""
        scores = torch.rand(self.columns, device=device)
        one = scores == scores.max()
        return one | (torch.rand((), device=device) >= self.global_share)

    def feature_map(self, x: Tensor, stage: str | None = None) -> Tensor:
        columns = self.draw_columns(x.device) if self.training else None
        for path in self.paths(stage):
            x = self.get_submodule(path)(x, columns)
        return x


FRACTALNETS = {
    "fractalnet21_cifar": variant(
        "FractalNet of 3 columns for 32x32 images (1605.07648), 33,724,618 parameters with 10 classes",
        FractalNet,
        columns=3,
    ),
    "fractalnet41_cifar": variant(
        "FractalNet of 4 columns for 32x32 images (1605.07648), 76,106,634 parameters with 10 classes",
        FractalNet,
        columns=4,
    ),
}
