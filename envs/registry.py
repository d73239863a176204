"""Which environments there are, and how one of them is made.

Every environment leaves here with channels-first uint8 images whose space tells their true high, so that the
encoders see one convention: 255 for pixels, 1 for boolean planes such as MinAtar's.
"""

from __future__ import annotations

import difflib
import importlib
import logging
import os
import signal
import sys
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec

gym.register("foveal/GridWorld-v0", "foveal.envs.gridworld:GridWorld", max_episode_steps=100)
gym.register("foveal/MaskedCartPole-v0", "foveal.envs.masked:MaskedCartPole", max_episode_steps=500)

for _form, _suffix in (("dict", ""), ("box", "Box"), ("grid", "Grid")):
    gym.register(
        f"foveal/Glimpse{_suffix}-v0",
        "foveal.envs.glimpse:GlimpseEnv",
        vector_entry_point="foveal.envs.glimpse:GlimpseVectorEnv",
        kwargs={"form": _form},
    )

NAMESPACES = {"ALE": ("ale_py", "atari"), "MinAtar": ("minatar.gym", "minatar")}
"""Namespace -> (the module that registers its environments, foveal's extra that installs it)."""

EXTRAS = {"gymnasium.envs.box2d": "box2d", "gymnasium.envs.mujoco": "mujoco"}
"""Module prefix of an entry point -> foveal's extra that installs what it needs."""


def _register(namespace: str) -> str | None:
    """Register a namespace's environments; says in one line why it could not, or returns None."""
    module, extra = NAMESPACES[namespace]
    package = module.partition(".")[0]
    # minatar imports seaborn to draw, and pandas and scipy with it, some seconds of every start; we draw
    # ourselves. To what is None here an import is an ImportError, which minatar catches and warns of.
    unwanted = [name for name in ("matplotlib", "seaborn") if name not in sys.modules]
    sys.modules.update(dict.fromkeys(unwanted))  # type: ignore[arg-type]
    logging.disable(logging.WARNING)
    try:
        importlib.import_module(package)
        registration = importlib.import_module(module)
        if namespace == "MinAtar" and "MinAtar/Breakout-v1" not in gym.registry:
            registration.register_envs()
    except Exception as error:  # some break with other than ImportError
        if isinstance(error, ModuleNotFoundError) and error.name == package:
            return f'needs the {extra} extra: pip install "foveal[{extra}]"'
        return f"needs {package}, which is installed but does not import: {type(error).__name__}: {error}"
    finally:
        logging.disable(logging.NOTSET)
        for name in unwanted:
            del sys.modules[name]
    return None


def find_spec(env_id: str) -> EnvSpec:
    """The Gymnasium spec of an environment id; nothing is made.

    `env_id` is any registered id (`CartPole-v1`), `ALE/*`, `MinAtar/*`, or `module:Env-v0`, for which the
    module is imported first so that it can register its environments.

    Raises ValueError, in one line: an unknown id (with the nearest names), a module that cannot be imported,
    an extra that is missing (with the command that installs it).
    """
    if not isinstance(env_id, str) or not env_id:
        raise ValueError(f"env_id must be a Gymnasium environment id such as 'CartPole-v1', got {env_id!r}")
    module, _, name = env_id.rpartition(":")
    if module:
        try:
            importlib.import_module(module)
        except Exception as error:
            message = f"env_id {env_id!r}: cannot import {module!r} ({type(error).__name__}: {error})"
            raise ValueError(message) from error
    namespace = name.partition("/")[0]
    missing = None
    if namespace in NAMESPACES:
        missing = _register(namespace)
    elif name not in gym.registry:
        for other in NAMESPACES:  # a hint may lie there, as may an old Atari id
            _register(other)
    if name in gym.registry:
        return gym.registry[name]
    if missing:
        raise ValueError(f"env_id {env_id!r} {missing}")
    nearest = nearest_env_ids(name)
    hint = f"; did you mean {' or '.join(nearest)}?" if nearest else "; `foveal list environments` names them"
    raise ValueError(f"env_id {env_id!r} is no registered Gymnasium environment{hint}")


def nearest_env_ids(name: str, count: int = 3) -> list[str]:
    """Up to `count` registered ids that look like `name`, whatever its case, namespace or version."""
    known: dict[str, str] = {}
    for env_id in list_env_ids():
        known[env_id.lower()] = env_id
        known[env_id.lower().rpartition("/")[2].rpartition("-v")[0]] = (
            env_id  # later versions come last and win
        )
    bare = name.lower().rpartition("/")[2].partition("-v")[0]
    close = [known[bare]] if bare in known else []
    for wanted in (name.lower(), bare):
        close += [known[key] for key in difflib.get_close_matches(wanted, known, n=count, cutoff=0.7)]
    return list(dict.fromkeys(close))[:count]


def list_env_ids() -> list[str]:
    """Ids that `make_vec` takes, sorted: Gymnasium's, the user's, and `ALE/*` and `MinAtar/*` if installed.

    Left out are what it does not take, Blackjack (observes a tuple) and Gymnasium's bridges to other
    libraries (jax, mujoco-py, the old gym); and Atari's old ids without a namespace, which it takes as plain
    single environments with frames of 210x160.
    """
    for namespace in NAMESPACES:
        _register(namespace)

    def offered(spec: EnvSpec) -> bool:
        if spec.namespace in ("phys2d", "tabular") or spec.name.startswith("GymV2"):
            return False
        if "_raise_mujoco_py_error" in str(spec.entry_point) or spec.name == "Blackjack":
            return False
        return spec.entry_point != "ale_py.env:AtariEnv" or spec.namespace == "ALE"

    return sorted(spec.id for spec in gym.registry.values() if offered(spec))


def make_env(spec: EnvSpec, max_episode_steps: int | None, kwargs: dict[str, Any], parent: int) -> gym.Env:
    """One environment with our image convention. `parent` is the id of the process that owns the vector."""
    if os.getpid() != parent:
        # A worker: Ctrl-C reaches the whole process group, and the parent has still to finish its step and
        # write a checkpoint; and the parent's own handlers came along with fork.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    env = gym.make(spec, max_episode_steps=max_episode_steps, **kwargs)
    if spec.namespace == "MinAtar":
        from .minatar import MinAtar

        env = MinAtar(env)
    space, convert = image_view(env.observation_space)
    return gym.wrappers.TransformObservation(env, convert, space) if convert else env


def image_view(space: spaces.Space) -> tuple[spaces.Space, Callable[[Any], Any] | None]:
    """The space with its images channels first, and what converts observations (None: nothing).

    An image is a Box of rank 3. It is channels first already where its first axis is strictly the shortest.
    Booleans of any rank become uint8, as they are 0 or 1. Looks into Dict spaces, whose order stays.
    """
    if isinstance(space, spaces.Dict):
        views = {key: image_view(sub) for key, sub in space.spaces.items()}
        converts = {key: convert for key, (_, convert) in views.items() if convert}
        if not converts:
            return space, None
        return spaces.Dict(OrderedDict((key, sub) for key, (sub, _) in views.items())), lambda obs: {
            key: converts[key](value) if key in converts else value for key, value in obs.items()
        }
    if not isinstance(space, spaces.Box):
        return space, None
    shape = space.shape
    move = len(shape) == 3 and not shape[0] < min(shape[1:])
    dtype: Any = np.uint8 if space.dtype == np.bool_ else space.dtype
    if not move and dtype == space.dtype:
        return space, None

    def convert(obs: np.ndarray) -> np.ndarray:
        obs = np.moveaxis(obs, -1, 0) if move else obs  # (H, W, C) -> (C, H, W)
        return obs.astype(dtype)

    return spaces.Box(convert(space.low), convert(space.high), dtype=dtype), convert
