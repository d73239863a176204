"""AlexNet: "ImageNet classification with deep convolutional neural networks" (Krizhevsky et al. 2012).
ZFNet: "Visualizing and understanding convolutional networks" (Zeiler and Fergus 2013, 1311.2901).

Where we differ from the papers: convolutions start with Kaiming's weights and biases of 0. The papers' N(0,
0.01^2) and biases of 1 are made for pixels between -128 and 127, and hardly pass on images between 0 and 1.
"""

from typing import Any

from torch import nn

from .backbone import AveragePoolTo, Backbone, kaiming_init, variant
from .norm import make_norm, resolve_norm


class AlexNet(Backbone):
    """AlexNet: 60,965,224 parameters with `groups` 2 as in the paper, 62,378,344 with 1; ZFNet: 62,357,608.

    On 227x227: conv1 55x55x96 (34,944 parameters), conv2 27x27x256, conv3 and conv4 13x13x384, conv5
    13x13x256, pool5 6x6x256, then 4096, 4096 and the classes. On 224x224, ZFNet has 110x110x96, 26x26x256
    and the same 13x13 and 6x6. Other sizes are averaged to 6x6. Pooling is 3x3 at stride 2, rounded up.

    The paper's two GPUs are groups: conv2, conv4 and conv5 see only the maps of their own half. `norm` None
    is the local response normalisation after the first two ReLUs; all other kinds stand between each
    convolution and its ReLU. `dropout` is the rate after fc6 and fc7.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        in_channels: int = 3,
        norm: str | None = None,
        *,
        groups: int = 2,
        conv1: dict[str, Any] | None = None,
        conv2: dict[str, Any] | None = None,
        dropout: float = 0.5,
    ):
        super().__init__(num_classes, in_channels)
        plan: list[tuple[int, dict[str, Any]]] = [
            (96, conv1 or {"kernel_size": 11, "stride": 4}),
            (256, {"groups": groups, **(conv2 or {"kernel_size": 5, "padding": 2})}),
            (384, {"kernel_size": 3, "padding": 1}),
            (384, {"kernel_size": 3, "padding": 1, "groups": groups}),
            (256, {"kernel_size": 3, "padding": 1, "groups": groups}),
        ]
        kind = resolve_norm(norm, "none")
        inputs = in_channels
        for i, (outputs, settings) in enumerate(plan, start=1):
            conv = nn.Conv2d(inputs, outputs, bias=kind == "none", **settings)
            layers = {"conv": conv, "norm": make_norm(kind, outputs), "relu": nn.ReLU(inplace=True)}
            if i in (2, 3):
                layers = {"pool": nn.MaxPool2d(3, stride=2, ceil_mode=True), **layers}
            if norm is None and i in (1, 2):
                # The paper's k + alpha * sum with alpha 1e-4: PyTorch takes the mean over the 5 instead.
                layers["lrn"] = nn.LocalResponseNorm(5, alpha=5e-4, beta=0.75, k=2.0)
            for name, layer in layers.items():
                self.add_module(f"{name}{i}", layer)
            self.stages[f"conv{i}"] = [f"{name}{i}" for name in layers]
            inputs = outputs
        self.pool5 = nn.MaxPool2d(3, stride=2, ceil_mode=True)
        self.stages["pool5"] = ["pool5"]
        self.avgpool = AveragePoolTo(6)
        self.flatten = nn.Flatten()
        self.fc6 = nn.Linear(256 * 6 * 6, 4096)
        self.relu6 = nn.ReLU(inplace=True)
        self.dropout6 = nn.Dropout(dropout)
        self.fc7 = nn.Linear(4096, 4096)
        self.relu7 = nn.ReLU(inplace=True)
        self.dropout7 = nn.Dropout(dropout)
        self.fc8 = nn.Linear(4096, num_classes)
        self.head = ["avgpool", "flatten", "fc6", "relu6", "dropout6", "fc7", "relu7", "dropout7", "fc8"]
        kaiming_init(self, mode="fan_in", linear_std=0.01)


ALEXNETS = {
    "alexnet": variant("AlexNet in two groups (Krizhevsky et al. 2012), 60,965,224 parameters", AlexNet),
    "alexnet_ungrouped": variant(
        "AlexNet without groups (Krizhevsky et al. 2012), 62,378,344 parameters", AlexNet, groups=1
    ),
    "zfnet": variant(
        "ZFNet (1311.2901), 62,357,608 parameters",
        AlexNet,
        groups=1,
        conv1={"kernel_size": 7, "stride": 2, "padding": 1},
        conv2={"kernel_size": 5, "stride": 2},
    ),
}
