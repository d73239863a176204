"""Running mean and variance of observations and returns: agent state in float64, never a wrapper."""

from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

from ..vision import is_image
from .agent import map_tensors

CLIP = 10.0
"""Normalised values are cut to [-CLIP, CLIP]."""


class Moments(nn.Module):
    """Mean and variance of all rows seen so far, as buffers, so that they are saved with the weights."""

    mean: Tensor
    var: Tensor
    count: Tensor

    def __init__(self, shape: tuple[int, ...]):
        super().__init__()
        self.register_buffer("mean", torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("var", torch.ones(shape, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    @torch.no_grad()
    def update(self, batch: Tensor) -> None:
        """Take in rows (B, *shape). The moments of two sets from those of each (Chan et al. 1979, eq.
        2.1)."""
        batch = batch.double()
        count = self.count + len(batch)
        delta = batch.mean(0) - self.mean
        squares = self.var * self.count + batch.var(0, correction=0) * len(batch)
        self.var.copy_((squares + delta.square() * self.count * len(batch) / count) / count)
        self.mean.add_(delta * len(batch) / count)
        self.count.copy_(count)

    def scale(self, x: Tensor) -> Tensor:
        """x (..., *shape) over the standard deviation, cut to +-CLIP, float32."""
        return (x * (self.var + 1e-8).rsqrt()).clamp(-CLIP, CLIP).float()


def is_normalized(space: spaces.Space) -> bool:
    """Whether a part of an observation is normalised: boxes of floats, but no images."""
    return isinstance(space, spaces.Box) and not is_image(space) and np.issubdtype(space.dtype, np.floating)


class ObservationNormalizer(nn.Module):
    """Boxes of floats to mean 0 and variance 1; images and integers, which encoders scale, as they are.

    The statistics change only by `update`: while an agent is evaluated they stand still.
    """

    def __init__(self, space: spaces.Space):
        super().__init__()
        parts = dict(space.items()) if isinstance(space, spaces.Dict) else {"": space}
        self.keys = [key for key, part in parts.items() if is_normalized(part)]
        if not self.keys:
            raise ValueError(f"normalize_observations is for vectors of floats, got {space}")
        self.moments = nn.ModuleList(Moments(parts[key].shape or ()) for key in self.keys)

    def _parts(self, obs: Any) -> list[Tensor]:
        return [obs[key] if isinstance(obs, dict) else obs for key in self.keys]

    def forward(self, obs: Any) -> Any:
        """(B, ...) raw -> the same, normalised."""
        parts = [
            moments.scale(part - moments.mean)  # type: ignore[operator]
            for moments, part in zip(self.moments, self._parts(obs))
        ]
        return {**obs, **dict(zip(self.keys, parts))} if isinstance(obs, dict) else parts[0]

    def update(self, obs: Any) -> None:
        """Take in observations (T, N, ...)."""
        for moments, part in zip(self.moments, self._parts(map_tensors(lambda x: x.flatten(0, 1), obs))):
            moments.update(part)  # type: ignore[operator]


class RewardScaler:
    """Divides rewards by the standard deviation of the running discounted return (as Gymnasium's
    NormalizeReward).

    The sign and the zero of rewards stay; what comes out is cut to +-CLIP.
    """

    def __init__(self, num_envs: int, gamma: float):
        self.gamma = gamma
        self.moments = Moments(())
        self.returns = torch.zeros(num_envs, dtype=torch.float64)

    def __call__(self, rewards: Tensor, done: Tensor) -> Tensor:
        """Rewards and endings (T, N) of the next T steps, on the CPU -> rewards (T, N), scaled."""
        returns = torch.empty_like(rewards, dtype=torch.float64)
        for t in range(len(rewards)):
            self.returns = self.returns * self.gamma + rewards[t]
            returns[t] = self.returns
            self.returns = self.returns * ~done[t]
        self.moments.update(returns.flatten())
        return self.moments.scale(rewards)

    def state(self) -> dict[str, Tensor]:
        return {"returns": self.returns, **self.moments.state_dict()}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        self.returns = tensors["returns"].clone()
        self.moments.load_state_dict({name: tensors[name] for name in ("mean", "var", "count")})
