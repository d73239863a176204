"""What all backbones have in common: named stages, a classifier, and parts that can be cut off.

A backbone takes images that are scaled already, float32 (B, in_channels, H, W). Each family has a file of its
own; `backbones.py` has them all by name.
"""

import bisect
import copy
import functools
import weakref
from collections.abc import Callable
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from .norm import FrozenBatchNorm2d

LARGEST = 512
"""Side in pixels at which `smallest_size` gives up."""


class Backbone(nn.Module):
    """Images (B, in_channels, H, W) to class scores (B, num_classes), by way of a map (B, C, h, w).

    Subclasses fill in `stages` and `head` with dotted paths of submodules, applied one after the other. Where
    torchvision has the same network, names and shapes of the state_dict are torchvision's.

    Raises ValueError for fewer than 1 class or channel.
    """

    auxiliary_weight: ClassVar[float] = 0.0
    """Weight of each auxiliary head's loss beside the loss of the logits."""

    def __init__(self, num_classes: int, in_channels: int):
        super().__init__()
        for argument, value in (("num_classes", num_classes), ("in_channels", in_channels)):
            if value < 1:
                raise ValueError(f"{argument} must be 1 or more, got {value!r}")
        self.num_classes = num_classes
        self.in_channels = in_channels
        self.name = type(self).__name__
        """What errors call it; `make_backbone` puts its own name here."""
        self.stages: dict[str, list[str]] = {}
        """From a stage's name to its submodules, in the order in which they are applied."""
        self.head: list[str] = []
        """The submodules that make logits of the last stage's map; empty once the network is cut."""

    def feature_map(self, x: Tensor, stage: str | None = None) -> Tensor:
        """(B, in_channels, H, W) -> the map (B, C, h, w) of a stage, by default of the last.

        Raises ValueError for an unknown stage.
        """
        return self.apply_paths(self.paths(stage), x)

    def classify(self, feature_map: Tensor) -> Tensor:
        """The last stage's map (B, C, h, w) -> logits (B, num_classes). ValueError where it was cut off."""
        if not self.head:
            raise ValueError(f"{self.name} was cut at {list(self.stages)[-1]} and has no classifier any more")
        return self.apply_paths(self.head, feature_map)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> logits (B, num_classes)."""
        return self.classify(self.feature_map(x))

    def forward_train(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Logits (B, num_classes), and those of the auxiliary heads, each (B, num_classes), if any."""
        return self(x), []

    def cut(self, stage: str) -> Self:
        """Remove, in place, all that the map of `stage` does not need, the classifier included; return self.

        The other submodules keep their names: a file of the whole network loads with strict=False. Raises
        ValueError for an unknown stage.
        """
        _prune(self, "", self.paths(stage))
        names = list(self.stages)
        self.stages = {name: self.stages[name] for name in names[: names.index(stage) + 1]}
        self.head = []
        return self

    def paths(self, stage: str | None = None, after: str | None = None) -> list[str]:
        """The submodules behind stage `after` (or the input) up to and including `stage` (or the last)."""
        names = list(self.stages)
        for name in (stage, after):
            if name is not None and name not in names:
                raise ValueError(f"stage of {self.name} must be one of {', '.join(names)}, got {name!r}")
        start = 0 if after is None else names.index(after) + 1
        stop = len(names) if stage is None else names.index(stage) + 1
        return [path for name in names[start:stop] for path in self.stages[name]]

    def apply_paths(self, paths: list[str], x: Tensor) -> Tensor:
        """x through the submodules of `paths`, one after the other."""
        for path in paths:
            x = self.get_submodule(path)(x)
        return x


def _prune(module: nn.Module, prefix: str, needed: list[str]) -> None:
    for name in list(module._modules):
        path = prefix + name
        if path in needed:
            continue
        if any(other.startswith(f"{path}.") for other in needed):
            _prune(module.get_submodule(name), f"{path}.", needed)
        else:
            delattr(module, name)


class AveragePoolTo(nn.AdaptiveAvgPool2d):
    """Adaptive average pooling that leaves maps of the wanted size alone.

    PyTorch's takes a fifth of LeNet-5's time to change nothing.
    """

    def forward(self, input: Tensor) -> Tensor:
        size = self.output_size
        height, width = size if isinstance(size, tuple) else (size, size)
        return input if input.shape[-2:] == (height, width) else super().forward(input)


def variant(summary: str, build: Callable[..., Backbone], **settings: Any) -> Callable[..., Backbone]:
    """`build` with some of its settings fixed, and a docstring for listings."""

    def make(
        num_classes: int = 1000, in_channels: int = 3, norm: str | None = None, **kwargs: Any
    ) -> Backbone:
        return build(num_classes, in_channels, norm, **{**settings, **kwargs})

    make.__doc__ = summary
    return make


def kaiming_init(
    network: nn.Module, mode: Literal["fan_in", "fan_out"] = "fan_out", linear_std: float | None = None
) -> None:
    """Kaiming's normal weights (1502.01852) for convolutions, N(0, linear_std^2) for linear layers, biases 0.

    Linear layers keep PyTorch's initial weights where `linear_std` is None.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode=mode, nonlinearity="relu")
        elif isinstance(module, nn.Linear) and linear_std is not None:
            nn.init.normal_(module.weight, std=linear_std)
        else:
            continue
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def smallest_size(backbone: Backbone | str, stage: str | None = None) -> int:
    """Side in pixels of the smallest square images that `feature_map` takes, up to `stage` (None: the last).

    No map on the way is empty then. `backbone` may be a name that `make_backbone` takes. Found by trying on
    the meta device, which computes no values, and remembered.
    """
    if isinstance(backbone, str):
        return _smallest_by_name(backbone, stage)
    known = _smallest.setdefault(backbone, {})
    key = list(backbone.stages)[-1] if stage is None else stage
    if key not in known:
        tensors = [*backbone.parameters(), *backbone.buffers()]
        shapes = {id(t): torch.empty_like(t, dtype=torch.float32, device="meta") for t in tensors}
        known[key] = _search(copy.deepcopy(backbone, shapes), key)  # the copy has these for its weights
    return known[key]


_smallest: weakref.WeakKeyDictionary[Backbone, dict[str, int]] = weakref.WeakKeyDictionary()


@functools.cache
def _smallest_by_name(name: str, stage: str | None) -> int:
    from .backbones import make_backbone  # which imports all families, and they this module

    with torch.device("meta"):
        return smallest_size(make_backbone(name), stage)


def _search(backbone: Backbone, stage: str) -> int:
    # These change no shape, and are slow on the meta device.
    idle = (nn.BatchNorm2d, nn.GroupNorm, FrozenBatchNorm2d, nn.ReLU, nn.Dropout)
    for module in list(backbone.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, idle):
                setattr(module, name, nn.Identity())
    backbone.eval()

    @torch.no_grad()
    def fits(size: int) -> bool:
        x = torch.empty(1, backbone.in_channels, size, size, device="meta")
        try:
            return backbone.feature_map(x, stage).numel() > 0
        except RuntimeError:  # a kernel larger than its map, or a map without pixels
            return False

    size = 1
    while not fits(size):
        size *= 2
        if size > LARGEST:
            raise ValueError(f"{backbone.name} takes no images of {LARGEST}x{LARGEST} pixels or less")
    return size // 2 + 1 + bisect.bisect_left(range(size // 2 + 1, size), True, key=fits)


def check_size(
    backbone: Backbone | str, size: tuple[int, int], stage: str | None = None, name: str | None = None
) -> None:
    """Raise ValueError where images of `size` (height, width) are too small for the map of `stage`.

    `name` is what the error calls the backbone, by default its own name.
    """
    height, width = size
    smallest = smallest_size(backbone, stage)
    if min(height, width) < smallest:
        name = name or (backbone if isinstance(backbone, str) else backbone.name)
        part = "" if stage is None else f" up to {stage}"
        raise ValueError(
            f"{name}{part} is too deep for images of {height}x{width} pixels: "
            f"it takes {smallest}x{smallest} or more"
        )
