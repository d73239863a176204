"""foveal collect: what an agent sees, as a dataset that models of images are trained on."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import tyro
from gymnasium import spaces
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


class Play(NamedTuple):
    """What was seen, in the order in which it was: of N environments in turn, a step after the other."""

    frames: np.ndarray
    """(F, C, H, W) uint8."""
    high: int
    """Their largest possible value."""
    num_envs: int
    """N."""
    steps: dict[str, np.ndarray]
    """What came after each frame: `actions` (F,) int64 from 0, true `rewards` (F,) float32, `terminated` and
    `truncated` (F,) bool. Empty where frames were left out, or actions are not Discrete."""
    num_actions: int = 0
    """Where there are steps."""


def collect(given: Collect) -> int:
    played = play(given)
    write(given.out, played)
    shape = "x".join(map(str, played.frames.shape[1:]))
    say(f"{len(played.frames):,} frames of {shape}, values to {played.high}: {given.out}")
    say(f"to train on them: foveal train vae --dataset {given.out}")
    if played.steps:
        say(f"and then: foveal train world-model --dataset {given.out} --vae RUN")
    return 0


def play(given: Collect) -> Play:
    """What the policy sees and does. ValueError where the environment shows no uint8 images."""
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
        action_space: Any = env.single_action_space
        actions = batch_space(action_space, env.num_envs)
        actions.seed(given.seed)
        whole = given.every == 1 and isinstance(action_space, spaces.Discrete)
        kept: list[np.ndarray] = []
        after: dict[str, list[np.ndarray]] = {
            name: [] for name in ("actions", "rewards", "terminated", "truncated")
        }
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
            if whole:
                after["actions"].append(np.asarray(chosen, np.int64) - int(action_space.start))
                after["rewards"].append(taken.rewards)
                after["terminated"].append(taken.terminated)
                after["truncated"].append(taken.truncated)
            obs, first, step = taken.obs, taken.reset, step + 1
    frames = np.concatenate(kept)[: given.frames]
    steps = {name: np.concatenate(part)[: given.frames] for name, part in after.items() if part}
    count = int(action_space.n) if whole else 0
    return Play(frames, int(space.high.max()), given.num_envs, steps, count)


def write(path: Path, played: Play) -> None:
    """Frames as a dataset of one class: the last fifth to test, half as many before them to validate; and
    under the same prefixes what came after each of them, where there are enough for whole steps of all
    environments in each part.

    Cut by time, since frames chosen at random would have their neighbours among those trained on.
    """
    frames, envs = played.frames, played.num_envs
    test = len(frames) // 5
    cuts = [len(frames) - test - test // 2, len(frames) - test]
    whole = [cut - cut % envs for cut in cuts]
    parts: dict[str, Any] = {"high": np.array(played.high)}
    pieces: dict[str, list[np.ndarray]] = {}
    if played.steps and 0 < whole[0] < whole[1]:
        parts |= {"num_envs": np.array(envs), "num_actions": np.array(played.num_actions)}
        cuts, pieces = whole, {name: np.split(array, whole) for name, array in played.steps.items()}
    for number, (prefix, part) in enumerate(zip(("", "val_", "test_"), np.split(frames, cuts))):
        parts |= {f"{prefix}images": part, f"{prefix}labels": np.zeros(len(part), np.int64)}
        parts |= {prefix + name: piece[number] for name, piece in pieces.items()}
    np.savez_compressed(path, **parts)
