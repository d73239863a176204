"""Network in Network (Lin et al. 2013, 1312.4400).

The layers' sizes are those of the authors' Caffe files, which the paper does not give. Where we differ:
Kaiming's initial weights, and no ReLU behind the last convolution, with which many classes start at 0 for
every image and get no gradient.
"""

from typing import Any, NamedTuple

from torch import nn

from .backbone import Backbone, kaiming_init, variant
from .norm import make_norm, resolve_norm


class Mlpconv(NamedTuple):
    """One block: a convolution, 1x1 convolutions behind it, each with ReLU, and what ends the block."""

    widths: tuple[int, ...]
    kernel_size: int
    stride: int = 1
    padding: int = 0
    pool: type[nn.MaxPool2d] | type[nn.AvgPool2d] | None = None
    """Pooling 3x3 at stride 2, rounded up."""
    dropout: bool = False


CIFAR = (
    Mlpconv((192, 160, 96), 5, padding=2, pool=nn.MaxPool2d, dropout=True),
    Mlpconv((192, 192, 192), 5, padding=2, pool=nn.AvgPool2d, dropout=True),
    Mlpconv((192, 192), 3, padding=1),
)
IMAGENET = (
    Mlpconv((96, 96, 96), 11, stride=4, pool=nn.MaxPool2d),
    Mlpconv((256, 256, 256), 5, padding=2, pool=nn.MaxPool2d),
    Mlpconv((384, 384, 384), 3, padding=1, pool=nn.MaxPool2d, dropout=True),
    Mlpconv((1024, 1024), 3, padding=1),
)


class NiN(Backbone):
    """Network in Network: 966,986 parameters for CIFAR with 10 classes, 7,595,176 for ImageNet.

    On 32x32, after each block: 16x16x96, 8x8x192, 8x8x192. The one for ImageNet, on 224x224: 27x27x96,
    13x13x256, 6x6x384, 6x6x1024. There are no linear layers: the last 1x1 convolution has a map a class,
    whose averages are the logits.

    `norm` comes after each convolution but the last; its own is `none`. `dropout` is the rate behind blocks.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 3,
        norm: str | None = None,
        *,
        blocks: tuple[Mlpconv, ...] = CIFAR,
        dropout: float = 0.5,
    ):
        super().__init__(num_classes, in_channels)
        norm = resolve_norm(norm, "none")
        inputs = in_channels
        for i, block in enumerate(blocks, start=1):
            layers: list[nn.Module] = []
            first: dict[str, Any] = {
                "kernel_size": block.kernel_size,
                "stride": block.stride,
                "padding": block.padding,
            }
            for j, width in enumerate(block.widths):
                settings = {"kernel_size": 1} if j else first
                conv = nn.Conv2d(inputs, width, bias=norm == "none", **settings)
                layers += [conv, make_norm(norm, width), nn.ReLU(inplace=True)]
                inputs = width
            if block.pool is not None:
                layers.append(block.pool(3, stride=2, ceil_mode=True))
            if block.dropout:
                layers.append(nn.Dropout(dropout))
            self.add_module(f"block{i}", nn.Sequential(*layers))
            self.stages[f"block{i}"] = [f"block{i}"]
        self.classifier = nn.Sequential(
            nn.Conv2d(inputs, num_classes, kernel_size=1),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.head = ["classifier"]
        kaiming_init(self, mode="fan_in")


NINS = {
    "nin": variant(
        "Network in Network for 32x32 images (1312.4400), 966,986 parameters with 10 classes",
        NiN,
        blocks=CIFAR,
    ),
    "nin_imagenet": variant("Network in Network (1312.4400), 7,595,176 parameters", NiN, blocks=IMAGENET),
}
