"""First weights of the policy gradient agents."""

import math

import torch
from torch import Tensor, nn


@torch.no_grad()
def orthogonal_(weight: Tensor, gain: float = 1.0) -> None:
    """Orthogonal rows or columns, whichever are fewer (Saxe et al. 2013, 1312.6120), in place.

    As torch.nn.init's, but decomposed in float64: in float32 the last bits depend on the number of threads,
    and the same seed would train differently on another machine.
    """
    flat = torch.empty(len(weight), weight.numel() // len(weight)).normal_().double()
    wide = flat.shape[0] < flat.shape[1]
    q, r = torch.linalg.qr(flat.T if wide else flat)
    q = q * r.diag().sign()  # uniform over orthogonal matrices
    weight.copy_(gain * (q.T if wide else q).reshape(weight.shape))


def orthogonal(module: nn.Module, gain: float = math.sqrt(2)) -> None:
    """Orthogonal weights and zero biases in all linear and convolution layers."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            orthogonal_(layer.weight, gain)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
