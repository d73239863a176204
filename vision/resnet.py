"""Residual networks.

- ResNet: "Deep residual learning for image recognition" (He et al. 2015, 1512.03385), the bottleneck's
  stride in its 3x3 convolution as in torchvision; for CIFAR with shortcuts of kind A, zero-padded identities.
- Pre-activation ResNet: "Identity mappings in deep residual networks" (He et al. 2016, 1603.05027).
- Stochastic depth: "Deep networks with stochastic depth" (Huang et al. 2016, 1603.09382). A dropped block's
  branch is computed and multiplied by 0, so that the network can be compiled and stacked; its batch
  statistics still count.
- Wide ResNet: "Wide residual networks" (Zagoruyko and Komodakis 2016, 1605.07146).
- ResNeXt: "Aggregated residual transformations for deep neural networks" (Xie et al. 2016, 1611.05431).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .backbone import Backbone, kaiming_init, variant
from .norm import make_norm, resolve_norm


def _conv(inputs: int, outputs: int, kernel_size: int, stride: int, norm: str, groups: int = 1) -> nn.Conv2d:
    padding = kernel_size // 2
    return nn.Conv2d(inputs, outputs, kernel_size, stride, padding, groups=groups, bias=norm == "none")


class StochasticDepth(nn.Module):
    """Keeps the whole batch's branch with probability `survival`; in evaluation, scales it by that."""

    def __init__(self, survival: float):
        super().__init__()
        self.survival = survival

    def forward(self, branch: Tensor) -> Tensor:
        if not self.training:
            return branch * self.survival
        return branch * (torch.rand((), device=branch.device) < self.survival)


class PadShortcut(nn.Module):
    """Shortcut of kind A: every `stride`-th pixel, channels filled up with zeros to `outputs`."""

    def __init__(self, outputs: int, stride: int):
        super().__init__()
        self.outputs, self.stride = outputs, stride

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, 0, self.outputs - x.shape[1]))


def _shortcut(inputs: int, outputs: int, stride: int, norm: str, pad: bool) -> nn.Module:
    if stride == 1 and inputs == outputs:
        return nn.Identity()
    if pad:
        return PadShortcut(outputs, stride)
    return nn.Sequential(_conv(inputs, outputs, 1, stride, norm), make_norm(norm, outputs))


class BasicBlock(nn.Module):
    """relu(x + norm(conv(relu(norm(conv(x)))))), both 3x3: (B, inputs, h, w) -> (B, planes, h', w')."""

    expansion = 1
    """Output channels per plane."""
    pre_activation = False

    def __init__(
        self, inputs: int, planes: int, stride: int, norm: str, survival: float = 1.0, pad: bool = False
    ):
        super().__init__()
        self.conv1 = _conv(inputs, planes, 3, stride, norm)
        self.bn1 = make_norm(norm, planes)
        self.conv2 = _conv(planes, planes, 3, 1, norm)
        self.bn2 = make_norm(norm, planes)
        self.downsample = _shortcut(inputs, planes, stride, norm, pad)
        self.depth = StochasticDepth(survival) if survival < 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out))
        return F.relu(self.downsample(x) + self.depth(out), inplace=True)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions: (B, inputs, h, w) -> (B, 4 * planes, h / stride, w / stride).

    The 3x3 one has `groups` groups, each `width` channels wide where there are 64 planes, and as much wider
    as there are more.
    """

    expansion = 4
    pre_activation = False

    def __init__(
        self,
        inputs: int,
        planes: int,
        stride: int,
        norm: str,
        survival: float = 1.0,
        groups: int = 1,
        width: int = 64,
    ):
        super().__init__()
        inner, outputs = planes * width // 64 * groups, planes * self.expansion
        self.conv1 = _conv(inputs, inner, 1, 1, norm)
        self.bn1 = make_norm(norm, inner)
        self.conv2 = _conv(inner, inner, 3, stride, norm, groups)
        self.bn2 = make_norm(norm, inner)
        self.conv3 = _conv(inner, outputs, 1, 1, norm)
        self.bn3 = make_norm(norm, outputs)
        self.downsample = _shortcut(inputs, outputs, stride, norm, pad=False)
        self.depth = StochasticDepth(survival) if survival < 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = F.relu(self.bn2(self.conv2(out)), inplace=True)
        out = self.bn3(self.conv3(out))
        return F.relu(self.downsample(x) + self.depth(out), inplace=True)


class PreActivationBlock(nn.Module):
    """x + conv(relu(norm(conv(relu(norm(x)))))), both 3x3: (B, inputs, h, w) -> (B, planes, h / stride, ...).

    Where size or channels change, the shortcut is a 1x1 convolution of the first activation. `dropout` is the
    rate before the last convolution.
    """

    expansion = 1
    pre_activation = True

    def __init__(
        self, inputs: int, planes: int, stride: int, norm: str, survival: float = 1.0, dropout: float = 0.0
    ):
        super().__init__()
        outputs = planes * self.expansion
        self.bn1 = make_norm(norm, inputs)
        self.relu = nn.ReLU()  # not in place: without a norm that would change x
        self.branch = self.convolutions(inputs, planes, stride, norm, nn.Dropout(dropout))
        same = stride == 1 and inputs == outputs
        self.downsample = None if same else _conv(inputs, outputs, 1, stride, norm)
        self.depth = StochasticDepth(survival) if survival < 1 else nn.Identity()

    def convolutions(
        self, inputs: int, planes: int, stride: int, norm: str, dropout: nn.Module
    ) -> nn.Sequential:
        """All behind the first activation: (B, inputs, h, w) -> (B, expansion * planes, h / stride, ...)."""
        return nn.Sequential(
            _conv(inputs, planes, 3, stride, norm),
            make_norm(norm, planes),
            nn.ReLU(inplace=True),
            dropout,
            _conv(planes, planes, 3, 1, norm),
        )

    def forward(self, x: Tensor) -> Tensor:
        activated = self.relu(self.bn1(x))
        shortcut = x if self.downsample is None else self.downsample(activated)
        return shortcut + self.depth(self.branch(activated))


class PreActivationBottleneck(PreActivationBlock):
    """The same with 1x1, 3x3 and 1x1 convolutions: (B, inputs, h, w) -> (B, 4 * planes, h / stride, ...)."""

    expansion = 4

    def convolutions(
        self, inputs: int, planes: int, stride: int, norm: str, dropout: nn.Module
    ) -> nn.Sequential:
        return nn.Sequential(
            _conv(inputs, planes, 1, 1, norm),
            make_norm(norm, planes),
            nn.ReLU(inplace=True),
            _conv(planes, planes, 3, stride, norm),
            make_norm(norm, planes),
            nn.ReLU(inplace=True),
            dropout,
            _conv(planes, planes * self.expansion, 1, 1, norm),
        )


class ResNet(Backbone):
    """Residual network: a stem, and one layer of `depths[i]` blocks of `widths[i]` planes a resolution.

    For ImageNet, on 224x224: stem 56x56x64, layer1 56x56, layer2 28x28, layer3 14x14, layer4 7x7, with 64,
    128, 256 and 512 channels (basic blocks) or four times as many (bottlenecks). `cifar` has a 3x3
    convolution for a stem, without pooling; on 32x32: stem and layer1 32x32, layer2 16x16, layer3 8x8. The
    last map's average goes to one linear layer.

    Pre-activation networks normalise in the stem what their first block would, as the paper has it (both of
    its paths see the activation), and once more behind the last block; maps of stages before it are sums
    that no ReLU has seen.

    `survival` is the probability p_L of keeping the last block's branch; it falls to it linearly from 1 at
    the input, p_l = 1 - l / L (1 - p_L). Further settings go to the blocks. state_dict as torchvision's
    resnet*, resnext* and wide_resnet*.

    Raises ValueError for a survival that is not above 0 and at most 1.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        in_channels: int = 3,
        norm: str | None = None,
        *,
        block: type[BasicBlock] | type[Bottleneck] | type[PreActivationBlock],
        depths: tuple[int, ...],
        widths: tuple[int, ...] = (64, 128, 256, 512),
        stem: int = 64,
        cifar: bool = False,
        survival: float = 1.0,
        **settings: Any,
    ):
        super().__init__(num_classes, in_channels)
        if not 0 < survival <= 1:
            raise ValueError(f"survival must be greater than 0 and at most 1, got {survival!r}")
        norm = resolve_norm(norm, "batch")
        self.conv1 = _conv(in_channels, stem, 3, 1, norm) if cifar else _conv(in_channels, stem, 7, 2, norm)
        self.bn1 = make_norm(norm, stem)
        self.relu = nn.ReLU(inplace=True)
        self.stages["stem"] = ["conv1", "bn1", "relu"]
        if not cifar:
            self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
            self.stages["stem"].append("maxpool")
        inputs, made, total = stem, 0, sum(depths)
        for i, (depth, planes) in enumerate(zip(depths, widths), start=1):
            layer = nn.Sequential()
            for j in range(depth):
                made += 1
                stride = 2 if i > 1 and j == 0 else 1
                kept = 1 - made / total * (1 - survival)
                layer.append(block(inputs, planes, stride, norm, kept, **settings))
                inputs = planes * block.expansion
            if block.pre_activation and i == 1:
                layer[0].bn1 = nn.Identity()  # the stem's bn1 is its own; ReLU twice is ReLU
            self.add_module(f"layer{i}", layer)
            self.stages[f"layer{i}"] = [f"layer{i}"]
        if block.pre_activation:
            self.bn_last = make_norm(norm, inputs)
            self.relu_last = nn.ReLU()
            self.stages[f"layer{len(depths)}"] += ["bn_last", "relu_last"]
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(inputs, num_classes)
        self.head = ["avgpool", "flatten", "fc"]
        kaiming_init(self)


def _cifar(widths: tuple[int, ...] = (16, 32, 64), **settings: Any) -> dict[str, Any]:
    return {"cifar": True, "stem": 16, "widths": widths, **settings}


def _option_a(depth: int, **settings: Any) -> dict[str, Any]:
    """ResNet-`depth` for CIFAR: 6n + 2 layers, identities padded with zeros."""
    return _cifar(block=BasicBlock, depths=((depth - 2) // 6,) * 3, pad=True, **settings)


def _wide(depth: int, factor: int) -> dict[str, Any]:
    """WRN-`depth`-`factor`: 6n + 4 layers. `dropout` is 0, or 0.3 in the paper's other rows."""
    widths = (16 * factor, 32 * factor, 64 * factor)
    return _cifar(widths, block=PreActivationBlock, depths=((depth - 4) // 6,) * 3)


RESNETS = {
    "resnet18": variant(
        "ResNet-18 (1512.03385), 11,689,512 parameters", ResNet, block=BasicBlock, depths=(2, 2, 2, 2)
    ),
    "resnet34": variant(
        "ResNet-34 (1512.03385), 21,797,672 parameters", ResNet, block=BasicBlock, depths=(3, 4, 6, 3)
    ),
    "resnet50": variant(
        "ResNet-50 (1512.03385), 25,557,032 parameters", ResNet, block=Bottleneck, depths=(3, 4, 6, 3)
    ),
    "resnet101": variant(
        "ResNet-101 (1512.03385), 44,549,160 parameters", ResNet, block=Bottleneck, depths=(3, 4, 23, 3)
    ),
    "resnet152": variant(
        "ResNet-152 (1512.03385), 60,192,808 parameters", ResNet, block=Bottleneck, depths=(3, 8, 36, 3)
    ),
    "resnet20_cifar": variant(
        "ResNet-20 for 32x32 images (1512.03385), 269,722 parameters with 10 classes", ResNet, **_option_a(20)
    ),
    "resnet32_cifar": variant(
        "ResNet-32 for 32x32 images (1512.03385), 464,154 parameters with 10 classes", ResNet, **_option_a(32)
    ),
    "resnet44_cifar": variant(
        "ResNet-44 for 32x32 images (1512.03385), 658,586 parameters with 10 classes", ResNet, **_option_a(44)
    ),
    "resnet56_cifar": variant(
        "ResNet-56 for 32x32 images (1512.03385), 853,018 parameters with 10 classes", ResNet, **_option_a(56)
    ),
    "resnet110_cifar": variant(
        "ResNet-110 for 32x32 images (1512.03385), 1,727,962 parameters with 10 classes",
        ResNet,
        **_option_a(110),
    ),
    "resnet110_stochastic_cifar": variant(
        "ResNet-110 with stochastic depth (1603.09382), 1,727,962 parameters with 10 classes",
        ResNet,
        **_option_a(110, survival=0.5),
    ),
    "preresnet18": variant(
        "Pre-activation ResNet-18 (1603.05027), 11,687,720 parameters",
        ResNet,
        block=PreActivationBlock,
        depths=(2, 2, 2, 2),
    ),
    "preresnet34": variant(
        "Pre-activation ResNet-34 (1603.05027), 21,795,880 parameters",
        ResNet,
        block=PreActivationBlock,
        depths=(3, 4, 6, 3),
    ),
    "preresnet50": variant(
        "Pre-activation ResNet-50 (1603.05027), 25,549,352 parameters",
        ResNet,
        block=PreActivationBottleneck,
        depths=(3, 4, 6, 3),
    ),
    "preresnet101": variant(
        "Pre-activation ResNet-101 (1603.05027), 44,541,480 parameters",
        ResNet,
        block=PreActivationBottleneck,
        depths=(3, 4, 23, 3),
    ),
    "preresnet110_cifar": variant(
        "Pre-activation ResNet-110 for 32x32 images (1603.05027), 1,730,522 parameters with 10 classes",
        ResNet,
        **_cifar(block=PreActivationBlock, depths=(18, 18, 18)),
    ),
    "preresnet164_cifar": variant(
        "Pre-activation ResNet-164 for 32x32 images (1603.05027), 1,703,258 parameters with 10 classes",
        ResNet,
        **_cifar(block=PreActivationBottleneck, depths=(18, 18, 18)),
    ),
    "wrn_16_8": variant(
        "Wide ResNet-16-8 for 32x32 images (1605.07146), 10,961,370 parameters with 10 classes",
        ResNet,
        **_wide(16, 8),
    ),
    "wrn_28_10": variant(
        "Wide ResNet-28-10 for 32x32 images (1605.07146), 36,479,194 parameters with 10 classes",
        ResNet,
        **_wide(28, 10),
    ),
    "wrn_40_4": variant(
        "Wide ResNet-40-4 for 32x32 images (1605.07146), 8,949,210 parameters with 10 classes",
        ResNet,
        **_wide(40, 4),
    ),
    "wide_resnet50_2": variant(
        "Wide ResNet-50-2 (1605.07146), 68,883,240 parameters",
        ResNet,
        block=Bottleneck,
        depths=(3, 4, 6, 3),
        width=128,
    ),
    "resnext50_32x4d": variant(
        "ResNeXt-50 32x4d (1611.05431), 25,028,904 parameters",
        ResNet,
        block=Bottleneck,
        depths=(3, 4, 6, 3),
        groups=32,
        width=4,
    ),
    "resnext101_32x8d": variant(
        "ResNeXt-101 32x8d (1611.05431), 88,791,336 parameters",
        ResNet,
        block=Bottleneck,
        depths=(3, 4, 23, 3),
        groups=32,
        width=8,
    ),
    "resnext29_8x64d_cifar": variant(
        "ResNeXt-29 8x64d for 32x32 images (1611.05431), 34,426,698 parameters with 10 classes",
        ResNet,
        block=Bottleneck,
        depths=(3, 3, 3),
        widths=(64, 128, 256),
        cifar=True,
        groups=8,
    ),
}
for _depth in (20, 32, 44, 56, 110):
    RESNETS[f"resnet{_depth}"] = RESNETS[f"resnet{_depth}_cifar"]
