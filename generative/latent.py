"""Walks through latents: lines between two, one coordinate at a time, and sums of class means.

All of it is about z alone, (N, D) tensors: `model.decode` makes images of them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def line(a: Tensor, b: Tensor, steps: int, spherical: bool = False) -> Tensor:
    """From each row of a to the same row of b, both included: (N, D), (N, D) -> (N, steps, D).

    Straight, or along the great circle (Shoemake 1985), which stays at lengths between the two ends', where a
    Gaussian has its mass: the middle of a straight line is nearer to the origin than any draw. Where the two
    point the same or the opposite way there is no one circle, and the line is straight. ValueError for fewer
    than 2 steps.
    """
    if steps < 2:
        raise ValueError(f"steps must be 2 or more, got {steps}")
    t = torch.linspace(0, 1, steps, device=a.device, dtype=a.dtype).unsqueeze(1)  # (steps, 1)
    a, b = a.unsqueeze(1), b.unsqueeze(1)
    straight = (1 - t) * a + t * b
    if not spherical:
        return straight
    lengths = a.norm(dim=2, keepdim=True), b.norm(dim=2, keepdim=True)
    ways = [end / length.clamp(min=1e-12) for end, length in zip((a, b), lengths)]
    angle = (ways[0] * ways[1]).sum(2, keepdim=True).clamp(-1, 1).acos()
    sine = angle.sin()
    flat = sine < 1e-4
    safe = torch.where(flat, 1.0, sine)
    way = (((1 - t) * angle).sin() * ways[0] + (t * angle).sin() * ways[1]) / safe
    return torch.where(flat, straight, way * ((1 - t) * lengths[0] + t * lengths[1]))


def traverse(center: Tensor, spread: Tensor, steps: int = 11, reach: float = 2.5) -> Tensor:
    """Each coordinate in turn, around a center, from -reach to reach times its spread: (D,), (D,) ->
    (D, steps, D)."""
    moves = torch.linspace(-reach, reach, steps, device=center.device, dtype=center.dtype)
    return center + torch.diag(spread).unsqueeze(1) * moves.unsqueeze(1)


def class_sum(codes: Tensor, labels: Tensor, terms: Sequence[tuple[int, int]]) -> Tensor:
    """Sum of sign times the mean code of a class over `terms` of (sign, class): (N, D), (N,) -> (D,).

    ValueError for a class without codes.
    """
    total = torch.zeros_like(codes[0])
    for sign, number in terms:
        here = labels.to(codes.device) == number
        if not bool(here.any()):
            raise ValueError(f"arithmetic takes classes that there are images of, none is of class {number}")
        total += sign * codes[here].mean(0)
    return total
