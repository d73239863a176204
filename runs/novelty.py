"""How novel what a policy sees is to a model of images: minus the log-likelihood of its observations."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..generative.likelihood import bits_per_dim
from .evaluation import quotas
from .fit import load_generative
from .statistics import bootstrap_ci

__all__ = ["Novelty"]


class Novelty:
    """Watches episodes: bits a dimension of each observation, under a model with an exact likelihood.

    Observations like those that the model was trained on take few bits, others more.

    Raises ValueError where the run holds no such model, or one of other images than the agent sees.
    """

    def __init__(self, run: Path, space: Any, device: str = "auto"):
        self.model: Any = load_generative(run, device)
        if not hasattr(self.model, "log_prob"):
            raise ValueError(
                f"novelty: a {self.model.name} has no exact likelihood; a pixelcnn, pixelrnn or "
                "image-transformer has"
            )
        if self.model.conditional:
            raise ValueError("novelty takes a model without labels, this one is conditional")
        if self.model.space != space:
            raise ValueError(f"novelty: the model takes {self.model.space}, the agent sees {space}")
        self.bits: list[np.ndarray] = []
        self.starts: list[np.ndarray] = []

    def see(self, obs: Any, episode_start: np.ndarray) -> None:
        """The observations (num_envs, C, H, W) that are acted on now."""
        nats = -self.model.log_prob(torch.as_tensor(np.asarray(obs)))
        self.bits.append(bits_per_dim(1, math.prod(self.model.space.shape)) * nats.double().cpu().numpy())
        self.starts.append(np.array(episode_start))

    def figures(self, episodes: int) -> dict[str, Any]:
        """Of the `episodes` that `evaluate` counts, in its order: `novelty/episodes`, the mean bits a
        dimension of each one's observations, and their mean, standard deviation and 95 % interval."""
        bits, starts = np.stack(self.bits, 1), np.stack(self.starts, 1)  # (num_envs, T)
        means = np.array(
            [
                part.mean()
                for seen, start, count in zip(bits, starts, quotas(episodes, len(bits)))
                for part in np.split(seen, np.flatnonzero(start)[1:])[:count]
            ]
        )
        return {
            "novelty/bits_per_dim_mean": float(means.mean()),
            "novelty/bits_per_dim_std": float(means.std()),
            "novelty/bits_per_dim_ci95": list(bootstrap_ci(means)),
            "novelty/episodes": means.tolist(),
        }

    def text(self, figures: dict[str, Any]) -> str:
        low, high = figures["novelty/bits_per_dim_ci95"]
        return (
            f"{figures['novelty/bits_per_dim_mean']:.4f} bits a dimension under {self.model.name} "
            f"(95 % interval {low:.4f} to {high:.4f})"
        )
