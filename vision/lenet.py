"""LeNet-5: "Gradient-based learning applied to document recognition" (LeCun et al. 1998).

Where we differ from the paper, as most do today: ReLU instead of the scaled tanh, max pooling instead of
trainable subsampling, every map of the second convolution sees all maps of the first, and a linear layer
gives the logits.
"""

from torch import nn

from .backbone import AveragePoolTo, Backbone, kaiming_init, variant
from .norm import make_norm, resolve_norm


class LeNet5(Backbone):
    """LeNet-5: 61,706 parameters with 10 classes and 1 channel.

    On 28x28: conv1 28x28x6, pooled 14x14x6, conv2 10x10x16, pooled 5x5x16, then 120, 84 and the classes.
    Other sizes are averaged to 5x5. `norm` comes after each convolution; its own is `none`.
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 1, norm: str | None = None):
        super().__init__(num_classes, in_channels)
        norm = resolve_norm(norm, "none")
        # The largest of four, then ReLU: the same as ReLU, then the largest, on a quarter of the numbers.
        self.conv1 = nn.Conv2d(in_channels, 6, kernel_size=5, padding=2, bias=norm == "none")
        self.norm1 = make_norm(norm, 6)
        self.pool1 = nn.MaxPool2d(2)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(6, 16, kernel_size=5, bias=norm == "none")
        self.norm2 = make_norm(norm, 16)
        self.pool2 = nn.MaxPool2d(2)
        self.relu2 = nn.ReLU(inplace=True)
        self.avgpool = AveragePoolTo(5)
        self.classifier = nn.Sequential(
            nn.Flatten(),
            nn.Linear(16 * 5 * 5, 120),
            nn.ReLU(inplace=True),
            nn.Linear(120, 84),
            nn.ReLU(inplace=True),
            nn.Linear(84, num_classes),
        )
        self.stages = {
            "conv1": ["conv1", "norm1", "pool1", "relu1"],
            "conv2": ["conv2", "norm2", "pool2", "relu2"],
        }
        self.head = ["avgpool", "classifier"]
        kaiming_init(self, mode="fan_in")


LENETS = {
    "lenet5": variant("LeNet-5 (LeCun et al. 1998), 61,706 parameters with 10 classes and 1 channel", LeNet5),
}
