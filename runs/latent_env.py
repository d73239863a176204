"""What an agent sees of an environment through a world model: `foveal/Latent-v0`.

    foveal train ppo --env-id foveal/Latent-v0 --env-kwargs env_id=MinAtar/Breakout-v1 world_model=RUN

The observation is the frame's latent z and, unless `memory` is false, the h that the recurrent network was
left with by the steps of the episode before (Ha and Schmidhuber 2018, 1803.10122, section 2.3). Actions,
rewards and endings are the environment's own.

`make_vec` takes `Latents`, which looks at the frames of all environments at once: a hundred cost the model
little more than one.
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
from torch import Tensor

from ..envs import find_spec, make_vec
from ..envs.registry import make_env
from ..generative import WorldModel

open_world_model = functools.lru_cache(maxsize=4)(functools.partial(WorldModel.load, device="cpu"))
"""One model for all environments of a process; nothing of an episode is kept in it."""


class Reader:
    """Reads along with N episodes: frames and actions in, observations out.

    `world_model` is a run, checkpoint or weights file. ValueError where it was trained on other frames or
    with other actions than those of `env_id`, which are `seen` and `actions`.
    """

    def __init__(
        self,
        world_model: str | Path,
        memory: bool,
        env_id: str,
        seen: spaces.Space,
        actions: spaces.Space,
        n: int,
    ):
        self.model = open_world_model(str(world_model))
        if seen != self.model.space:
            raise ValueError(f"{world_model} was trained on {self.model.space}; {env_id} shows {seen}")
        if not isinstance(actions, spaces.Discrete) or actions.n != len(self.model.classes):
            raise ValueError(
                f"{world_model} knows {len(self.model.classes)} actions; {env_id} takes {actions}"
            )
        self.first_action = int(actions.start)
        self.memory = memory
        size = self.model.vae.latent_dim + (self.model.config.hidden_size if memory else 0)
        self.space = spaces.Box(-np.inf, np.inf, (size,), np.float32)
        self.state = self.model.no_state(n)  # (N, 2H)
        self.z: Tensor = torch.zeros(n, self.model.vae.latent_dim)

    def begin(self, frames: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Episodes begin where `mask` (N,) says so; the other frames are the last ones again."""
        # Not by a product, which leaves zeros of both signs.
        self.state = self.state.masked_fill(torch.from_numpy(mask).unsqueeze(1), 0.0)
        return self.look(frames)

    def go_on(self, frames: np.ndarray, actions: np.ndarray) -> np.ndarray:
        """The frames (N, C, H, W) that came of `actions` (N,) at the ones before."""
        if self.memory:
            taken = torch.from_numpy(np.asarray(actions, np.int64) - self.first_action)
            starts = torch.zeros(len(taken), dtype=torch.bool)  # a state of zeros is that of a start
            with torch.inference_mode():
                self.state = self.model.network(self.z, taken, self.state, starts)
        return self.look(frames)

    def look(self, frames: np.ndarray) -> np.ndarray:
        """The observations (N, D + H) float32 of frames, after the steps before them.

        Always of all N: in batches of another size the last bits may differ, and a resumed run would not be
        where it was.
        """
        with torch.inference_mode():  # `vae.encode` checks its images, which takes as long as one of them
            self.z = self.model.vae.network.encode(torch.from_numpy(frames), None).mean
            seen = [self.z, self.state[:, : self.model.config.hidden_size]] if self.memory else [self.z]
            return torch.cat(seen, 1).numpy()


class Latents:
    """A Backend of `envs.vector` around another one, whose frames it looks at in one batch."""

    def __init__(
        self,
        num_envs: int,
        training: bool,
        max_episode_steps: int | None,
        render_mode: str | None,
        env_id: str,
        world_model: str | Path,
        memory: bool = True,
    ):
        env = make_vec(
            env_id,
            num_envs,
            training=training,
            max_episode_steps=max_episode_steps,
            render_mode=render_mode,
        )
        self.env = env.backend
        seen, self.single_action_space = env.single_observation_space, env.single_action_space
        self.reader = Reader(world_model, memory, env_id, seen, self.single_action_space, num_envs)
        self.single_observation_space = self.reader.space

    def reset(self, mask: np.ndarray, seeds: list[int]) -> np.ndarray:
        return self.reader.begin(self.env.reset(mask, seeds), mask)

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        frames, *rest = self.env.step(actions)
        return self.reader.go_on(frames, actions), *rest  # type: ignore[return-value]

    def render(self) -> np.ndarray:
        return self.env.render()

    def close(self) -> None:
        self.env.close()


class LatentEnv(gym.Wrapper):
    """An environment of uint8 images and Discrete actions, seen through a world model: Box (D,) or (D + H,).

    The world model is read again whenever the environment is made.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012
    together = Latents
    """What `make_vec` takes in place of several of these."""

    def __init__(
        self, env_id: str, world_model: str | Path, memory: bool = True, render_mode: str | None = None
    ):
        kwargs = {} if render_mode is None else {"render_mode": render_mode}
        super().__init__(make_env(find_spec(env_id), None, kwargs, os.getpid()))
        seen, actions = self.env.observation_space, self.env.action_space
        self.reader = Reader(world_model, memory, env_id, seen, actions, 1)
        self.observation_space = self.reader.space

    def reset(self, **kwargs: Any) -> tuple[np.ndarray, dict[str, Any]]:
        frame, info = self.env.reset(**kwargs)
        return self.reader.begin(frame[None], np.ones(1, np.bool_))[0], info

    def step(self, action: Any) -> tuple[np.ndarray, Any, bool, bool, dict[str, Any]]:
        frame, reward, terminated, truncated, info = self.env.step(action)
        return self.reader.go_on(frame[None], np.array([action]))[0], reward, terminated, truncated, info
