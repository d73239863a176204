"""CartPole without its velocities: what a single observation does not show, a memory has to keep."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.envs.classic_control import CartPoleEnv

SEEN = [0, 2]  # the cart's position and the pole's angle


class MaskedCartPole(gym.ObservationWrapper):
    """CartPole that shows the cart's position and the pole's angle, a Box (2,), and neither velocity.

    No policy of the last observation alone keeps the pole up; one that remembers a few of them does.
    """

    metadata = CartPoleEnv.metadata

    def __init__(self, **kwargs: Any):
        super().__init__(CartPoleEnv(**kwargs))
        box: Any = self.env.observation_space
        self.observation_space = spaces.Box(box.low[SEEN], box.high[SEEN], dtype=np.float32)

    def observation(self, observation: np.ndarray) -> np.ndarray:
        return observation[SEEN]
