"""What an agent sees of an environment through a world model: `foveal/Latent-v0`.

    foveal train ppo --env-id foveal/Latent-v0 --env-kwargs env_id=MinAtar/Breakout-v1 world_model=RUN

The observation is the frame's latent z and, unless `memory` is false, the h that the recurrent network was
left with by the steps of the episode before (Ha and Schmidhuber 2018, 1803.10122, section 2.3). Actions,
rewards and endings are the environment's own.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces

from ..envs import find_spec
from ..envs.registry import make_env
from ..generative import WorldModel

open_world_model = functools.lru_cache(maxsize=4)(functools.partial(WorldModel.load, device="cpu"))
"""One model for all environments of a process; nothing of an episode is kept in it."""


class LatentEnv(gym.Wrapper):
    """An environment of uint8 images and Discrete actions, seen through a world model: Box (D,) or (D + H,).

    `world_model` is a run, checkpoint or weights file, which is read again whenever the environment is made.
    ValueError where it was trained on other frames or with other actions.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012

    def __init__(
        self, env_id: str, world_model: str | Path, memory: bool = True, render_mode: str | None = None
    ):
        kwargs = {} if render_mode is None else {"render_mode": render_mode}
        super().__init__(make_env(find_spec(env_id), None, kwargs, os.getpid()))
        self.model = open_world_model(str(world_model))
        seen, actions = self.env.observation_space, self.env.action_space
        if seen != self.model.space:
            raise ValueError(f"{world_model} was trained on {self.model.space}; {env_id} shows {seen}")
        if not isinstance(actions, spaces.Discrete) or actions.n != len(self.model.classes):
            raise ValueError(
                f"{world_model} knows {len(self.model.classes)} actions; {env_id} takes {actions}"
            )
        self.first_action = int(actions.start)
        self.memory = memory
        size = self.model.vae.latent_dim + (self.model.config.hidden_size if memory else 0)
        self.observation_space = spaces.Box(-np.inf, np.inf, (size,), np.float32)

    def reset(self, **kwargs: Any) -> tuple[np.ndarray, dict[str, Any]]:
        frame, info = self.env.reset(**kwargs)
        self.state, self.starts = self.model.no_state(1), torch.ones(1, dtype=torch.bool)
        return self.look(frame), info

    def step(self, action: Any) -> tuple[np.ndarray, Any, bool, bool, dict[str, Any]]:
        frame, reward, terminated, truncated, info = self.env.step(action)
        taken = torch.tensor([int(action) - self.first_action])
        with torch.inference_mode():
            self.state = self.model.network(self.z, taken, self.state, self.starts)
        self.starts = torch.zeros_like(self.starts)
        return self.look(frame), reward, terminated, truncated, info

    def look(self, frame: np.ndarray) -> np.ndarray:
        """The observation (D + H,) float32 of a frame, after the steps before it."""
        with torch.inference_mode():  # `vae.encode` checks its images, which takes as long as this
            self.z = self.model.vae.network.encode(torch.from_numpy(frame).unsqueeze(0), None).mean
        seen = [self.z, self.state[:, : self.model.config.hidden_size]] if self.memory else [self.z]
        return torch.cat(seen, 1)[0].numpy()
