"""All backbones by name."""

import difflib
from collections.abc import Callable
from typing import Any

from .alexnet import ALEXNETS
from .backbone import Backbone
from .densenet import DENSENETS
from .fractalnet import FRACTALNETS
from .googlenet import GOOGLENETS
from .lenet import LENETS
from .nin import NINS
from .resnet import RESNETS
from .squeezenet import SQUEEZENETS
from .vgg import VGGS

BACKBONES: dict[str, Callable[..., Backbone]] = {
    **LENETS,
    **ALEXNETS,
    **VGGS,
    **NINS,
    **GOOGLENETS,
    **RESNETS,
    **FRACTALNETS,
    **DENSENETS,
    **SQUEEZENETS,
}
"""Each takes (num_classes, in_channels, norm) and its family's settings; its docstring is a line for
lists."""


def make_backbone(
    name: str, num_classes: int = 1000, in_channels: int = 3, norm: str | None = None, **kwargs: Any
) -> Backbone:
    """Build a backbone with new weights, drawn from torch's global generator.

    `name` is a key of `BACKBONES`. `norm` is None for the network's own, or `batch`, `group`, `frozen`,
    `none` (see `norm.py`). Further settings are those of the family, such as `dropout`.

    Raises ValueError for an unknown name, with the nearest ones, and for an unknown norm.
    """
    if name not in BACKBONES:
        near = difflib.get_close_matches(name, BACKBONES, n=3, cutoff=0.4) or list(BACKBONES)
        raise ValueError(f"unknown backbone {name!r}; nearest: {', '.join(near)}")
    backbone = BACKBONES[name](num_classes, in_channels, norm, **kwargs)
    backbone.name = name
    return backbone
