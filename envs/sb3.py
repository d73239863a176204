"""A `VectorEnv` as Stable-Baselines3's VecEnv, so that its algorithms train on the transitions that ours see.

    from stable_baselines3 import PPO
    from foveal.envs import make_vec
    from foveal.envs.sb3 import SB3VecEnv

    PPO("MlpPolicy", SB3VecEnv(make_vec("CartPole-v1", num_envs=8))).learn(100_000)

`foveal.envs` does not import this module by itself: Stable-Baselines3 takes its time to import.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecEnv

from .vector import Obs, VectorEnv


class SB3VecEnv(VecEnv):
    """N environments in Stable-Baselines3's terms.

    `infos[i]` of a step has `TimeLimit.truncated`; where it ended an episode of learning,
    `terminal_observation`, the true final observation; and where it ended a real one,
    `episode = {"r": score, "l": steps, "t": seconds since the start}`, as its Monitor writes it, with the
    true score. A lost life in Atari training ends the first and not the second: `done`, and the observation
    returned is the terminal one, because the game goes on.
    """

    def __init__(self, env: VectorEnv):
        self.env = env
        # Copies, because Stable-Baselines3 seeds the one and its VecNormalize changes the other.
        own_spaces = copy.deepcopy((env.single_observation_space, env.single_action_space))
        super().__init__(env.num_envs, *own_spaces)
        self._actions = np.empty(0)
        self._began = time.perf_counter()

    def reset(self) -> Obs:
        """First observations (N, ...), or a dict of them; after `seed(s)`, of environments as made with s."""
        if self._seeds[0] is not None:
            self.env.reseed(self._seeds[0])
        self._reset_seeds()
        self._reset_options()
        return self.env.reset()

    def step_async(self, actions: np.ndarray) -> None:
        self._actions = actions

    def step_wait(self) -> tuple[Obs, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        """obs (N, ...), rewards float32 (N,) as learning sees them, dones bool (N,), infos."""
        step = self.env.step(self._actions)
        dones = step.terminated | step.truncated
        infos: list[dict[str, Any]] = [{"TimeLimit.truncated": False} for _ in range(self.num_envs)]
        for i in np.flatnonzero(dones):
            infos[i]["TimeLimit.truncated"] = bool(step.truncated[i] and not step.terminated[i])
            infos[i]["terminal_observation"] = _row(step.next_obs, int(i))
        for episode in step.episodes:
            seconds = round(time.perf_counter() - self._began, 6)
            infos[episode.env]["episode"] = {"r": episode.episode_return, "l": episode.length, "t": seconds}
        return step.obs, step.rewards, dones, infos

    def close(self) -> None:
        self.env.close()

    def get_images(self) -> Sequence[np.ndarray | None]:
        """Environment 0's picture: of the others there is none."""
        return [self.env.render()]

    # What Stable-Baselines3 asks of single environments. Only Gymnasium's sync and async backends have them.

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        if attr_name == "render_mode":
            values = [self.env.spec_dict()["render_mode"]] * self.num_envs
        else:
            values = list(self._single_envs(attr_name).get_attr(attr_name))
        return [values[i] for i in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        values, chosen = [value] * self.num_envs, list(self._get_indices(indices))
        if len(chosen) < self.num_envs:
            values = self.get_attr(attr_name)
            for i in chosen:
                values[i] = value
        self._single_envs(attr_name).set_attr(attr_name, values)

    def env_method(
        self, method_name: str, *method_args: Any, indices: Any = None, **method_kwargs: Any
    ) -> list[Any]:
        """Call a method of every environment. ValueError for some of them only."""
        if len(list(self._get_indices(indices))) < self.num_envs:
            raise ValueError(f"indices: {method_name} is called in all environments or none, got {indices}")
        return list(self._single_envs(method_name).call(method_name, *method_args, **method_kwargs))

    def env_is_wrapped(self, wrapper_class: type, indices: Any = None) -> list[bool]:
        """True for Monitor, whose records are here: `evaluate_policy` takes the true scores from them."""
        return [issubclass(wrapper_class, Monitor) for _ in self._get_indices(indices)]

    def _single_envs(self, wanted: str) -> Any:
        vector = getattr(self.env.backend, "env", None)
        if not (hasattr(vector, "call") and hasattr(vector, "set_attr")):
            raise AttributeError(f"{self.env.env_id} is stepped as one: nothing single has {wanted!r}")
        return vector


def _row(obs: Obs, i: int) -> Any:
    return {key: part[i] for key, part in obs.items()} if isinstance(obs, dict) else obs[i]
