"""Making a `VectorEnv`: which implementation with what arguments, and what a user can get wrong."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping, Set
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec, load_env_creator
from gymnasium.vector import AutoresetMode

from .minatar import Games
from .registry import EXTRAS, find_spec, make_env
from .vector import CARTPOLE_VECTOR, Atari, Backend, CartPole, Gymnasium, VectorEnv

BACKENDS = ("auto", "sync", "async", "native")

EVALUATION_STEP_LIMIT = 10_000
"""Agent steps after which an evaluation episode is truncated, where the environment has no limit."""

CARTPOLE_NATIVE_FROM = 4
"""Environments from which CartPole's array implementation is faster than stepping one after the other."""

MODES = tuple(mode.value for mode in AutoresetMode)

ATARI_VECTOR = "ale_py.vector_env:AtariVectorEnv"
GLIMPSE_VECTOR = "foveal.envs.glimpse:GlimpseVectorEnv"
ARRAY_SPACES = (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)


def make_vec(
    env_id: str,
    num_envs: int = 1,
    seed: int = 0,
    *,
    training: bool = True,
    backend: str = "auto",
    autoreset_mode: str | AutoresetMode | None = None,
    env_kwargs: Mapping[str, Any] | None = None,
    max_episode_steps: int | None = None,
    render_mode: str | None = None,
) -> VectorEnv:
    """`num_envs` environments of one kind as a `VectorEnv`.

    env_id: any registered Gymnasium id, `ALE/*` (84x84x4 grey, see `Atari`), `MinAtar/*`, or `module:Env-v0`.
    seed: together with `training` fixes every episode; not negative.
    training: False for evaluation: seeds of their own, no clipped rewards, no ending at a lost life, and a
        limit of `EVALUATION_STEP_LIMIT` steps where the environment has none.
    backend: `sync` (one after the other), `async` (a process each), `native` (ALE's, CartPole's and
        Glimpse's arrays, MinAtar's games, Latent's frames in one batch), or `auto`: native for ALE, Glimpse,
        MinAtar, Latent and for four or more CartPoles, else sync.
    autoreset_mode: what Gymnasium's environment does at an ending ("NextStep", "SameStep", "Disabled"); none
        of them changes the transitions. None takes the cheapest.
    env_kwargs: handed to the environment; for ALE to AtariVectorEnv (`repeat_action_probability`, .25 by
        default, `frameskip`, `full_action_space`, ...), where `reward_clipping=False` and
        `life_loss_info=False` switch off what training does.
    max_episode_steps: truncates episodes after so many agent steps, in place of the registered limit.
    render_mode: None, or "rgb_array" for `render()`.

    Raises ValueError, in one line, for whatever of these it cannot take.

    >>> from foveal.envs import make_vec
    >>> env = make_vec("CartPole-v1", num_envs=2, seed=1)
    >>> env.reset().shape
    (2, 4)
    >>> step = env.step(np.array([0, 1]))
    >>> step.rewards, step.reset
    (array([1., 1.], dtype=float32), array([False, False]))
    """
    for name, value in (("num_envs", num_envs), ("max_episode_steps", max_episode_steps)):
        optional = name == "max_episode_steps" and value is None
        if not optional and (isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1):
            raise ValueError(f"{name} must be a positive integer, got {value!r}")
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or seed < 0:
        raise ValueError(f"seed must be an integer, not negative, got {seed!r}")
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if render_mode not in (None, "rgb_array"):
        raise ValueError(f"render_mode must be None or 'rgb_array', got {render_mode!r}")
    if env_kwargs is not None and not isinstance(env_kwargs, Mapping):
        raise ValueError(f"env_kwargs must be a dict of arguments, got {env_kwargs!r}")
    mode = AutoresetMode(autoreset_mode) if autoreset_mode in MODES else autoreset_mode
    if mode is not None and not isinstance(mode, AutoresetMode):
        raise ValueError(f"autoreset_mode must be None or one of {', '.join(MODES)}, got {autoreset_mode!r}")
    kwargs = dict(env_kwargs or {})
    ours = {"render_mode", "max_episode_steps", "num_envs"} & kwargs.keys()
    if ours:
        raise ValueError(f"env_kwargs: {', '.join(sorted(ours))} is an argument of its own")
    spec = find_spec(env_id)
    limit = None if max_episode_steps is None else int(max_episode_steps)
    made_with = {
        "env_id": env_id,
        "num_envs": int(num_envs),
        "seed": int(seed),
        "training": bool(training),
        "backend": backend,
        "autoreset_mode": mode.value if mode else None,
        "env_kwargs": dict(kwargs),
        "max_episode_steps": limit,
        "render_mode": render_mode,
    }
    if spec.vector_entry_point == ATARI_VECTOR:
        clip_rewards = kwargs.pop("reward_clipping", True) and training
        life_loss_ends = kwargs.pop("life_loss_info", True) and training
        atari = _make_atari(
            spec, int(num_envs), kwargs, limit, backend, mode, life_loss_ends, render_mode is not None
        )
        return VectorEnv(atari, made_with, atari.frame_stack, clip_rewards)
    if spec.vector_entry_point == GLIMPSE_VECTOR:
        kwargs.setdefault("split", "train" if training else "test")
        glimpse = _make_glimpse(spec, int(num_envs), kwargs, limit, backend, mode, render_mode)
        return VectorEnv(glimpse, made_with, frame_stack=1, clip_rewards=False)
    together = _together(spec)
    if together and mode is None and backend in ("auto", "native"):
        try:
            made = together(int(num_envs), bool(training), limit, render_mode, **kwargs)
        except Exception as error:
            raise _explained(error, spec, kwargs) from error
        return VectorEnv(made, made_with, frame_stack=1, clip_rewards=False)
    if not training and limit is None and spec.max_episode_steps is None:
        limit = EVALUATION_STEP_LIMIT
    made = _make_gymnasium(spec, int(num_envs), kwargs, limit, backend, mode, render_mode)
    return VectorEnv(made, made_with, frame_stack=1, clip_rewards=False)


def _together(spec: EnvSpec) -> Callable[..., Backend] | None:
    """What makes all environments of a kind of ours as one Backend, where its class has that: `together`, a
    function of num_envs, training, max_episode_steps, render_mode and the env_kwargs."""
    if not str(spec.entry_point).startswith("foveal."):
        return None
    return getattr(load_env_creator(str(spec.entry_point)), "together", None)


def _make_atari(
    spec: EnvSpec,
    num_envs: int,
    kwargs: dict[str, Any],
    limit: int | None,
    backend: str,
    mode: AutoresetMode | None,
    life_loss_ends: bool,
    screen: bool,
) -> Atari:
    from ale_py.vector_env import AtariVectorEnv

    if backend not in ("auto", "native"):
        raise ValueError(
            f"backend: {spec.id} has only ALE's own vector environment (auto, native), got {backend!r}"
        )
    if mode is AutoresetMode.DISABLED:
        raise ValueError(f"autoreset_mode: {spec.id} has NextStep and SameStep, got 'Disabled'")
    taken = inspect.signature(AtariVectorEnv).parameters.keys() | {"reward_clipping", "life_loss_info"}
    taken -= {"game", "num_envs", "batch_size", "grayscale", "episodic_life", "autoreset_mode"}
    _check_kwargs(spec, kwargs, taken)
    try:
        return Atari(spec, num_envs, kwargs, limit, mode or AutoresetMode.NEXT_STEP, life_loss_ends, screen)
    except Exception as error:
        raise _explained(error, spec, kwargs) from error


def _check_kwargs(spec: EnvSpec, kwargs: Mapping[str, Any], taken: Set[str]) -> None:
    if refused := kwargs.keys() - taken:
        names = ", ".join(sorted(refused))
        raise ValueError(f"env_kwargs: {spec.id} does not take {names}; it takes {', '.join(sorted(taken))}")


def _make_glimpse(
    spec: EnvSpec,
    num_envs: int,
    kwargs: dict[str, Any],
    limit: int | None,
    backend: str,
    mode: AutoresetMode | None,
    render_mode: str | None,
) -> Backend:
    from .glimpse import Glimpse, GlimpseVectorEnv

    if backend not in ("auto", "native") or mode not in (None, AutoresetMode.DISABLED):
        raise ValueError(f"backend: {spec.id} is stepped as one (auto, native; autoreset_mode Disabled)")
    if spec.kwargs["form"] == "dict":
        raise ValueError(
            f"env_id {spec.id!r}: its actions are a look and an answer; agents take foveal/GlimpseBox-v0 "
            "(Box actions) or foveal/GlimpseGrid-v0 (Discrete ones)"
        )
    ours = {"num_envs", "form", "render_mode", "autoreset_mode"}
    taken = inspect.signature(GlimpseVectorEnv).parameters.keys() - ours
    _check_kwargs(spec, kwargs, taken)
    return Glimpse(num_envs, {**spec.kwargs, **kwargs, "render_mode": render_mode}, limit)


def _make_gymnasium(
    spec: EnvSpec,
    num_envs: int,
    kwargs: dict[str, Any],
    limit: int | None,
    backend: str,
    mode: AutoresetMode | None,
    render_mode: str | None,
) -> Backend:
    native = (
        spec.vector_entry_point == CARTPOLE_VECTOR
        and mode in (None, AutoresetMode.NEXT_STEP)
        and render_mode is None
        and kwargs.keys() <= {"sutton_barto_reward"}
    )
    games = spec.namespace == "MinAtar" and mode is None
    if backend == "native" and not (native or games):
        raise ValueError(
            "backend: native is for ALE/*, MinAtar/* and Latent (no autoreset_mode) and for CartPole (no "
            "render_mode, autoreset_mode NextStep, env_kwargs sutton_barto_reward); it cannot make this "
            f"{spec.id}"
        )
    if native and (backend == "native" or (backend == "auto" and num_envs >= CARTPOLE_NATIVE_FROM)):
        return CartPole(spec, num_envs, kwargs, limit)
    if render_mode is not None:
        kwargs = {**kwargs, "render_mode": render_mode}
    mode = mode or AutoresetMode.DISABLED
    try:
        if games and backend in ("auto", "native"):
            envs = [make_env(spec, None, kwargs, os.getpid()) for _ in range(num_envs)]
            return Games(envs[0], [env.unwrapped.game for env in envs], limit)  # type: ignore[attr-defined]
        made = Gymnasium(spec, num_envs, kwargs, limit, mode, parallel=backend == "async")
    except Exception as error:
        raise _explained(error, spec, kwargs) from error
    observations, actions = made.single_observation_space, made.single_action_space
    parts = observations.spaces.values() if isinstance(observations, spaces.Dict) else [observations]
    problem = None
    if not all(isinstance(part, ARRAY_SPACES) for part in parts):
        problem = f"its observations are {observations}; foveal takes arrays and dicts of arrays"
    elif not isinstance(actions, ARRAY_SPACES):
        problem = f"its actions are {actions}; foveal takes arrays"
    elif render_mode is not None and render_mode not in (made.env.metadata.get("render_modes") or ()):
        problem = f"it has no render_mode {render_mode!r}"
    if problem:
        made.close()
        raise ValueError(f"env_id {spec.id!r}: {problem}")
    return made


def _explained(error: Exception, spec: EnvSpec, kwargs: dict[str, Any]) -> Exception:
    """The error of an environment that could not be made, in one line if it is the user's to mend."""
    # gymnasium.make puts the whole call behind a TypeError's text
    cause = error.__cause__ if isinstance(error.__cause__, TypeError) else error
    text = str(cause).strip().partition("\n")[0]
    if isinstance(error, gym.error.DependencyNotInstalled):
        for prefix, extra in EXTRAS.items():
            if str(spec.entry_point).startswith(prefix):
                return ValueError(
                    f'env_id {spec.id!r} needs the {extra} extra: pip install "foveal[{extra}]"'
                )
    if isinstance(error, gym.error.DependencyNotInstalled | ImportError):
        return ValueError(f"env_id {spec.id!r} cannot be made here: {text}")
    if isinstance(cause, TypeError) and " missing " in text:
        return ValueError(f"env_kwargs {kwargs or '(none)'}: {spec.id} is {text[text.index('missing') :]}")
    if kwargs:
        return ValueError(f"env_kwargs {kwargs}: {spec.id} refuses them: {type(error).__name__}: {text}")
    return error
