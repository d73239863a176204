"""GoogLeNet: "Going deeper with convolutions" (Szegedy et al. 2014, 1409.4842).

Where we differ from the paper: batch normalisation (1502.03167) after each convolution instead of two local
response normalisations; the auxiliary heads average their map to 4x4 instead of pooling 5x5 at stride 3,
which at 14x14 gives 4x4 too but takes other sizes; Kaiming's initial weights. torchvision's googlenet has
the same names, but 3x3 convolutions where the paper has 5x5, so that its files do not fit.
"""

from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .backbone import Backbone, kaiming_init, variant
from .norm import make_norm, resolve_norm


class ConvNorm(nn.Module):
    """Convolution that keeps the size (at stride 1), norm, ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel_size: int, norm: str, stride: int = 1):
        super().__init__()
        padding = kernel_size // 2
        self.conv = nn.Conv2d(inputs, outputs, kernel_size, stride, padding, bias=norm == "none")
        self.bn = make_norm(norm, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


class Inception(nn.Module):
    """1x1, 3x3 and 5x5 convolutions and 3x3 max pooling side by side: (B, inputs, h, w) -> (B, sum, h, w).

    Widths are in the order of the paper's table 1: 1x1; 3x3 reduce, 3x3; 5x5 reduce, 5x5; pool projection.
    """

    def __init__(self, inputs: int, widths: tuple[int, int, int, int, int, int], norm: str):
        super().__init__()
        one, reduce3, three, reduce5, five, pool = widths
        self.branch1 = ConvNorm(inputs, one, 1, norm)
        self.branch2 = nn.Sequential(
            ConvNorm(inputs, reduce3, 1, norm),
            ConvNorm(reduce3, three, 3, norm),
        )
        self.branch3 = nn.Sequential(
            ConvNorm(inputs, reduce5, 1, norm),
            ConvNorm(reduce5, five, 5, norm),
        )
        self.branch4 = nn.Sequential(
            nn.MaxPool2d(3, stride=1, padding=1),
            ConvNorm(inputs, pool, 1, norm),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.branch1(x), self.branch2(x), self.branch3(x), self.branch4(x)], dim=1)


class AuxiliaryHead(nn.Module):
    """(B, inputs, h, w) -> logits (B, num_classes)."""

    def __init__(self, inputs: int, num_classes: int, norm: str, dropout: float):
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(4)
        self.conv = ConvNorm(inputs, 128, 1, norm)
        self.fc1 = nn.Linear(128 * 4 * 4, 1024)
        self.dropout = nn.Dropout(dropout)
        self.fc2 = nn.Linear(1024, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(self.pool(x)).flatten(1)
        return self.fc2(self.dropout(F.relu(self.fc1(x), inplace=True)))


INCEPTIONS: dict[str, tuple[int, int, int, int, int, int]] = {
    "inception3a": (64, 96, 128, 16, 32, 32),
    "inception3b": (128, 128, 192, 32, 96, 64),
    "inception4a": (192, 96, 208, 16, 48, 64),
    "inception4b": (160, 112, 224, 24, 64, 64),
    "inception4c": (128, 128, 256, 24, 64, 64),
    "inception4d": (112, 144, 288, 32, 64, 64),
    "inception4e": (256, 160, 320, 32, 128, 128),
    "inception5a": (256, 160, 320, 32, 128, 128),
    "inception5b": (384, 192, 384, 48, 128, 128),
}


class GoogLeNet(Backbone):
    """GoogLeNet: 7,005,832 parameters without its auxiliary heads, 13,385,816 with them.

    The first number is that of batch normalisation, the `norm` of its own, with convolutions free of bias;
    with `norm` none and biases it is 6,998,552. On 224x224: stem 28x28x192, inception3b 28x28x480,
    inception4a 14x14x512, inception4d 14x14x528, inception4e 14x14x832, inception5b 7x7x1024, then the
    average of each map.

    `auxiliary` adds the two heads behind inception4a and 4d, which `forward_train` gives. `dropout` is the
    rate before the last linear layer, and `auxiliary_dropout` that of the heads.
    """

    auxiliary_weight = 0.3

    def __init__(
        self,
        num_classes: int = 1000,
        in_channels: int = 3,
        norm: str | None = None,
        *,
        auxiliary: bool = True,
        dropout: float = 0.4,
        auxiliary_dropout: float = 0.7,
    ):
        super().__init__(num_classes, in_channels)
        norm = resolve_norm(norm, "batch")
        self.conv1 = ConvNorm(in_channels, 64, 7, norm, stride=2)
        self.maxpool1 = nn.MaxPool2d(3, stride=2, ceil_mode=True)
        self.conv2 = ConvNorm(64, 64, 1, norm)
        self.conv3 = ConvNorm(64, 192, 3, norm)
        self.maxpool2 = nn.MaxPool2d(3, stride=2, ceil_mode=True)
        self.stages["stem"] = ["conv1", "maxpool1", "conv2", "conv3", "maxpool2"]
        self.maxpool3 = nn.MaxPool2d(3, stride=2, ceil_mode=True)
        self.maxpool4 = nn.MaxPool2d(3, stride=2, ceil_mode=True)
        pools = {"inception4a": ["maxpool3"], "inception5a": ["maxpool4"]}
        inputs = 192
        maps = {}
        for name, widths in INCEPTIONS.items():
            self.add_module(name, Inception(inputs, widths, norm))
            self.stages[name] = [*pools.get(name, []), name]
            one, _, three, _, five, pool = widths
            maps[name] = inputs = one + three + five + pool
        self.aux: dict[str, str] = {"inception4a": "aux1", "inception4d": "aux2"} if auxiliary else {}
        for stage, name in self.aux.items():
            self.add_module(name, AuxiliaryHead(maps[stage], num_classes, norm, auxiliary_dropout))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(inputs, num_classes)
        self.head = ["avgpool", "flatten", "dropout", "fc"]
        kaiming_init(self)

    def forward_train(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """(B, in_channels, H, W) -> logits, and those of the heads behind inception4a and inception4d."""
        auxiliary = []
        after = None
        for stage, name in self.aux.items():
            x = self.apply_paths(self.paths(stage, after), x)
            auxiliary.append(self.get_submodule(name)(x))
            after = stage
        return self.classify(self.apply_paths(self.paths(after=after), x)), auxiliary

    def cut(self, stage: str) -> Self:
        super().cut(stage)
        self.aux = {}
        return self


GOOGLENETS = {
    "googlenet": variant(
        "GoogLeNet (1409.4842), 7,005,832 parameters without its auxiliary heads", GoogLeNet
    ),
}
