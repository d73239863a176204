"""A grid world: walk from S to a goal, past walls and pits, on ground that may be slippery.

It is small enough to be known exactly (`GridWorld.mdp`), and so shows what an agent should have learned.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from .mdp import MDP
from .registry import find_spec

MAPS = {
    # Russell and Norvig, "Artificial Intelligence", chapter on Markov decision processes: with slip=0.2 and
    # the default rewards, this is their world.
    "4x3": ["...G", ".#.P", "S..."],
    "4x4": ["S..#", ".P..", "...P", "#..G"],
    "8x8": [
        "S.......",
        ".##..P..",
        "...#....",
        ".P.#.##.",
        "...P....",
        ".##..#P.",
        "....#...",
        ".P.....G",
    ],
    # Sutton and Barto, "Reinforcement Learning", example 6.6; but here the cliff ends the episode.
    "cliff": ["............", "............", "............", "SPPPPPPPPPPG"],
    # Sutton, Precup and Singh 1999, "Between MDPs and semi-MDPs".
    "four-rooms": [
        "#############",
        "#S....#.....#",
        "#.....#.....#",
        "#...........#",
        "#.....#.....#",
        "#.....#.....#",
        "##.####.....#",
        "#.....###.###",
        "#.....#.....#",
        "#.....#.....#",
        "#...........#",
        "#.....#....G#",
        "#############",
    ],
}

MOVES = np.array([(-1, 0), (0, 1), (1, 0), (0, -1)])
"""(row, column) that each action moves by: up, right, down, left."""

CELL = 48  # pixels
COLORS = {
    "#": (43, 48, 56),
    ".": (246, 246, 243),
    "S": (222, 226, 230),
    "G": (0, 158, 115),
    "P": (213, 94, 0),
}
AGENT = (0, 114, 178)


class GridWorld(gym.Env):
    """A map of walls `#`, free cells `.`, starts `S`, goals `G` and pits `P`; goals and pits end an episode.

    map: the name of one of `MAPS`, or a map of your own: rows as a list or as lines of text. An episode
        begins in any of its `S` with equal probability.
    slip: probability that a move goes to one of the two perpendicular directions instead, each half of it.
    goal_reward, pit_reward: for entering a goal or a pit.
    step_reward: for every move, the one that enters a goal or a pit included.

    Observations are the index of the agent's cell among those that are no wall, row by row; actions are up,
    right, down, left. A move into a wall or off the map stays where it is.

    Raises ValueError, in one line, for what it cannot take.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array", "ansi"], "render_fps": 4}  # noqa: RUF012

    def __init__(
        self,
        map: str | Sequence[str] = "4x4",
        slip: float = 0.1,
        goal_reward: float = 1.0,
        pit_reward: float = -1.0,
        step_reward: float = -0.04,
        render_mode: str | None = None,
    ):
        self.layout = read_map(map)
        """The map's rows."""
        if not _is_number(slip) or not 0 <= slip <= 1:
            raise ValueError(f"slip must be between 0 and 1, got {slip!r}")
        for name, reward in (("goal", goal_reward), ("pit", pit_reward), ("step", step_reward)):
            if not _is_number(reward) or not np.isfinite(reward):
                raise ValueError(f"{name}_reward must be a finite number, got {reward!r}")
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise ValueError(f"render_mode must be None, rgb_array or ansi, got {render_mode!r}")
        self.slip, self.render_mode = float(slip), render_mode
        grid = np.array([list(row) for row in self.layout])  # (rows, columns) of characters
        self.cells = np.argwhere(grid != "#")
        """(S, 2): row and column of each state."""
        kinds = grid[tuple(self.cells.T)]  # (S,)
        self.terminal = (kinds == "G") | (kinds == "P")
        self.starts = np.flatnonzero(kinds == "S")
        self.entry_rewards = step_reward + goal_reward * (kinds == "G") + pit_reward * (kinds == "P")
        """(S,): the reward of a move that ends in this state."""
        # Where a move in each direction leads, (S, 4).
        index = np.full((grid.shape[0] + 2, grid.shape[1] + 2), -1)  # a border of walls around the map
        index[tuple(self.cells.T + 1)] = np.arange(len(self.cells))
        ahead = index[tuple(np.moveaxis(self.cells[:, None] + MOVES + 1, -1, 0))]
        self.successors = np.where(ahead < 0, np.arange(len(self.cells))[:, None], ahead)
        self.observation_space = spaces.Discrete(len(self.cells))
        self.action_space = spaces.Discrete(len(MOVES))
        self.state = int(self.starts[0])

    @cached_property
    def mdp(self) -> MDP:
        """The whole environment, but for a time limit, as arrays."""
        num_states = len(self.cells)
        P = np.zeros((num_states, 4, num_states))
        states = np.flatnonzero(~self.terminal)
        for turn, probability in ((0, 1 - self.slip), (1, self.slip / 2), (3, self.slip / 2)):
            for action in range(4):
                P[states, action, self.successors[states, (action + turn) % 4]] += probability
        rewards = P @ self.entry_rewards
        P[self.terminal, :, self.terminal] = 1
        start = np.zeros(num_states)
        start[self.starts] = 1 / len(self.starts)
        return MDP(P, rewards, self.terminal, start)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[int, dict]:
        super().reset(seed=seed)
        self.state = int(self.np_random.choice(self.starts))
        return self.state, {}

    def step(self, action: int) -> tuple[int, float, bool, bool, dict]:
        draw = self.np_random.random()  # always one, so that episodes of different slip stay comparable
        if draw < self.slip:
            action = (int(action) + (1 if draw < self.slip / 2 else 3)) % 4
        self.state = int(self.successors[self.state, action])
        return self.state, float(self.entry_rewards[self.state]), bool(self.terminal[self.state]), False, {}

    def render(self) -> Any:
        """The map with the agent on it: (H, W, 3) uint8, or text in which `@` is the agent."""
        row, column = self.cells[self.state]
        if self.render_mode == "ansi":
            lines = [list(line) for line in self.layout]
            lines[row][column] = "@"
            return "\n".join(map("".join, lines))
        if self.render_mode == "rgb_array":
            picture = self._background.copy()
            cell = picture[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL]
            offset = np.arange(CELL) - (CELL - 1) / 2
            distance = np.hypot(offset[:, None], offset)
            cell[distance < 0.36 * CELL] = (255, 255, 255)
            cell[distance < 0.31 * CELL] = AGENT
            return picture
        return None

    @cached_property
    def _background(self) -> np.ndarray:
        colors = np.array([[COLORS[kind] for kind in row] for row in self.layout], np.uint8)
        picture = colors.repeat(CELL, axis=0).repeat(CELL, axis=1)
        x = np.abs(np.arange(CELL) - (CELL - 1) / 2) / CELL
        y = x[:, None]
        signs = {"G": x + y < 0.24, "P": (np.abs(x - y) < 0.07) & (x + y < 0.44)}  # a diamond, a cross
        for row, column in self.cells[self.terminal]:
            cell = picture[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL]
            cell[signs[self.layout[row][column]]] = (255, 255, 255)
        for line in (picture[::CELL], picture[:, ::CELL]):
            line[:] = (200, 204, 208)
        return picture


def read_map(map: str | Sequence[str]) -> list[str]:
    """The rows of a map, from its name or its text. Raises ValueError for what is no map."""
    if isinstance(map, str) and map in MAPS:
        return MAPS[map]
    if isinstance(map, str) and "\n" not in map and set(map.strip()) - set(COLORS):
        near = difflib.get_close_matches(map, MAPS, n=3, cutoff=0.3) or list(MAPS)
        raise ValueError(f"map {map!r} is unknown; nearest: {', '.join(near)} (or rows of {''.join(COLORS)})")
    rows = map.split("\n") if isinstance(map, str) else map
    if not isinstance(rows, Sequence) or not all(isinstance(row, str) for row in rows):
        raise ValueError(f"map must be a name ({', '.join(MAPS)}) or rows of text, got {map!r}")
    rows = [row.strip() for row in rows if row.strip()]
    if len({len(row) for row in rows}) != 1:
        raise ValueError(f"map must have rows of one length, got the lengths {[len(row) for row in rows]}")
    unknown = sorted(set("".join(rows)) - set(COLORS))
    if unknown:
        raise ValueError(f"map must be made of {' '.join(COLORS)}, got {' '.join(unknown)} in it")
    for needed in "SG":
        if needed not in "".join(rows):
            raise ValueError(f"map must have a {needed} in it, got {'/'.join(rows)}")
    return rows


def grid_map(spec: Mapping[str, Any]) -> list[str] | None:
    """The map of the grid world that the arguments of `make_vec` make; None for other environments."""
    env = gym.make(find_spec(spec["env_id"]), **spec["env_kwargs"]).unwrapped
    return env.layout if isinstance(env, GridWorld) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)
