"""MinAtar (Young and Tian, "MinAtar", arXiv:1903.03176), made repeatable and visible."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np

CELL = 16  # pixels of a rendered cell, so that the 10x10 board becomes 160x160

# black, then one colour a channel; Seaquest has the most, ten
PALETTE = np.array(
    [
        (0, 0, 0), (86, 180, 233), (240, 228, 66), (213, 94, 0), (0, 158, 115), (204, 121, 167),
        (230, 159, 0), (0, 114, 178), (250, 250, 250), (150, 110, 220), (120, 120, 120),
    ],
    dtype=np.uint8,
)  # fmt: skip


class MinAtar(gym.Wrapper):
    """MinAtar's Gymnasium environment with two repairs.

    Its sticky actions remember the last action of the previous episode, so a seeded reset alone does not
    repeat an episode; here the reset forgets it. And its own rendering needs seaborn; this one does not.
    """

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict]:
        self.unwrapped.game.last_action = 0  # type: ignore[attr-defined]
        return self.env.reset(seed=seed, options=options)

    def render(self) -> np.ndarray:
        return picture(self.unwrapped.game)  # type: ignore[attr-defined]


def picture(game: Any) -> np.ndarray:
    """The board as an image (160, 160, 3), uint8; where channels overlap the highest shows."""
    board = game.state()  # (10, 10, C) bool
    colour = np.max(board * np.arange(1, board.shape[-1] + 1), axis=-1)  # (10, 10)
    return PALETTE[colour].repeat(CELL, axis=0).repeat(CELL, axis=1)


class Games:
    """Games without an environment around each, one after the other: the wrappers and copies that
    SyncVectorEnv and gymnasium.make put around them take as long as the games themselves."""

    def __init__(self, env: gym.Env, games: Sequence[Any], max_episode_steps: int | None) -> None:
        """`env` is one of these environments, as a single one; `games` are those of several such."""
        self.single_observation_space, self.single_action_space = env.observation_space, env.action_space
        self._games, self._limit = games, max_episode_steps or math.inf
        self._action_set: list[int] = env.unwrapped.action_set  # type: ignore[attr-defined]
        self._obs = np.zeros((len(games), *(env.observation_space.shape or ())), np.uint8)  # (N, C, 10, 10)
        self._steps = np.zeros(len(games), np.int64)
        for game in games:
            game.seed(0)  # now its sticky actions and its rules draw from one generator

    def reset(self, mask: np.ndarray, seeds: list[int]) -> np.ndarray:
        self._obs = self._obs.copy()
        for i, seed in zip(np.flatnonzero(mask), seeds, strict=True):
            game = self._games[int(i)]
            game.last_action = 0  # see MinAtar
            # What game.seed does but for making a generator, which takes 130 microseconds instead of 2.
            game.random.seed(seed)
            game.reset()
            self._obs[i] = game.state().transpose(2, 0, 1)
        self._steps[mask] = 0
        return self._obs

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        self._obs = np.empty_like(self._obs)
        rewards, terminated = np.zeros(len(actions)), np.zeros(len(actions), np.bool_)
        for i, (game, action) in enumerate(zip(self._games, actions.tolist())):
            rewards[i], terminated[i] = game.act(self._action_set[action])
            self._obs[i] = game.state().transpose(2, 0, 1)
        self._steps += 1
        truncated = self._steps >= self._limit
        return self._obs, rewards, terminated, truncated, terminated | truncated

    def render(self) -> np.ndarray:
        return picture(self._games[0])

    def close(self) -> None:
        """Nothing is open: pictures are arrays."""
