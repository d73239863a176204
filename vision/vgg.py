"""VGG: "Very deep convolutional networks for large-scale image recognition" (Simonyan and Zisserman 2014,
1409.1556).

Where we differ from the paper: Kaiming's initial weights, as torchvision has them; the paper trains the
small ones first and starts the large ones from their weights.
"""

from torch import nn

from .backbone import AveragePoolTo, Backbone, kaiming_init, variant
from .norm import make_norm, resolve_norm

WIDTHS = (64, 128, 256, 512, 512)


class VGG(Backbone):
    """VGG with `depths` 3x3 convolutions in each of its five blocks.

    VGG-11 132,863,336 parameters, VGG-13 133,047,848, VGG-16 138,357,544, VGG-19 143,667,240. Each block
    ends with 2x2 max pooling; on 224x224: 112x112x64, 56x56x128, 28x28x256, 14x14x512, 7x7x512, then 4096,
    4096 and the classes. Other sizes are averaged to 7x7.

    state_dict as torchvision's vgg*, and its vgg*_bn with `norm` batch or frozen, which keep their
    convolutions' biases. `dropout` is the rate after the first two linear layers.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        in_channels: int = 3,
        norm: str | None = None,
        *,
        depths: tuple[int, ...],
        dropout: float = 0.5,
    ):
        super().__init__(num_classes, in_channels)
        norm = resolve_norm(norm, "none")
        self.features = nn.Sequential()
        inputs = in_channels
        for i, (depth, width) in enumerate(zip(depths, WIDTHS), start=1):
            start = len(self.features)
            for _ in range(depth):
                self.features.append(nn.Conv2d(inputs, width, kernel_size=3, padding=1))
                if norm != "none":
                    self.features.append(make_norm(norm, width))
                self.features.append(nn.ReLU(inplace=True))
                inputs = width
            self.features.append(nn.MaxPool2d(2))
            self.stages[f"block{i}"] = [f"features.{j}" for j in range(start, len(self.features))]
        self.avgpool = AveragePoolTo(7)
        self.flatten = nn.Flatten()
        self.classifier = nn.Sequential(
            nn.Linear(512 * 7 * 7, 4096),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(4096, 4096),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(4096, num_classes),
        )
        self.head = ["avgpool", "flatten", "classifier"]
        kaiming_init(self, linear_std=0.01)


VGGS = {
    "vgg11": variant("VGG-11 (1409.1556), 132,863,336 parameters", VGG, depths=(1, 1, 2, 2, 2)),
    "vgg13": variant("VGG-13 (1409.1556), 133,047,848 parameters", VGG, depths=(2, 2, 2, 2, 2)),
    "vgg16": variant("VGG-16 (1409.1556), 138,357,544 parameters", VGG, depths=(2, 2, 3, 3, 3)),
    "vgg19": variant("VGG-19 (1409.1556), 143,667,240 parameters", VGG, depths=(2, 2, 4, 4, 4)),
}
