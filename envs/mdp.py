"""Finite Markov decision processes as arrays: what an environment is, for those who may plan with it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from .registry import find_spec


@dataclass(frozen=True, eq=False)
class MDP:
    """S states and A actions, in float64. A Markov chain with rewards is one with a single action.

    >>> coin = np.array([[0.5, 0.5], [0.0, 1.0]])  # every toss ends the game with probability 1/2
    >>> mdp = MDP(coin[:, None], np.array([[1.0], [0.0]]), terminal=[False, True], start=[1.0, 0.0])
    >>> mdp.num_states, mdp.num_actions
    (2, 1)
    """

    P: np.ndarray
    """(S, A, S): the probability of each next state. A terminal state leads to itself."""
    rewards: np.ndarray
    """(S, A): the expected reward of an action; 0 in terminal states."""
    terminal: np.ndarray
    """(S,) bool: where an episode ends."""
    start: np.ndarray
    """(S,): the probability that an episode begins there."""

    def __post_init__(self) -> None:
        for name, dtype in (("P", float), ("rewards", float), ("terminal", bool), ("start", float)):
            object.__setattr__(self, name, np.asarray(getattr(self, name), dtype))
        if self.P.ndim != 3 or self.P.shape[0] != self.P.shape[2] or 0 in self.P.shape:
            raise ValueError(f"P must have the shape (S, A, S), got {self.P.shape}")
        states, actions, _ = self.P.shape
        for name, shape in (("rewards", (states, actions)), ("terminal", (states,)), ("start", (states,))):
            if getattr(self, name).shape != shape:
                raise ValueError(f"{name} must have the shape {shape}, got {getattr(self, name).shape}")
        for name in ("P", "start"):
            array = getattr(self, name)
            wrong = ~(np.abs(array.sum(axis=-1) - 1) <= 1e-9) | (array < 0).any(axis=-1)
            if wrong.any():
                where = f" of state and action {tuple(map(int, np.argwhere(wrong)[0]))}" if wrong.ndim else ""
                raise ValueError(f"{name}{where} must be probabilities that sum to 1")
        if not np.isfinite(self.rewards).all():
            raise ValueError("rewards must be finite")
        ends = np.flatnonzero(self.terminal)
        if (self.P[ends, :, ends] != 1).any() or self.rewards[ends].any():
            raise ValueError("terminal states must lead to themselves with reward 0")

    @property
    def num_states(self) -> int:
        return self.P.shape[0]

    @property
    def num_actions(self) -> int:
        return self.P.shape[1]


def make_mdp(env_id: str, env_kwargs: Mapping[str, Any] | None = None) -> MDP:
    """The MDP behind an environment with Discrete observations and actions; time limits are no part of it.

    The environment has it as its attribute `mdp`, or, like Gymnasium's FrozenLake, Taxi and CliffWalking, as
    `P[state][action]`, a list of (probability, next state, reward, terminated), and
    `initial_state_distrib`. Raises ValueError for any other.
    """
    with closing(gym.make(find_spec(env_id), **(env_kwargs or {}))) as made:
        env: Any = made.unwrapped
        if not isinstance(env.observation_space, spaces.Discrete):
            raise ValueError(f"planning takes Discrete observations; {env_id} has {env.observation_space}")
        if not isinstance(env.action_space, spaces.Discrete):
            raise ValueError(f"planning takes Discrete actions; {env_id} has {env.action_space}")
        shape = int(env.observation_space.n), int(env.action_space.n)
        if isinstance(getattr(env, "mdp", None), MDP):
            if env.mdp.rewards.shape != shape:
                raise ValueError(
                    f"{env_id} has an mdp of {env.mdp.num_states} states and {env.mdp.num_actions} actions, "
                    f"and the spaces {env.observation_space} and {env.action_space}"
                )
            return env.mdp
        if not (hasattr(env, "P") and hasattr(env, "initial_state_distrib")):
            raise ValueError(
                f"planning takes an environment that exposes its transitions, as `mdp` or as Gymnasium's `P` "
                f"with `initial_state_distrib`; {env_id} does not"
            )
        return _from_dictionary(env_id, env.P, env.initial_state_distrib, shape)


def _from_dictionary(env_id: str, table: Any, start: Any, shape: tuple[int, int]) -> MDP:
    states, actions = shape
    P, rewards = np.zeros((states, actions, states)), np.zeros((states, actions))
    ends, goes_on = np.zeros(states, bool), np.zeros(states, bool)
    # Where a transition says that it terminates, its next state is terminal, whatever P says happens there.
    # Only of states that an episode can reach: Taxi's P has others, which contradict that.
    reached = set(map(int, np.flatnonzero(start)))
    frontier = list(reached)
    while frontier:
        state = frontier.pop()
        for probability, successor, _, terminated in itertools.chain(*table[state].values()):
            if probability > 0:
                (ends if terminated else goes_on)[successor] = True
                if not terminated and successor not in reached:
                    reached.add(successor)
                    frontier.append(successor)
    if (ends & goes_on).any():
        state = int(np.argmax(ends & goes_on))
        raise ValueError(f"planning takes states that are terminal or not; state {state} of {env_id} is both")
    for state in map(int, np.flatnonzero(~ends)):
        for action in range(actions):
            for probability, successor, reward, _ in table[state][action]:
                P[state, action, successor] += probability
                rewards[state, action] += probability * reward
    P[ends, :, ends] = 1
    return MDP(P, rewards, ends, np.asarray(start, float))
