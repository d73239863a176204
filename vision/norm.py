"""Normalisation layers of the backbones, and which of them a network takes.

Batch normalisation is 1502.03167, group normalisation 1803.08494. Frozen batch normalisation is what
detectors fine-tune with: the statistics and the affine map of a trained network, as constants.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORMS = ("batch", "group", "frozen", "none")


def resolve_norm(norm: str | None, own: str) -> str:
    """The kind that `norm` means: `own` where it is None. ValueError for one that is not in NORMS."""
    if norm is None:
        return own
    if norm not in NORMS:
        raise ValueError(f"norm must be None (the network's own) or one of {', '.join(NORMS)}, got {norm!r}")
    return norm


def make_norm(kind: str, channels: int) -> nn.Module:
    """A layer that maps (B, channels, h, w) to the same shape.

    `kind` is `batch`, `group` (as many groups up to 32 as divide the channels and leave two or more in each:
    a group of one channel says nothing about a map of 1x1), `frozen`, or `none` (the identity). A
    convolution in front of it needs no bias, but for `none`.
    """
    match resolve_norm(kind, kind):
        case "batch":
            return nn.BatchNorm2d(channels)
        case "group":
            return nn.GroupNorm(_groups(channels), channels)
        case "frozen":
            return FrozenBatchNorm2d(channels)
    return nn.Identity()


def _groups(channels: int) -> int:
    return max(groups for groups in range(1, max(1, min(32, channels // 2)) + 1) if channels % groups == 0)


class FrozenBatchNorm2d(nn.Module):
    """Batch normalisation in evaluation mode, always: (B, channels, h, w) -> the same shape.

    Its tensors are buffers under BatchNorm2d's names, so that it loads the same files and nothing trains it.
    A new one is the identity (but for eps).
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", torch.ones(channels))
        self.register_buffer("bias", torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        state_dict.pop(f"{prefix}num_batches_tracked", None)  # a counter that BatchNorm2d's files have
        super()._load_from_state_dict(state_dict, prefix, *args)
