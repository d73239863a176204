"""SqueezeNet: "SqueezeNet: AlexNet-level accuracy with 50x fewer parameters and <0.5MB model size"
(Iandola et al. 2016, 1602.07360), 1.0 of the paper and the authors' 1.1, as torchvision has them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .backbone import Backbone, variant
from .norm import make_norm, resolve_norm


class Fire(nn.Module):
    """1x1 convolution to `squeeze` maps, then 1x1 and 3x3 side by side, each to `expand`.

    (B, inputs, h, w) -> (B, 2 * expand, h, w).
    """

    def __init__(self, inputs: int, squeeze: int, expand: int, norm: str):
        super().__init__()
        bias = norm == "none"
        self.squeeze = nn.Conv2d(inputs, squeeze, kernel_size=1, bias=bias)
        self.squeeze_norm = make_norm(norm, squeeze)
        self.expand1x1 = nn.Conv2d(squeeze, expand, kernel_size=1, bias=bias)
        self.expand1x1_norm = make_norm(norm, expand)
        self.expand3x3 = nn.Conv2d(squeeze, expand, kernel_size=3, padding=1, bias=bias)
        self.expand3x3_norm = make_norm(norm, expand)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.squeeze_norm(self.squeeze(x)), inplace=True)
        one = self.expand1x1_norm(self.expand1x1(x))
        three = self.expand3x3_norm(self.expand3x3(x))
        return F.relu(torch.cat([one, three], dim=1), inplace=True)


FIRES = ((16, 64), (16, 64), (32, 128), (32, 128), (48, 192), (48, 192), (64, 256), (64, 256))
"""Squeeze and expand widths of fire2 to fire9."""


class SqueezeNet(Backbone):
    """SqueezeNet: 1,248,424 parameters for 1.0, 1,235,496 for 1.1.

    `stem` is (kernel size, filters) of the first convolution, at stride 2; a stage begins with the 3x3 max
    pooling before it, and `splits` are the numbers of fire modules in each. On 224x224, 1.0: stem
    109x109x96, block1 54x54x256, block2 27x27x512, block3 13x13x512; 1.1: 111x111x64, 55x55x128, 27x27x256,
    13x13x512. The last 1x1 convolution has a map a class, and behind a ReLU its averages are the logits:
    never below 0.

    state_dict as torchvision's squeezenet*. `norm` comes after each convolution but the last; its own is
    `none`. `dropout` is the rate before the last convolution.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        in_channels: int = 3,
        norm: str | None = None,
        *,
        stem: tuple[int, int] = (7, 96),
        splits: tuple[int, int, int] = (3, 4, 1),
        dropout: float = 0.5,
    ):
        super().__init__(num_classes, in_channels)
        norm = resolve_norm(norm, "none")
        kernel_size, inputs = stem
        # Norm and ReLU share a place, because torchvision's names count the layers.
        self.features = nn.Sequential(
            nn.Conv2d(in_channels, inputs, kernel_size, stride=2, bias=norm == "none"),
            nn.Sequential(make_norm(norm, inputs), nn.ReLU(inplace=True)),
        )
        self.stages["stem"] = ["features.0", "features.1"]
        fires = iter(FIRES)
        for i, count in enumerate(splits, start=1):
            start = len(self.features)
            self.features.append(nn.MaxPool2d(3, stride=2, ceil_mode=True))
            for _ in range(count):
                squeeze, expand = next(fires)
                self.features.append(Fire(inputs, squeeze, expand, norm))
                inputs = 2 * expand
            self.stages[f"block{i}"] = [f"features.{j}" for j in range(start, len(self.features))]
        last = nn.Conv2d(inputs, num_classes, kernel_size=1)
        self.classifier = nn.Sequential(
            nn.Dropout(dropout), last, nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )
        self.head = ["classifier"]
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                if module is last:
                    nn.init.normal_(module.weight, std=0.01)
                else:
                    nn.init.kaiming_uniform_(module.weight, nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)


SQUEEZENETS = {
    "squeezenet1_0": variant("SqueezeNet 1.0 (1602.07360), 1,248,424 parameters", SqueezeNet),
    "squeezenet1_1": variant(
        "SqueezeNet 1.1 (1602.07360), 1,235,496 parameters", SqueezeNet, stem=(3, 64), splits=(2, 2, 4)
    ),
}
