"""DenseNet: "Densely connected convolutional networks" (Huang et al. 2016, 1608.06993).

As torchvision has it, the plain and the BC networks for CIFAR included. Features are concatenated anew in
each layer: memory grows with the square of a block's depth.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .backbone import Backbone, kaiming_init, variant
from .norm import make_norm, resolve_norm


class DenseLayer(nn.Module):
    """x beside `growth` new maps of it: (B, inputs, h, w) -> (B, inputs + growth, h, w).

    norm, ReLU, 3x3 convolution; with `bottleneck`, norm, ReLU and a 1x1 convolution to 4 * growth before
    them.
    """

    def __init__(self, inputs: int, growth: int, bottleneck: bool, norm: str, dropout: float):
        super().__init__()
        self.bottleneck = bottleneck
        inner = 4 * growth if bottleneck else growth
        kernel_size = 1 if bottleneck else 3
        self.norm1 = make_norm(norm, inputs)
        self.relu1 = nn.ReLU()  # not in place: without a norm that would change x
        self.conv1 = nn.Conv2d(inputs, inner, kernel_size, padding=kernel_size // 2, bias=norm == "none")
        if bottleneck:
            self.norm2 = make_norm(norm, inner)
            self.relu2 = nn.ReLU(inplace=True)
            self.conv2 = nn.Conv2d(inner, growth, kernel_size=3, padding=1, bias=norm == "none")
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        new = self.dropout(self.conv1(self.relu1(self.norm1(x))))
        if self.bottleneck:
            new = self.dropout(self.conv2(self.relu2(self.norm2(new))))
        return torch.cat([x, new], dim=1)


class Transition(nn.Module):
    """norm, ReLU, 1x1 convolution, 2x2 average pooling: (B, inputs, h, w) -> (B, outputs, h // 2, w // 2)."""

    def __init__(self, inputs: int, outputs: int, norm: str, dropout: float):
        super().__init__()
        self.norm = make_norm(norm, inputs)
        self.relu = nn.ReLU()
        self.conv = nn.Conv2d(inputs, outputs, kernel_size=1, bias=norm == "none")
        self.dropout = nn.Dropout(dropout)
        self.pool = nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.dropout(self.conv(self.relu(self.norm(x)))))


class DenseNet(Backbone):
    """DenseNet with `depths[i]` layers of `growth` maps in each block.

    For ImageNet, on 224x224 (densenet121): stem 56x56x64, block1 56x56x256, block2 28x28x512, block3
    14x14x1024, block4 7x7x1024; a block's stage begins with the transition before it, and the last one ends
    with norm and ReLU. `cifar` has a 3x3 convolution for a stem; densenet_40_12 on 32x32: 32x32x16,
    32x32x160, 16x16x304, 8x8x448. The last map's average goes to one linear layer.

    BC networks have `bottleneck` and a `compression` below 1: the share of maps that a transition passes on.
    `dropout` is the rate after each convolution but the first (the paper: 0.2 where images are not
    augmented).
    """

    def __init__(
        self,
        num_classes: int = 1000,
        in_channels: int = 3,
        norm: str | None = None,
        *,
        depths: tuple[int, ...],
        growth: int = 32,
        stem: int = 64,
        bottleneck: bool = True,
        compression: float = 0.5,
        cifar: bool = False,
        dropout: float = 0.0,
    ):
        super().__init__(num_classes, in_channels)
        norm = resolve_norm(norm, "batch")
        layers: dict[str, nn.Module] = {}
        if cifar:
            layers["conv0"] = nn.Conv2d(in_channels, stem, kernel_size=3, padding=1, bias=norm == "none")
        else:
            layers["conv0"] = nn.Conv2d(
                in_channels, stem, kernel_size=7, stride=2, padding=3, bias=norm == "none"
            )
            layers["norm0"] = make_norm(norm, stem)
            layers["relu0"] = nn.ReLU(inplace=True)
            layers["pool0"] = nn.MaxPool2d(3, stride=2, padding=1)
        self.stages["stem"] = list(layers)
        maps = stem
        for i, depth in enumerate(depths, start=1):
            names = [f"denseblock{i}"]
            if i > 1:
                names.insert(0, f"transition{i - 1}")
                layers[names[0]] = Transition(maps, int(maps * compression), norm, dropout)
                maps = int(maps * compression)
            layers[f"denseblock{i}"] = block = nn.Sequential()
            for j in range(1, depth + 1):
                block.add_module(f"denselayer{j}", DenseLayer(maps, growth, bottleneck, norm, dropout))
                maps += growth
            self.stages[f"block{i}"] = names
        last = len(depths) + 1
        layers[f"norm{last}"] = make_norm(norm, maps)
        layers[f"relu{last}"] = nn.ReLU()
        self.stages[f"block{len(depths)}"] += [f"norm{last}", f"relu{last}"]
        self.features = nn.Sequential()
        for name, layer in layers.items():
            self.features.add_module(name, layer)
        self.stages = {stage: [f"features.{name}" for name in names] for stage, names in self.stages.items()}
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.classifier = nn.Linear(maps, num_classes)
        self.head = ["avgpool", "flatten", "classifier"]
        kaiming_init(self, mode="fan_in")
        nn.init.zeros_(self.classifier.bias)


def _cifar(summary: str, depth: int, growth: int, bc: bool = False) -> Callable[..., Backbone]:
    """Three blocks; BC: two convolutions a layer, transitions that halve, a stem of twice the growth."""
    layers = (depth - 4) // (6 if bc else 3)
    return variant(
        summary,
        DenseNet,
        depths=(layers,) * 3,
        growth=growth,
        stem=2 * growth if bc else 16,
        bottleneck=bc,
        compression=0.5 if bc else 1.0,
        cifar=True,
    )


DENSENETS = {
    "densenet121": variant(
        "DenseNet-121 (1608.06993), 7,978,856 parameters", DenseNet, depths=(6, 12, 24, 16)
    ),
    "densenet161": variant(
        "DenseNet-161 (1608.06993), 28,681,000 parameters",
        DenseNet,
        depths=(6, 12, 36, 24),
        growth=48,
        stem=96,
    ),
    "densenet169": variant(
        "DenseNet-169 (1608.06993), 14,149,480 parameters", DenseNet, depths=(6, 12, 32, 32)
    ),
    "densenet201": variant(
        "DenseNet-201 (1608.06993), 20,013,928 parameters", DenseNet, depths=(6, 12, 48, 32)
    ),
    "densenet_40_12": _cifar(
        "DenseNet-40-12 for 32x32 images (1608.06993), 1,019,722 parameters with 10 classes", 40, 12
    ),
    "densenet_100_12": _cifar(
        "DenseNet-100-12 for 32x32 images (1608.06993), 6,979,642 parameters with 10 classes", 100, 12
    ),
    "densenet_bc_100_12": _cifar(
        "DenseNet-BC-100-12 for 32x32 images (1608.06993), 769,162 parameters with 10 classes",
        100,
        12,
        bc=True,
    ),
    "densenet_bc_190_40": _cifar(
        "DenseNet-BC-190-40 for 32x32 images (1608.06993), 25,624,430 parameters with 10 classes",
        190,
        40,
        bc=True,
    ),
    "densenet_bc_250_24": _cifar(
        "DenseNet-BC-250-24 for 32x32 images (1608.06993), 15,324,406 parameters with 10 classes",
        250,
        24,
        bc=True,
    ),
}
