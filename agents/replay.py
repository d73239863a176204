"""Uniform experience replay that stores every frame once (Mnih et al. 2015, "Human-level control through
deep reinforcement learning", doi:10.1038/nature14236).

Two rings share the work:

    steps    (T, N)          action, reward, terminated, truncated, and `row`: where its observation ends
    frames   (R, N, *frame)  what each environment showed, one row a frame; one write position per environment

A real reset appends the whole first stack, a transition appends one frame: the newest of its `next_obs`. So
with K stacked frames a transition is the K + 1 consecutive rows row-K+1 .. row+1, of which obs is all but the
last and next_obs all but the first:

    row     0  1  2  3  4 | 5  6  7  8 ...       K = 3, an episode of two steps, then the next one
            =======                              t0: obs, the first stack, row = 2
               =======                           t0: next_obs; t1: obs, row = 3
                  =======                        t1: next_obs, the final observation
                            =======              t2: obs, the next episode's first stack, row = 7

The final observation of an episode needs no case of its own, and neither does a life loss (terminated without
a reset: the frames simply go on). Plain observations are the same thing with K = 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from gymnasium import spaces

if TYPE_CHECKING:
    from ..envs import Step

FORMAT = 1  # of what `state` and `segments` give; another number is another layout
STAGED_ROWS = 256  # on a GPU: rows collected on the host before they are sent in one copy


class Replay:
    """The last transitions of `num_envs` environments stepped together, sampled uniformly with replacement.

    Args:
        capacity: transitions to keep, all environments together, in agent steps; rounded up to a multiple of
            `num_envs`. When full, the oldest leave first.
        num_envs: N, environments stepped together.
        observation_space: of one environment: Box, Discrete, MultiDiscrete or MultiBinary, or a Dict of them.
        action_space: of one environment: Discrete, MultiDiscrete or Box.
        frame_stack: K. With K > 1 every observation has shape (K, *frame), oldest frame first, and moves on
            by one frame a step; only the newest is stored.
        device: where the transitions lie and the samples appear.

    Memory: a frame a step, plus 14 bytes and the action; 84x84 images with K = 4 take 7.3 GB for a million.
    On the CPU it becomes resident only as it is written; a GPU gives all of it at once. An episode costs K
    rows of its own. With K = 1 there is room for T = capacity / N episodes of one step in each environment,
    so that the capacity is exact and an observation may take its bytes twice. With K > 1 there are about
    T / 32 spare rows, enough for episodes of 32 K steps on average; where they are shorter, the oldest
    transitions leave before the capacity is reached.

    Raises:
        ValueError: num_envs or frame_stack below 1, capacity below num_envs, or a space that is not taken.

    >>> import gymnasium
    >>> space = gymnasium.spaces.Box(-1, 1, (3,))
    >>> replay = Replay(1000, 1, space, gymnasium.spaces.Discrete(2))
    >>> len(replay), replay.nbytes
    (0, 46012)
    """

    segment_bytes = 32 * 2**20
    """Bytes of storage, at most (but one row at least), behind a segment of a checkpoint."""

    def __init__(
        self,
        capacity: int,
        num_envs: int,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        *,
        frame_stack: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        for name, value in (("num_envs", num_envs), ("frame_stack", frame_stack)):
            if value < 1:
                raise ValueError(f"{name}: got {value}, takes an integer of at least 1")
        if capacity < num_envs:
            raise ValueError(
                f"capacity: got {capacity} transitions, takes at least one for each of num_envs={num_envs}"
            )
        self.num_envs, self.frame_stack = num_envs, frame_stack
        self.device = torch.device(device)
        length = -(-capacity // num_envs)
        exact = (frame_stack + 1) * length + frame_stack  # rows that episodes of one step would need
        spare = length // 32 + 4 * frame_stack
        frame_rows = exact if frame_stack == 1 else min(exact, length + spare)
        self._length, self._frame_rows = length, frame_rows

        def ring(rows: int, shape: tuple[int, ...], dtype: Any, device: torch.device = self.device) -> _Ring:
            return _Ring(rows, num_envs, shape, np.dtype(dtype), device)

        self._is_dict = isinstance(observation_space, spaces.Dict)
        parts = (
            observation_space.spaces
            if isinstance(observation_space, spaces.Dict)
            else {"": observation_space}
        )
        self._frames = {key: ring(frame_rows, *_frame(key, part, frame_stack)) for key, part in parts.items()}
        self._actions = ring(length, *_action(action_space))
        self._rewards = ring(length, (), np.float32)
        self._terminated = ring(length, (), np.bool_)
        self._truncated = ring(length, (), np.bool_)
        # Rows count every frame ever written for an environment; row r lies at r % frame_rows. They stay on
        # the CPU, where they become the indices that are sent to the device.
        self._rows = ring(length, (), np.int64, torch.device("cpu"))

        self._steps = 0  # lockstep steps ever added
        self._oldest = 0  # the first of them that is still whole; brought up to date by `_first`
        self._written = np.zeros(num_envs, np.int64)  # frame rows ever written, per environment
        self._envs = np.arange(num_envs)
        self._stack = np.arange(frame_stack)

    def reset(self, obs: Any) -> None:
        """Take the first observations (N, *shape) of all environments, or a dict of them, before the first
        `add`, and again whenever the environments were reset by hand in between.

        Raises:
            ValueError: an array of another shape than the observation space and num_envs give.
        """
        for key, ring in self._frames.items():
            got = np.shape(obs[key] if self._is_dict else obs)
            stack = () if self.frame_stack == 1 else (self.frame_stack,)
            takes = (self.num_envs, *stack, *ring.shape)
            if got != takes:
                raise ValueError(f"obs{f'[{key!r}]' if key else ''}: got shape {got}, takes {takes}")
        self._append_first_stacks(self._envs, obs)

    def add(self, actions: np.ndarray, step: Step) -> None:
        """Store one transition of every environment.

        Args:
            actions: (N, *shape), what `step` answers.
            step: as `VectorEnv.step` gave it. Everything is copied.

        Raises:
            RuntimeError: `reset` was never called, so there is no observation that the actions belong to.
        """
        written = self._written
        if not written[0]:
            raise RuntimeError("Replay.add: call reset(obs) with the first observations before the first add")
        position = self._steps % self._length * self.num_envs
        here = slice(position, position + self.num_envs)
        self._actions.write(here, actions)
        self._rewards.write(here, step.rewards)
        self._terminated.write(here, step.terminated)
        self._truncated.write(here, step.truncated)
        self._rows.write(here, written - 1)
        index = self._place(written, self._envs)
        for key, ring in self._frames.items():
            next_obs = step.next_obs[key] if self._is_dict else step.next_obs
            ring.write(index, next_obs if self.frame_stack == 1 else next_obs[:, -1])
        written += 1
        self._steps += 1
        if step.reset.any():
            self._append_first_stacks(np.flatnonzero(step.reset), step.obs)

    def sample(self, shape: int | tuple[int, ...], generator: torch.Generator) -> dict[str, Any]:
        """Draw transitions uniformly, with replacement.

        Args:
            shape: leading dimensions of the result, such as 32 or (128, 64).
            generator: on the CPU, whatever the storage device is; drawn from once.

        Returns:
            Tensors on `device`; `S` is `shape`, and a Dict observation space gives dicts of tensors:

            | obs, next_obs         | (*S, *observation) | dtype of the space; float64 becomes float32 |
            | actions               | (*S, *action)      | int64; float32 for a Box                    |
            | rewards               | S                  | float32                                     |
            | terminated, truncated | S                  | bool; next_obs is then the final one        |

            With frame_stack > 1, obs and next_obs are views of one tensor: don't write into them.

        Raises:
            ValueError: nothing has been added yet.
        """
        if self._steps == 0:
            raise ValueError("Replay.sample: the replay is empty, takes at least one add first")
        shape = (shape,) if isinstance(shape, int) else shape
        return self._gather(torch.randint(len(self), shape, generator=generator).numpy())

    def __len__(self) -> int:
        """Transitions to sample from, all environments together: at most `capacity` rounded up."""
        return (self._steps - self._first()) * self.num_envs

    @property
    def nbytes(self) -> int:
        """Bytes of storage when full."""
        return sum(ring.tensor.nbytes for ring in self._rings().values())

    def segments(self) -> Iterator[tuple[str, Callable[[], dict[str, torch.Tensor]]]]:
        """What is stored, cut into pieces for a checkpoint that writes only what changed since the last one.

        Yields:
            (name, read): a piece is a fixed range of rows, and its name, like "frames-00003-141200", changes
            whenever something is written in that range, and only then (in one run, resumed or not).
            Its last number counts the rows written up to the newest in the piece, so that it only grows.
            `read()` gives the tensors, on the CPU, contiguous, without rows that were never written. On a CPU
            storage they are views, true until the next `add`: write them out or clone them before it.
        """
        for name, parts in self._segments():
            yield name, partial(_on_cpu, parts)

    def state(self) -> dict[str, Any]:
        """Positions and layout as JSON: with the `segments` of the same moment, the whole replay."""
        return {
            "format": FORMAT,
            "segment_bytes": self.segment_bytes,
            "layout": {name: ring.layout for name, ring in self._rings().items()},
            "steps": self._steps,
            "written": self._written.tolist(),
        }

    def restore(self, state: dict[str, Any], load: Callable[[str], dict[str, torch.Tensor]]) -> None:
        """Continue where `state` was taken: same samples from the same generator, same later segments.

        Args:
            state: what `state()` gave, through JSON or not.
            load: the tensors of a segment, by its name.

        Raises:
            RuntimeError: this replay has stored something already.
            ValueError: the state or a segment is of another format, capacity, num_envs or space.
        """
        if self._written.any():
            raise RuntimeError("Replay.restore: takes a replay that has stored nothing yet")
        if state.get("format") != FORMAT:
            raise ValueError(f"replay state: got format {state.get('format')}, takes {FORMAT}")
        layout = {name: ring.layout for name, ring in self._rings().items()}
        for name in dict.fromkeys([*layout, *state["layout"]]):  # in one order, whatever the hash seed
            got, takes = state["layout"].get(name), layout.get(name)
            if got != takes:
                raise ValueError(f"replay state: {name} is {got} (shape, dtype), this replay takes {takes}")
        self.segment_bytes = state["segment_bytes"]
        self._steps = state["steps"]
        self._written[:] = state["written"]
        for name, parts in self._segments():
            loaded = load(name)
            for key, part in parts.items():
                got = loaded.get(key)
                if got is None or got.shape != part.shape or got.dtype != part.dtype:
                    found = "nothing" if got is None else f"{tuple(got.shape)} {got.dtype}"
                    raise ValueError(f"{name}: {key} is {found}, takes {tuple(part.shape)} {part.dtype}")
                part.copy_(got)

    def _append_first_stacks(self, envs: np.ndarray, obs: Any) -> None:
        """Append the whole stacks that `envs` show after a real reset; obs is that of all N."""
        index = self._place(self._written[envs, None] + self._stack, envs[:, None]).ravel()
        for key, ring in self._frames.items():
            first = (obs[key] if self._is_dict else obs)[envs]
            ring.write(index, first.reshape(-1, *ring.shape))
        self._written[envs] += self.frame_stack

    def _place(self, rows: np.ndarray, envs: np.ndarray) -> np.ndarray:
        """Where the frames of ever-counted `rows` lie in the flat (R * N) storage."""
        return rows % self._frame_rows * self.num_envs + envs

    def _first(self) -> int:
        """The first lockstep step whose frames are whole in all environments."""
        first = max(self._oldest, self._steps - self._length)
        whole = self._written - self._frame_rows + self.frame_stack - 1  # (N,) the first `row` whose stack is
        rows = self._rows.array.reshape(self._length, self.num_envs)
        while first < self._steps and (rows[first % self._length] < whole).any():
            first += 1
        self._oldest = first
        return first

    def _gather(self, index: np.ndarray) -> dict[str, Any]:
        """The transitions numbered `index`, any shape, in 0 .. len - 1: by time, then by environment."""
        position = (self._first() * self.num_envs + index) % (self._length * self.num_envs)
        rows, envs = self._rows.array.take(position), position % self.num_envs
        obs, next_obs = {}, {}
        if self.frame_stack == 1:
            now, then = self._index(self._place(rows, envs)), self._index(self._place(rows + 1, envs))
            for key, ring in self._frames.items():
                obs[key], next_obs[key] = ring.read(now), ring.read(then)
        else:
            span = np.arange(1 - self.frame_stack, 2)
            both = self._index(self._place(rows[..., None] + span, envs[..., None]))  # (*S, K + 1)
            for key, ring in self._frames.items():
                frames = ring.read(both)  # (*S, K + 1, *frame)
                obs[key] = frames.narrow(index.ndim, 0, self.frame_stack)
                next_obs[key] = frames.narrow(index.ndim, 1, self.frame_stack)
        here = self._index(position)
        return {
            "obs": obs if self._is_dict else obs[""],
            "actions": self._actions.read(here),
            "rewards": self._rewards.read(here),
            "next_obs": next_obs if self._is_dict else next_obs[""],
            "terminated": self._terminated.read(here),
            "truncated": self._truncated.read(here),
        }

    def _index(self, index: np.ndarray) -> Any:
        return index if self.device.type == "cpu" else _send(index, self.device)

    def _rings(self) -> dict[str, _Ring]:
        """Every ring by its name, those of the steps first."""
        steps = {
            "actions": self._actions,
            "rewards": self._rewards,
            "terminated": self._terminated,
            "truncated": self._truncated,
            "rows": self._rows,
        }
        return steps | {f"obs/{key}" if key else "obs": ring for key, ring in self._frames.items()}

    def _segments(self) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        """The segments as views of the storage, on its device."""
        steps = self._rings()
        frames = {name: steps.pop(name) for name in list(steps) if name.split("/")[0] == "obs"}
        counts = np.full(self.num_envs, self._steps)
        for group, rings, written in (("steps", steps, counts), ("frames", frames, self._written)):
            tensors = {name: ring.current().unflatten(0, (-1, self.num_envs)) for name, ring in rings.items()}
            rows = next(iter(rings.values())).rows
            size = max(1, self.segment_bytes // sum(tensor[0].nbytes for tensor in tensors.values()))
            used = min(rows, int(written.max()))
            lap, row = np.divmod(written - 1, rows)  # where each environment wrote last
            for number, start in enumerate(range(0, used, size)):
                stop = min(start + size, rows)
                # One past the newest row in start..stop: of this lap, or else the end of the lap before.
                newest = np.where(
                    row >= start, lap * rows + np.minimum(row + 1, stop), (lap - 1) * rows + stop
                )
                version = int(np.maximum(newest, 0).sum())
                stop = min(stop, used)
                yield f"{group}-{number:05d}-{version}", {name: t[start:stop] for name, t in tensors.items()}


class _Ring:
    """Storage of `rows` rows of N entries of one shape, zero at first, addressed as one flat (rows * N) axis.

    On the CPU writes go through a numpy view of the tensor (numpy's indexing costs a tenth of torch's for one
    small row), and so do reads (`take` is the fastest gather for frames and for vectors). Elsewhere writes
    are collected on the host and sent in one copy before they are read.
    """

    def __init__(
        self, rows: int, num_envs: int, shape: tuple[int, ...], dtype: np.dtype, device: torch.device
    ) -> None:
        self.rows, self.shape, self.dtype = rows, shape, dtype
        # numpy's zeros come from calloc: memory is used once it is written. torch.zeros writes all of it.
        size = (rows * num_envs, *shape)
        host = np.zeros(size if device.type == "cpu" else (0, *shape), dtype)
        self.array = host
        self.tensor = torch.from_numpy(host)
        if device.type != "cpu":
            self.tensor = torch.zeros(size, dtype=self.tensor.dtype, device=device)
        self.staged = device.type != "cpu"
        self._pending: list[tuple[np.ndarray, np.ndarray]] = []
        self._pending_rows = 0

    @property
    def layout(self) -> str:
        return f"{list(self.tensor.shape)} {self.dtype}"

    def write(self, index: slice | np.ndarray, values: Any) -> None:
        """Copy values (n, *shape) to n different places."""
        if not self.staged:
            self.array[index] = values
            return
        places = np.arange(index.start, index.stop) if isinstance(index, slice) else index
        # No place twice in one copy, whose order is not defined: never more than a lap of one environment.
        if self._pending_rows + len(places) > min(self.rows, STAGED_ROWS):
            self.current()
        self._pending.append((places, np.array(values, self.dtype)))
        self._pending_rows += len(places)

    def current(self) -> torch.Tensor:
        """The tensor (rows * N, *shape) with every write in it."""
        if self._pending:
            places, values = (_send(np.concatenate(part), self.tensor.device) for part in zip(*self._pending))
            self.tensor.index_copy_(0, places, values)
            self._pending, self._pending_rows = [], 0
        return self.tensor

    def read(self, index: Any) -> torch.Tensor:
        """What lies at index, int64 of any shape, on the device: (*index.shape, *shape)."""
        return self.current()[index] if self.staged else torch.from_numpy(self.array.take(index, axis=0))


def _send(array: np.ndarray, device: torch.device) -> torch.Tensor:
    # On CUDA this does not wait for the kernels before it: the driver copies pageable memory at the call.
    return torch.from_numpy(array).to(device, non_blocking=device.type == "cuda")


def _on_cpu(parts: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: part.cpu() for name, part in parts.items()}


OBSERVATION_DTYPES = ("bool", "uint8", "int8", "int16", "int32", "int64", "float16", "float32", "float64")


def _frame(key: str, space: spaces.Space, frame_stack: int) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and dtype of the frames kept for an observation space, or for one key of a Dict."""
    name = f"observation_space[{key!r}]" if key else "observation_space"
    if not isinstance(space, spaces.Box | spaces.Discrete | spaces.MultiDiscrete | spaces.MultiBinary):
        raise ValueError(
            f"{name}: got {space}, takes Box, Discrete, MultiDiscrete, MultiBinary, or a Dict of them"
        )
    if space.dtype is None or space.dtype.name not in OBSERVATION_DTYPES:
        raise ValueError(f"{name}: got dtype {space.dtype}, takes one of {', '.join(OBSERVATION_DTYPES)}")
    shape, dtype = space.shape or (), np.dtype(np.float32) if space.dtype == np.float64 else space.dtype
    if frame_stack == 1:
        return shape, dtype
    if shape[:1] != (frame_stack,):
        raise ValueError(
            f"{name}: got shape {shape}, takes ({frame_stack}, ...) with frame_stack={frame_stack}"
        )
    return shape[1:], dtype


def _action(space: spaces.Space) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and dtype of the actions kept for an action space."""
    if isinstance(space, spaces.Box):
        return space.shape, np.dtype(np.float32)
    if isinstance(space, spaces.Discrete | spaces.MultiDiscrete):
        return space.shape or (), np.dtype(np.int64)
    raise ValueError(f"action_space: got {space}, takes Discrete, MultiDiscrete or Box")
