"""Stable-Baselines3 with the settings that its zoo gives, and the face that our evaluation asks for."""

from collections.abc import Callable
from typing import Any

SB3_CARTPOLE: dict[str, Any] = {
    "learning_rate": 2.3e-3,
    "batch_size": 64,
    "buffer_size": 100_000,
    "learning_starts": 1_000,
    "gamma": 0.99,
    "target_update_interval": 10,
    "train_freq": 256,
    "gradient_steps": 128,
    "exploration_fraction": 0.16,
    "exploration_final_eps": 0.04,
    "policy_kwargs": {"net_arch": [256, 256]},
}
"""The zoo's DQN recipe for CartPole-v1."""

FOVEAL_CARTPOLE: dict[str, Any] = {
    "learning_rate": 2.3e-3,
    "batch_size": 64,
    "buffer_size": 100_000,
    "learning_starts": 1_000,
    "gamma": 0.99,
    "target_every": 10,
    "train_every": 256,
    "gradient_steps": 128,
    "exploration_fraction": 0.16,
    "exploration_final": 0.04,
}
"""The same in our names; our default network is [256, 256] too. `DQN.recipe` has moved on from it."""


class Peer:
    """A model's `predict`, with the environment to score it on."""

    def __init__(self, predict: Callable[..., Any], env_id: str, seed: int):
        self.predict = predict
        self.env_id, self.seed = env_id, seed

    def env_spec(self) -> dict[str, Any]:
        return {"env_id": self.env_id, "seed": self.seed}
