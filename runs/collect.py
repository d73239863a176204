"""foveal collect: what an agent sees, as a dataset that models of images are trained on."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from gymnasium.vector.utils import batch_space

from ..agents import load
from ..envs import make_vec
from ..vision import is_image
from .lifecycle import say


@dataclass(frozen=True)
class Collect:
    """Play, and write the observations to an .npz file that --dataset takes."""

    policy: str = "random"
    """random for uniformly random actions, or the run of an agent, which acts with its own randomness."""
    env_id: str | None = None
    """The environment; with an agent its own, if not given."""
    frames: int = 10_000
    """Observations to write."""
    every: int = 1
    """Steps between two observations that are kept: neighbours are much alike."""
    num_envs: int = 8
    """Environments stepped side by side."""
    seed: int = 0
    """Of environments and random actions."""
    out: Path = Path("frames.npz")
    """The file to write."""
    device: str = "auto"
    """Of the agent: cpu, cuda, ...; auto is cuda where there is one."""
    imports: Annotated[tuple[str, ...], tyro.conf.arg(name="import")] = ()
    """Modules of your own that the environment or the run's encoder comes from."""

    def __post_init__(self) -> None:
        for name, least in (("frames", 10), ("every", 1), ("num_envs", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be {least} or more, got {getattr(self, name)}")
        if self.policy == "random" and self.env_id is None:
            raise ValueError("env_id is needed with a random policy")
        if self.out.suffix != ".npz":
            raise ValueError(f"out must end in .npz, got {self.out}")
        if not self.out.absolute().parent.is_dir():
            raise ValueError(f"out: there is no folder {self.out.parent}")


def collect(given: Collect) -> int:
    frames, high = play(given)
    write(given.out, frames, high)
    shape = "x".join(map(str, frames.shape[1:]))
    say(f"{len(frames):,} frames of {shape}, values to {high}: {given.out}")
    say(f"to train on them: foveal train vae --dataset {given.out}")
    return 0


def play(given: Collect) -> tuple[np.ndarray, int]:
    """Observations (N, C, H, W) uint8 in the order in which they were seen, and their largest possible value.

    Raises ValueError where the environment shows no uint8 images.
    """
    agent: Any = None if given.policy == "random" else load(Path(given.policy), device=given.device)
    spec: dict[str, Any] = {} if agent is None else agent.env_spec()
    spec = {**spec, "num_envs": given.num_envs, "seed": given.seed, "training": False, "render_mode": None}
    if given.env_id is not None:
        spec["env_id"] = given.env_id
    with closing(make_vec(**spec)) as env:
        space: Any = env.single_observation_space
        if not is_image(space) or space.dtype != np.uint8:
            raise ValueError(f"env_id: {spec['env_id']} shows {space}; collect takes uint8 images")
        if agent is not None and agent.observation_space != space:
            seen = agent.observation_space
            raise ValueError(f"policy: {given.policy} sees {seen}, {spec['env_id']} shows {space}")
        actions = batch_space(env.single_action_space, env.num_envs)
        actions.seed(given.seed)
        kept: list[np.ndarray] = []
        obs, state, first = env.reset(), None, np.ones(env.num_envs, np.bool_)
        step = 0
        while len(kept) * env.num_envs < given.frames:
            if step % given.every == 0:
                kept.append(np.array(obs))
            if agent is None:
                chosen = np.asarray(actions.sample())
            else:
                chosen, state = agent.predict(obs, state, first, deterministic=False)
            taken = env.step(chosen)
            obs, first, step = taken.obs, taken.reset, step + 1
    return np.concatenate(kept)[: given.frames], int(space.high.max())


def write(path: Path, frames: np.ndarray, high: int) -> None:
    """Frames as a dataset of one class: the last fifth to test, half as many before them to validate.

    Cut by time, since frames chosen at random would have their neighbours among those trained on.
    """
    test = len(frames) // 5
    cuts = np.split(frames, [len(frames) - test - test // 2, len(frames) - test])
    parts: dict[str, Any] = {"high": np.array(high)}
    for name, part in zip(("", "val_", "test_"), cuts):
        parts |= {f"{name}images": part, f"{name}labels": np.zeros(len(part), np.int64)}
    np.savez_compressed(path, **parts)
