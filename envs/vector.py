"""Vector environments of true transitions: the only module that knows about autoreset.

Gymnasium's vector environments differ in what they return at the end of an episode (AutoresetMode: DISABLED,
NEXT_STEP, SAME_STEP), and none of them seeds the episode that follows. Here an ending is always answered by a
masked reset with a seed of its own, before the next action, so that every mode gives the same transitions:
`next_obs` is the real successor, `obs` what to act on next, and no step is ever a reset in disguise.

Since an episode depends on its seed and its actions alone, an environment's state is (seed, actions since).
"""

from __future__ import annotations

import functools
import hashlib
import math
import os
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec, load_env_creator
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv

from .registry import make_env
from .seeding import episode_seeds

Obs = Any
"""Observations of all environments: an array (N, ...), or a dict of such arrays."""

CARTPOLE_VECTOR = "gymnasium.envs.classic_control.cartpole:CartPoleVectorEnv"


class Episode(NamedTuple):
    """A finished episode of environment `env`: the undiscounted, unclipped sum of rewards; agent steps."""

    env: int
    episode_return: float
    length: int


class Step(NamedTuple):
    """What one step of all N environments gave. None of the arrays is ever overwritten later.

    obs         what to act on next, (N, ...) or a dict of such: after a real ending the new episode's first
    next_obs    the action's true successor, at an ending the final observation; `obs` itself if none ended
    rewards     float32 (N,), what learning sees: Atari's are clipped to their sign in training
    terminated  bool (N,): no value beyond this transition; a lost life in Atari training too
    truncated   bool (N,): cut off by a time limit, the value goes on
    reset       bool (N,): a real reset followed this transition
    episodes    the episodes that ended here
    """

    obs: Obs
    next_obs: Obs
    rewards: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    reset: np.ndarray
    episodes: list[Episode]


class Backend(Protocol):
    """N environments that are stepped together and reset one by one, with no reset of their own accord."""

    single_observation_space: spaces.Space
    single_action_space: spaces.Space

    def reset(self, mask: np.ndarray, seeds: list[int]) -> Obs:
        """Begin an episode in each environment of `mask`, with these seeds in order; all N observations."""

    def step(self, actions: np.ndarray) -> tuple[Obs, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """next_obs, true rewards, terminated, truncated, over (which environments must be reset now)."""

    def render(self) -> np.ndarray:
        """Environment 0 as (H, W, 3) uint8."""

    def close(self) -> None: ...


class Gymnasium:
    """Single environments in Gymnasium's SyncVectorEnv or AsyncVectorEnv, in any of their autoreset modes."""

    def __init__(
        self,
        spec: EnvSpec,
        num_envs: int,
        kwargs: dict[str, Any],
        max_episode_steps: int | None,
        mode: AutoresetMode,
        parallel: bool,
    ) -> None:
        make = functools.partial(make_env, spec, max_episode_steps, kwargs, os.getpid())
        vector = AsyncVectorEnv if parallel else SyncVectorEnv
        self.env: Any = vector([make] * num_envs, autoreset_mode=mode)
        self.single_observation_space = self.env.single_observation_space
        self.single_action_space = self.env.single_action_space

    def reset(self, mask: np.ndarray, seeds: list[int]) -> Obs:
        every: list[int | None] = [None] * len(mask)
        for i, seed in zip(np.flatnonzero(mask), seeds, strict=True):
            every[i] = seed
        return self.env.reset(seed=every, options={"reset_mask": mask})[0]

    def step(self, actions: np.ndarray) -> tuple[Obs, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        next_obs, rewards, terminated, truncated, infos = self.env.step(actions)
        over = terminated | truncated
        if "final_obs" in infos:  # SAME_STEP has reset already: put the final observations back
            for i in np.flatnonzero(over):
                _assign(next_obs, i, infos["final_obs"][i])
        return next_obs, rewards, terminated, truncated, over

    def render(self) -> np.ndarray:
        return self.env.call("render")[0]

    def close(self) -> None:
        self.env.close()


class CartPole:
    """Gymnasium's array CartPole, with a step of half as many operations, and the same numbers.

    Its own reset draws from one generator for all environments; ours draws for each the numbers that the
    single environment would, so that the transitions are those of SyncVectorEnv. No step is ever a reset
    here, since what is over is reset before.
    """

    def __init__(
        self, spec: EnvSpec, num_envs: int, kwargs: dict[str, Any], max_episode_steps: int | None
    ) -> None:
        self._limit = max_episode_steps or spec.max_episode_steps or math.inf
        make: Any = load_env_creator(CARTPOLE_VECTOR)
        env = self._env = make(num_envs=num_envs, **kwargs)  # its spaces and its constants
        self.single_observation_space = env.single_observation_space
        self.single_action_space = env.single_action_space
        self._forces = np.array([-env.force_mag, env.force_mag])
        self._thresholds = np.array([[env.x_threshold], [env.theta_threshold_radians]])
        self._sutton_barto = bool(kwargs.get("sutton_barto_reward"))
        self._state = np.zeros((4, num_envs))  # x, x', theta, theta'
        self._change = np.zeros((4, num_envs))
        self._steps = np.zeros(num_envs, np.int64)

    def reset(self, mask: np.ndarray, seeds: list[int]) -> np.ndarray:
        for i, seed in zip(np.flatnonzero(mask), seeds, strict=True):
            self._state[:, i] = gym.utils.seeding.np_random(seed)[0].uniform(-0.05, 0.05, size=(4,))
        self._steps[mask] = 0
        return self._state.T.astype(np.float32, order="C")  # (N, 4)

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        env, state = self._env, self._state
        _, x_dot, theta, theta_dot = state
        cos, sin = np.cos(theta), np.sin(theta)
        # Term by term in Gymnasium's order, on which the last bits depend.
        temp = (self._forces[actions] + env.polemass_length * (theta_dot * theta_dot) * sin) / env.total_mass
        inertia = env.length * (4.0 / 3.0 - env.masspole * (cos * cos) / env.total_mass)
        theta_acc = (env.gravity * sin - cos * temp) / inertia
        change = self._change
        change[0], change[2], change[3] = x_dot, theta_dot, theta_acc
        change[1] = temp - env.polemass_length * theta_acc * cos / env.total_mass
        state += env.tau * change
        outside = np.abs(state[::2]) > self._thresholds
        terminated = outside[0] | outside[1]
        self._steps += 1
        truncated = self._steps >= self._limit
        rewards = -terminated.astype(np.float32) if self._sutton_barto else np.ones(len(actions), np.float32)
        next_obs = state.T.astype(np.float32, order="C")  # (N, 4)
        return next_obs, rewards, terminated, truncated, terminated | truncated

    def render(self) -> np.ndarray:
        raise RuntimeError("the native CartPole does not render: make it with render_mode='rgb_array'")

    def close(self) -> None:
        self._env.close()


class Atari:
    """ALE's C++ vector environment with the standard protocol: 84x84 grey, frame skip 4 with a maximum over
    the last two frames, a stack of 4, up to 30 no-ops at the start (Machado et al., "Revisiting the Arcade
    Learning Environment", arXiv:1709.06009).

    A lost life ends a learning episode (terminated, not over) and the game goes on. It is read from the
    number of lives: of ALE's own options, `episodic_life` restarts the whole game, and `life_loss_info`
    leaves a game over to be told apart by its lives. As in Stable-Baselines3's EpisodicLifeEnv the last life
    does not count, since some games play on for a while with none left; and where a step limit cuts in at
    that very step, it is a truncation only, for in SAME_STEP mode the lives seen then are the next game's.
    """

    def __init__(
        self,
        spec: EnvSpec,
        num_envs: int,
        kwargs: dict[str, Any],
        max_episode_steps: int | None,
        mode: AutoresetMode,
        life_loss_ends: bool,
        screen: bool,
    ) -> None:
        from ale_py.vector_env import AtariVectorEnv

        kwargs = {**spec.kwargs, "num_threads": min(num_envs, os.cpu_count() or 1), **kwargs}
        if max_episode_steps:
            kwargs["max_num_frames_per_episode"] = max_episode_steps * kwargs["frameskip"]
        kwargs.update(autoreset_mode=mode, reward_clipping=False, episodic_life=False, life_loss_info=False)
        self.env = AtariVectorEnv(num_envs=num_envs, **kwargs)
        self.single_observation_space = self.env.single_observation_space
        self.single_action_space = self.env.single_action_space
        self.frame_stack: int = kwargs.get("stack_num", 4)
        self._life_loss_ends = life_loss_ends
        self._lives = np.zeros(num_envs, np.int32)
        # Its frames are grey and small. For pictures a second copy of environment 0 plays the same game in
        # colour: same seeds, same actions.
        self._screen: Any = None
        if screen:
            size = {"img_height": 210, "img_width": 160, "grayscale": False, "stack_num": 1}
            self._screen = AtariVectorEnv(num_envs=1, **{**kwargs, **size, "num_threads": 1})
        self._frame = np.zeros((210, 160, 3), np.uint8)

    def reset(self, mask: np.ndarray, seeds: list[int]) -> np.ndarray:
        obs, infos = self.env.reset(seed=np.array(seeds), options={"reset_mask": mask})
        self._lives = infos["lives"]
        if self._screen is not None and mask[0]:
            self._frame = self._screen.reset(seed=np.array(seeds[:1]))[0][0, 0]
        return obs

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        next_obs, rewards, terminated, truncated, infos = self.env.step(actions)
        if self._screen is not None:
            self._frame = self._screen.step(actions[:1])[0][0, 0]
        over = terminated | truncated
        if "final_obs" in infos and over.any():  # SAME_STEP
            next_obs = np.where(over[:, None, None, None], infos["final_obs"], next_obs)
        lives = infos["lives"]
        if self._life_loss_ends:
            terminated = terminated | ((lives > 0) & (lives < self._lives) & ~over)
        self._lives = lives
        return next_obs, rewards, terminated, truncated, over

    def render(self) -> np.ndarray:
        return self._frame

    def close(self) -> None:
        self.env.close()
        if self._screen is not None:
            self._screen.close()


class VectorEnv:
    """N environments of one kind; made by `make_vec`, stepped and reset together, autoreset out of sight.

    Public attributes: env_id, num_envs, seed, training, single_observation_space, single_action_space,
    backend (what is stepped), and frame_stack (1, or how many frames an Atari observation stacks along its
    first axis, the oldest first; each step shifts them by one).

    Every episode starts from a seed of its own, made of the seed, training or evaluation, the environment's
    index and the episode's, which neither the autoreset mode nor the backend changes.
    """

    def __init__(self, backend: Backend, spec: dict[str, Any], frame_stack: int, clip_rewards: bool) -> None:
        self.backend = backend
        self._spec = spec
        self._clip_rewards = clip_rewards
        self._closed = False
        self.env_id: str = spec["env_id"]
        self.num_envs: int = spec["num_envs"]
        self.seed: int = spec["seed"]
        self.training: bool = spec["training"]
        self.frame_stack = frame_stack
        self.single_observation_space = backend.single_observation_space
        self.single_action_space = backend.single_action_space
        self._obs: Obs = None  # None until the first reset
        self._episode = np.full(self.num_envs, -1, np.int64)  # which episode each environment is in
        self._returns = np.zeros(self.num_envs, np.float64)  # of the episode so far
        # The latest actions of all environments, at least as many as the longest running episode has, and
        # where in this log each environment's episode began.
        shape = (64, self.num_envs, *(self.single_action_space.shape or ()))
        self._actions = np.zeros(shape, self.single_action_space.dtype)
        self._logged = 0
        self._began = np.zeros(self.num_envs, np.int64)

    def reseed(self, seed: int) -> None:
        """Be as if made with this seed; `reset()` must come next."""
        self.seed = self._spec["seed"] = seed
        self._episode[:] = -1
        self._obs = None

    def reset(self) -> Obs:
        """Begin a new episode in every environment, whatever was running; its first observations (N, ...)."""
        return self._begin(np.ones(self.num_envs, np.bool_))

    def step(self, actions: np.ndarray) -> Step:
        """One action in every environment; `actions` (N, ...) are converted to the action space's dtype."""
        if self._obs is None:
            raise RuntimeError("step() before reset()")
        actions = np.asarray(actions, self._actions.dtype)
        if actions.shape != self._actions.shape[1:]:
            raise ValueError(f"actions must have the shape {self._actions.shape[1:]}, got {actions.shape}")
        self._log(actions)
        next_obs, rewards, terminated, truncated, over = self.backend.step(actions)
        _check_finite("reward", rewards, self.env_id)
        _check_finite("observation", next_obs, self.env_id)
        self._returns += rewards
        learned = (np.sign(rewards) if self._clip_rewards else rewards).astype(np.float32)
        if not np.count_nonzero(over):  # a fifth of what over.any() takes
            self._obs = next_obs
            return Step(next_obs, next_obs, learned, terminated, truncated, over, [])
        ended = np.flatnonzero(over)
        lengths = self._logged - self._began[ended]
        episodes = list(map(Episode, ended.tolist(), self._returns[ended].tolist(), lengths.tolist()))
        obs = self._begin(over)
        return Step(obs, next_obs, learned, terminated, truncated, over, episodes)

    def render(self) -> np.ndarray:
        """Environment 0 now, (H, W, 3) uint8; needs render_mode='rgb_array'."""
        if self._spec["render_mode"] is None:
            raise RuntimeError("render() needs make_vec(..., render_mode='rgb_array')")
        return np.asarray(self.backend.render())

    def close(self) -> None:
        """Release the environments; a second call does nothing."""
        if not self._closed:
            self._closed = True
            self.backend.close()

    def spec_dict(self) -> dict[str, Any]:
        """The arguments with which `make_vec` makes this again; JSON can hold them if it can env_kwargs."""
        return dict(self._spec)

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """(tensors, meta), for safetensors and JSON: where every environment stands, for `restore`.

        An environment stands at its episode's number, which gives the seed, and the actions since; a digest
        of its last observation tells whether replaying them led there again.
        """
        if self._obs is None:
            raise RuntimeError("state() before reset()")
        tensors = {
            "actions": self._actions[self._began.min() : self._logged].copy(),  # (T, N, ...)
            "episode": self._episode.copy(),
            "returns": self._returns.copy(),
            "lengths": self._logged - self._began,
        }
        return tensors, {"digests": [_digest(self._obs, i) for i in range(self.num_envs)]}

    def restore(self, tensors: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> tuple[Obs, bool]:
        """Go to where `state()` was taken, by a VectorEnv of the same spec_dict.

        Returns the observations there, and whether every environment got there exactly. One that did not is
        at the start of its next episode.
        """
        actions = np.asarray(tensors["actions"], self._actions.dtype)
        lengths = np.array(tensors["lengths"], np.int64)
        if actions.shape[1:] != self._actions.shape[1:] or lengths.max() != len(actions):
            raise ValueError(
                f"this state has actions of shape {actions.shape}, and {self.env_id} with num_envs="
                f"{self.num_envs} takes (T, {', '.join(map(str, self._actions.shape[1:]))})"
            )
        self._episode = np.array(tensors["episode"], np.int64)
        # All step together and reach their last action together: environment i begins steps - lengths[i]
        # late, and what it did before that is thrown away.
        steps = len(actions)
        began = steps - lengths
        failed = np.zeros(self.num_envs, np.bool_)
        obs = self._reset_backend(np.ones(self.num_envs, np.bool_))
        for t in range(steps):
            obs, _, _, _, over = self.backend.step(actions[t])
            failed |= over & (t >= began)  # an episode that was running cannot be over
            again = over | (t + 1 == began)
            if again.any():
                obs = self._reset_backend(again)
        failed |= np.array([_digest(obs, i) != meta["digests"][i] for i in range(self.num_envs)])
        self._actions = np.concatenate([actions, np.zeros_like(self._actions[:64])])
        self._logged, self._began = steps, began
        self._returns = np.array(tensors["returns"], np.float64)
        self._obs = self._begin(failed) if failed.any() else obs
        return self._obs, not failed.any()

    def _begin(self, mask: np.ndarray) -> Obs:
        """Begin the next episode where `mask` says so."""
        self._episode[mask] += 1
        self._returns[mask] = 0
        self._began[mask] = self._logged
        self._obs = self._reset_backend(mask)
        _check_finite("observation", self._obs, self.env_id)
        return self._obs

    def _reset_backend(self, mask: np.ndarray) -> Obs:
        envs = np.flatnonzero(mask)
        seeds = episode_seeds(self.seed, 0 if self.training else 1, envs, self._episode[envs])
        return self.backend.reset(mask, seeds.tolist())

    def _log(self, actions: np.ndarray) -> None:
        """Keep the actions; when the log is full, forget those of finished episodes, or double it."""
        if self._logged == len(self._actions):
            first = int(self._began.min())
            keep = self._logged - first
            room = np.zeros((max(64, 2 * keep), *self._actions.shape[1:]), self._actions.dtype)
            room[:keep] = self._actions[first:]
            self._actions, self._logged = room, keep
            self._began -= first
        self._actions[self._logged] = actions
        self._logged += 1


def _assign(obs: Obs, i: Any, value: Any) -> None:
    """obs[i] = value, for arrays and dicts of arrays."""
    if isinstance(obs, dict):
        for key in obs:
            obs[key][i] = value[key]
    else:
        obs[i] = value


def _check_finite(what: str, values: Obs, env_id: str) -> None:
    """FloatingPointError where an environment gave NaN or infinity, from which nothing can be learned.

    One such value makes the product of all with themselves so, which is the cheapest look at them.
    """
    if isinstance(values, dict):
        for part in values.values():
            _check_finite(what, part, env_id)
    elif (
        values.dtype.kind == "f"
        and not math.isfinite(np.vdot(values, values))
        and not np.isfinite(values).all()
    ):
        where = np.argwhere(~np.isfinite(values))[0]
        value = values[tuple(where)]
        raise FloatingPointError(f"{env_id} gave the {what} {value} in environment {where[0]}")


def _digest(obs: Obs, i: int) -> str:
    """SHA-256 of environment i's observation."""
    parts = [obs[key][i] for key in sorted(obs)] if isinstance(obs, dict) else [obs[i]]
    return hashlib.sha256(b"".join(np.asarray(part).tobytes() for part in parts)).hexdigest()
