"""`foveal/Glimpse-v0`: find out what an image shows by looking at small parts of it.

The task of "Recurrent Models of Visual Attention" (Mnih et al. 2014, 1406.6247) as an environment. An episode
is one image, `glimpses` steps long: a first glimpse comes with the reset, each action says where the next one
is taken, and the last one what the image is; 1 is the reward of the right answer, everything else has none.

Many images are looked at together: the vector environment is the native one, the single one is made of it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space

from ..vision import Dataset, Split, load_dataset
from ..vision.canvas import clutter_pieces, on_canvas
from ..vision.fixations import OPEN, RIGHT, WRONG, draw_fixations
from ..vision.glimpse import check_glimpse, framed, look

FORMS = ("dict", "box", "grid")
CANVASES = 20_000
"""Training canvases that are made of a data set's images; more of them take longer to make."""

Obs = Any


class GlimpseVectorEnv(gym.vector.VectorEnv):
    """`num_envs` images that are looked at together.

    dataset: a name that `load_dataset` knows, or a `Dataset`. Where neither image_size nor a canvas is given,
        digits are doubled and put on a canvas of 40x40 pixels: as they are there is nothing to look for.
    data_dir, image_size: of `load_dataset`.
    translated, cluttered: side of the canvas on which images lie anywhere, alone or among pieces of others.
    split: train, validation or test.
    seed_of_canvases: of where things lie on the training canvases.
    glimpses, patch, scales, background: as of `glimpse` and RAM.
    form: dict, where observations are {"glimpse": float32 (scales * C, patch, patch) in [0, 1], "location":
        (2,), where it was taken, (x, y) in [-1, 1], "time": (1,), the share of the glimpses that are taken},
        and actions {"look": Box (2,) in [-1, 1], "answer": Discrete}.
        box: observations are all of that as one vector; actions Box in [-1, 1], the look and then a number
        for each class, of which the largest is the answer.
        grid: the same vector; actions Discrete, max(grid * grid, classes) of them. Action a looks at cell a
        mod grid^2 of a grid of looks, row by row, and answers a mod classes, of which an episode uses one:
        the look, and at its last step the answer.
    grid: looks in a row and in a column of that grid.

    At 1 of "time" the next action's answer counts, and its look does not.

    Raises ValueError, in one line, for what it cannot take.
    """

    metadata: dict[str, Any] = {  # noqa: RUF012
        "render_modes": ["rgb_array"],
        "render_fps": 2,
        "autoreset_mode": AutoresetMode.NEXT_STEP,
    }

    def __init__(
        self,
        num_envs: int = 1,
        dataset: str | Dataset = "digits",
        data_dir: str | Path | None = None,
        image_size: int | None = None,
        translated: int | None = None,
        cluttered: int | None = None,
        split: str = "train",
        seed_of_canvases: int = 0,
        glimpses: int = 6,
        patch: int = 8,
        scales: int = 1,
        background: int = 0,
        form: str = "dict",
        grid: int = 5,
        render_mode: str | None = None,
        autoreset_mode: AutoresetMode = AutoresetMode.NEXT_STEP,
    ):
        for name, value in (("num_envs", num_envs), ("glimpses", glimpses), ("grid", grid)):
            if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        for name, text, known in (
            ("form", form, FORMS),
            ("split", split, ("train", "validation", "test")),
            ("render_mode", render_mode, (None, "rgb_array")),
        ):
            if text not in known:
                raise ValueError(f"{name} must be one of {', '.join(map(str, known))}, got {text!r}")
        if autoreset_mode not in (AutoresetMode.NEXT_STEP, AutoresetMode.DISABLED):
            raise ValueError(f"autoreset_mode must be NextStep or Disabled, got {autoreset_mode}")
        if not isinstance(dataset, Dataset):
            dataset = load_canvases(dataset, data_dir, image_size, translated, cluttered, seed_of_canvases)
        self.images: Split = getattr(dataset, split)
        if not len(self.images):
            raise ValueError(f"split: {dataset.name} has no {split} images")
        self.classes, self.high = dataset.classes, float(dataset.high)
        channels, height, width = dataset.space.shape
        check_glimpse(patch, scales, (height, width))
        self.glimpses, self.patch, self.scales, self.background = glimpses, patch, scales, background
        self.form, self.render_mode, self.autoreset_mode = form, render_mode, autoreset_mode
        self.metadata = {**self.metadata, "autoreset_mode": autoreset_mode}
        self.num_envs = num_envs
        # Cells of the grid, row by row; each look is at the middle of one.
        middles = (2 * np.arange(grid) + 1) / grid - 1
        self.cells = np.stack(np.meshgrid(middles, middles), -1).reshape(-1, 2).astype(np.float32)
        one = spaces.Dict(
            {
                "glimpse": spaces.Box(0, 1, (scales * channels, patch, patch), np.float32),
                "location": spaces.Box(-1, 1, (2,), np.float32),
                "time": spaces.Box(0, 1, (1,), np.float32),
            }
        )
        classes = len(self.classes)
        if form == "dict":
            self.single_observation_space = one
            self.single_action_space = spaces.Dict(
                {"answer": spaces.Discrete(classes), "look": spaces.Box(-1, 1, (2,), np.float32)}
            )
        else:
            low = np.concatenate([part.low.ravel() for part in one.values()])  # type: ignore[attr-defined]
            self.single_observation_space = spaces.Box(low, np.ones_like(low), dtype=np.float32)
            self.single_action_space = (
                spaces.Box(-1, 1, (2 + classes,), np.float32)
                if form == "box"
                else spaces.Discrete(max(len(self.cells), classes))
            )
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        largest = patch << (scales - 1)
        self.frames = torch.zeros(num_envs, channels, height + largest, width + largest, dtype=torch.uint8)
        self.image = np.zeros(num_envs, np.int64)
        """Which image of the split each environment shows."""
        self.labels = np.zeros(num_envs, np.int64)
        self.location = np.zeros((num_envs, 2), np.float32)
        self.taken = np.zeros(num_envs, np.int64)
        """Glimpses taken, from 1; one more than `glimpses` after the answer."""
        self.over = np.zeros(num_envs, np.bool_)
        self.path: list[np.ndarray] = []
        """Where environment 0 has looked in its episode."""
        self.answer: int | None = None
        """What environment 0 answered."""

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Obs, dict[str, Any]]:
        """Begin an episode in each environment, or in those of options["reset_mask"], bool (N,).

        A sequence of seeds (N,) fixes each environment's image and first location; one seed, or none, draws
        them from the environment's own generator.
        """
        mask = np.asarray((options or {}).get("reset_mask", np.ones(self.num_envs, np.bool_)))
        if mask.shape != (self.num_envs,) or mask.dtype != np.bool_:
            raise ValueError(f"reset_mask must be bool ({self.num_envs},), got {mask.dtype} {mask.shape}")
        if seed is None or isinstance(seed, int | np.integer):
            super().reset(seed=None if seed is None else int(seed))
            seeds = self.np_random.integers(2**63, size=int(mask.sum()))
        else:
            seeds = np.array([given for given, chosen in zip(seed, mask, strict=True) if chosen])
        self.begin(mask, seeds)
        return self.observe(), {}

    def begin(self, mask: np.ndarray, seeds: np.ndarray) -> None:
        """Begin an episode in each environment of `mask` (N,), with these seeds in order."""
        at = np.flatnonzero(mask)
        image = (hashed(seeds, 0) % np.uint64(len(self.images))).astype(np.int64)
        chosen = self.images.take(torch.from_numpy(image))
        frames = framed(chosen.images, self.patch, self.scales, self.background)
        if len(at) == self.num_envs:
            self.frames = frames
        else:
            self.frames[torch.from_numpy(at)] = frames
        self.image[at], self.labels[at] = image, chosen.labels.numpy()
        units = [(hashed(seeds, stream) >> np.uint64(40)) / np.float32(2**24) for stream in (1, 2)]
        self.location = self.location.copy()  # it is in observations given before
        self.location[at] = (2 * np.stack(units, -1) - 1).astype(np.float32)
        self.taken[at], self.over[at] = 1, False
        if mask[0]:
            self.path, self.answer = [self.location[0]], None

    def step(self, actions: Any) -> tuple[Obs, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Look, or answer where all glimpses are taken.

        With autoreset_mode NextStep an environment whose episode is over begins the next one instead, with a
        reward of 0. ValueError for an answer that is no class, or looks that are no numbers.
        """
        if not self.taken[0]:
            raise RuntimeError("step() before reset()")
        looks, answers = self.read(actions)
        waiting = self.over.copy()
        last = (self.taken >= self.glimpses) & ~waiting
        self.location = np.where((last | waiting)[:, None], self.location, looks)
        self.taken = self.taken + 1
        rewards = np.where(last, answers == self.labels, False).astype(np.float64)
        self.over = last
        if last[0]:
            self.answer = int(answers[0])
        elif not waiting[0]:
            self.path.append(self.location[0])
        if waiting.any():
            if self.autoreset_mode is AutoresetMode.DISABLED:
                raise RuntimeError("step() in an environment whose episode is over: reset it first")
            self.begin(waiting, self.np_random.integers(2**63, size=int(waiting.sum())))
        return self.observe(), rewards, last, np.zeros(self.num_envs, np.bool_), {}

    def read(self, actions: Any) -> tuple[np.ndarray, np.ndarray]:
        """Looks (N, 2) float32 in [-1, 1] and answers (N,) of actions in whatever form."""
        classes = len(self.classes)
        if self.form == "grid":
            chosen = np.asarray(actions)
            limit = int(self.single_action_space.n)  # type: ignore[attr-defined]
            check_choices("action", chosen, limit, self.num_envs)
            return self.cells[chosen % len(self.cells)], chosen % classes
        if self.form == "box":
            numbers = np.asarray(actions, np.float32)
            looks, answers = numbers[:, :2], numbers[:, 2:].argmax(1)
        else:
            looks, answers = np.asarray(actions["look"], np.float32), np.asarray(actions["answer"])
            check_choices("answer", answers, classes, self.num_envs)
        if looks.shape != (self.num_envs, 2) or not np.isfinite(looks).all():
            raise ValueError(f"look must be ({self.num_envs}, 2) finite numbers, got {looks.shape}: {looks}")
        return looks.clip(-1, 1), answers

    def observe(self) -> Obs:
        seen = look(self.frames, torch.from_numpy(self.location), self.patch, self.scales).div_(self.high)
        time = (np.minimum(self.taken, self.glimpses) / self.glimpses).astype(np.float32)[:, None]
        if self.form == "dict":
            return {"glimpse": seen.numpy(), "location": self.location, "time": time}
        return np.concatenate([seen.flatten(1).numpy(), self.location, time], 1)

    def render(self) -> np.ndarray:  # type: ignore[override]
        """Environment 0's canvas, the boxes of its glimpses so far, and what it answered: (H, W, 3) uint8."""
        from PIL import Image, ImageDraw, ImageFont

        truth = self.classes[self.labels[0]]
        color = OPEN if self.answer is None else RIGHT if self.answer == self.labels[0] else WRONG
        canvas = self.images.images[int(self.image[0])].numpy()
        picture = draw_fixations(canvas, self.high, self.path, self.patch, self.scales, color)
        text = f"a {truth}; glimpse {len(self.path)} of {self.glimpses}"
        if self.answer is not None:
            text = f"a {truth}, taken for a {self.classes[self.answer]}"
        whole = np.concatenate([picture, np.full((28, *picture.shape[1:]), 24, np.uint8)])
        image = Image.fromarray(whole)
        place = (8, picture.shape[0] + 14)
        ImageDraw.Draw(image).text(place, text, fill=color, font=ImageFont.load_default(14), anchor="lm")
        return np.asarray(image)

    def close(self, **kwargs: Any) -> None:
        """Nothing is held open."""


class GlimpseEnv(gym.Env):
    """One image at a time: `GlimpseVectorEnv` of one, with its arguments."""

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 2}  # noqa: RUF012

    def __init__(self, render_mode: str | None = None, **kwargs: Any):
        self.vector = GlimpseVectorEnv(1, render_mode=render_mode, **kwargs)
        self.render_mode = render_mode
        self.observation_space = self.vector.single_observation_space
        self.action_space = self.vector.single_action_space

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Obs, dict]:
        super().reset(seed=seed)
        obs, _ = self.vector.reset(seed=[int(self.np_random.integers(2**63))])
        return first_of(obs), {}

    def step(self, action: Any) -> tuple[Obs, float, bool, bool, dict]:
        batch = (
            {key: np.asarray(part)[None] for key, part in action.items()}
            if isinstance(action, Mapping)
            else np.asarray(action)[None]
        )
        obs, rewards, terminated, _, _ = self.vector.step(batch)
        return first_of(obs), float(rewards[0]), bool(terminated[0]), False, {}

    def render(self) -> np.ndarray | None:
        return self.vector.render() if self.render_mode else None


class Glimpse:
    """The vector environment as `make_vec` steps it: an episode begins with a seed of its own."""

    def __init__(self, num_envs: int, kwargs: dict[str, Any], max_episode_steps: int | None):
        self.env = GlimpseVectorEnv(num_envs, autoreset_mode=AutoresetMode.DISABLED, **kwargs)
        self.limit = max_episode_steps or np.inf
        self.single_observation_space = self.env.single_observation_space
        self.single_action_space = self.env.single_action_space

    def reset(self, mask: np.ndarray, seeds: list[int]) -> Obs:
        self.env.begin(mask, np.array(seeds))
        return self.env.observe()

    def step(self, actions: np.ndarray) -> tuple[Obs, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        obs, rewards, terminated, _, _ = self.env.step(actions)
        truncated = (self.env.taken > self.limit) & ~terminated
        return obs, rewards, terminated, truncated, terminated | truncated

    def render(self) -> np.ndarray:
        return self.env.render()

    def close(self) -> None:
        self.env.close()


@functools.lru_cache(maxsize=4)
def load_canvases(
    name: str,
    data_dir: str | Path | None,
    image_size: int | None,
    translated: int | None,
    cluttered: int | None,
    seed: int,
) -> Dataset:
    """A data set on its canvases; kept, because evaluations make environments again and again."""
    if translated and cluttered:
        raise ValueError(f"translated and cluttered are two tasks, got both: {translated} and {cluttered}")
    side = translated or cluttered
    if name == "digits" and not image_size and not side:
        image_size, side = 16, 40
    dataset = load_dataset(name, data_dir, seed=seed, size=image_size)
    if not side:
        return dataset
    return on_canvas(dataset, side, seed, clutter_pieces(side) if cluttered else 0, canvases=CANVASES)


def hashed(seeds: np.ndarray, stream: int) -> np.ndarray:
    """64 random bits for each seed (N,), uint64; those of other streams are independent.

    The finalizer of SplitMix64 (Steele et al. 2014), twice: a generator for each of thousands of episodes
    would take most of their time.
    """
    with np.errstate(over="ignore"):
        x = np.asarray(seeds).astype(np.uint64) + np.uint64(stream + 1) * np.uint64(0x9E3779B97F4A7C15)
        for _ in range(2):
            x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            x = x ^ (x >> np.uint64(31))
    return x


def check_choices(name: str, values: np.ndarray, below: int, count: int) -> None:
    """ValueError where these are not `count` integers from 0 to `below` - 1."""
    if values.shape != (count,) or values.dtype.kind not in "iu":
        raise ValueError(f"{name} must be ({count},) integers, got {values.shape} {values.dtype}")
    wrong = values[(values < 0) | (values >= below)]
    if len(wrong):
        raise ValueError(f"{name} must be from 0 to {below - 1}, got {wrong[0]}")


def first_of(obs: Obs) -> Obs:
    return {key: part[0] for key, part in obs.items()} if isinstance(obs, dict) else obs[0]
