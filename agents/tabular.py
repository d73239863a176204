"""Exact answers in finite MDPs, and three agents whose network is a table.

First functions in float64 over `MDP` arrays, an oracle that learned values and gradients can be checked with.
Then value iteration, policy iteration (both plan: they read the transitions and take no step) and Q-learning.

A policy is an array (S, A) of probabilities; `v` (S,) are state values and `q` (S, A) action values.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

from ..envs import MDP, VectorEnv, make_mdp
from ..vision import space_to_json
from .agent import (
    Agent,
    Row,
    UnmadeEnv,
    check_finite,
    passes,
    random_streams,
    rng_from_json,
    rng_to_json,
)

TIE = 1e-9
"""Action values closer to the best one than this share of the largest value count as equal to it."""


# Markov reward processes: a chain that no one steers, or an MDP under a policy.


def reward_process_values(P: np.ndarray, rewards: np.ndarray, gamma: float) -> np.ndarray:
    """v = (I - gamma P)^-1 r, for transitions P (S, S) and expected rewards (S,) -> (S,).

    At gamma=1 the matrix is singular where the process never ends. States that it stays among for ever must
    then give no reward, and have the value 0; ValueError names one that does give one.

    >>> reward_process_values(np.array([[0.5, 0.5], [0.0, 1.0]]), np.array([1.0, 0.0]), gamma=1.0)
    array([2., 0.])
    """
    _check_gamma(gamma)
    kept = (P.diagonal() != 1) | (rewards != 0)  # not terminal, so that those are 0 to the last bit
    if gamma == 1:
        kept = ~recurrent(P)
        if rewards[~kept].any():
            state = int(np.argmax(~kept & (rewards != 0)))
            raise ValueError(f"gamma=1 takes a process that ends; state {state} gives rewards for ever")
    v = np.zeros(len(P))
    v[kept] = np.linalg.solve(np.eye(kept.sum()) - gamma * P[np.ix_(kept, kept)], rewards[kept])
    return v


def recurrent(P: np.ndarray) -> np.ndarray:
    """(S,) bool: the states of a chain P (S, S) that it returns to from wherever they lead."""
    reach = (P > 0) | np.eye(len(P), dtype=bool)
    while True:  # paths of twice the length each time
        further = reach.astype(np.float32) @ reach.astype(np.float32) > 0
        if (further == reach).all():
            return np.asarray(~(reach & ~reach.T).any(axis=1))
        reach = further


def under_policy(mdp: MDP, policy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The reward process of a policy: transitions (S, S) and expected rewards (S,)."""
    return np.einsum("sa,sat->st", policy, mdp.P), (policy * mdp.rewards).sum(axis=1)


# Values of a policy.


def policy_values(mdp: MDP, policy: np.ndarray, gamma: float) -> np.ndarray:
    """v (S,) of a policy, in closed form; gamma=1 as in `reward_process_values`."""
    return reward_process_values(*under_policy(mdp, policy), gamma)


def action_values(mdp: MDP, v: np.ndarray, gamma: float) -> np.ndarray:
    """q = r + gamma P v, (S, A)."""
    return mdp.rewards + gamma * (mdp.P @ v)


def expected_return(mdp: MDP, policy: np.ndarray, gamma: float = 1.0, max_steps: int | None = None) -> float:
    """What an episode under a policy gives on average, from the start distribution.

    With `max_steps` the episode is cut off after so many steps, by backward iteration; gamma=1 then is what
    an evaluation measures.
    """
    if max_steps is None:
        return float(mdp.start @ policy_values(mdp, policy, gamma))
    _check_gamma(gamma)
    P, rewards = under_policy(mdp, policy)
    v = np.zeros(mdp.num_states)
    for _ in range(max_steps):
        v = rewards + gamma * (P @ v)
    return float(mdp.start @ v)


def occupancy(mdp: MDP, policy: np.ndarray, gamma: float) -> np.ndarray:
    """d(s) = sum over t of gamma^t Pr(S_t = s), (S,), 0 in terminal states; at gamma=1 expected visits.

    ValueError at gamma=1 for a policy under which some state that does not end is stayed in for ever.
    """
    _check_gamma(gamma)
    P, _ = under_policy(mdp, policy)
    live = ~mdp.terminal
    stays = recurrent(P) & live
    if gamma == 1 and stays.any():
        raise ValueError(f"gamma=1 takes a policy that ends; it may stay around state {np.argmax(stays)}")
    d = np.zeros(mdp.num_states)
    d[live] = np.linalg.solve(np.eye(live.sum()) - gamma * P[np.ix_(live, live)].T, mdp.start[live])
    return d


# The best policy.


def greedy(q: np.ndarray) -> np.ndarray:
    """The policy (S, A) that takes each of the best actions with equal probability."""
    best = q >= q.max(axis=1, keepdims=True) - TIE * np.abs(q).max()
    return best / best.sum(axis=1, keepdims=True)


def optimality_backup(mdp: MDP, q: np.ndarray, gamma: float) -> np.ndarray:
    """q <- r + gamma P max q: one sweep of value iteration, (S, A)."""
    return action_values(mdp, np.where(mdp.terminal, 0.0, q.max(axis=1)), gamma)


def optimum_near(mdp: MDP, q: np.ndarray, previous: np.ndarray, gamma: float) -> tuple[np.ndarray, float]:
    """An estimate of the optimal action values after the sweep `previous` -> `q`, and its largest error.

    If the sweep changed values by amounts in [low, high], those of all later sweeps together lie in
    gamma / (1 - gamma) [low, high] (MacQueen 1966; Puterman 1994, "Markov Decision Processes", section 6.6).
    The estimate is the middle of that; its error, half the width, is at most the usual bound
    gamma / (1 - gamma) max |change|.
    """
    live = ~mdp.terminal[:, None]
    change = np.where(live, q - previous, 0.0)
    low, high = change.min(), change.max()
    factor = gamma / (1 - gamma) / 2
    return np.where(live, q + factor * (low + high), 0.0), float(factor * (high - low))


def value_iteration(mdp: MDP, gamma: float, max_error: float = 1e-9) -> np.ndarray:
    """Optimal action values (S, A), each within `max_error`, for gamma below 1.

    Where float64 cannot tell two sweeps apart before that, its rounding is all the error there is.
    """
    _check_gamma(gamma, below_one=True)
    q = np.zeros_like(mdp.rewards)
    while True:
        previous, q = q, optimality_backup(mdp, q, gamma)
        estimate, error = optimum_near(mdp, q, previous, gamma)
        if error <= max_error or indistinguishable(q, previous):
            return estimate


def indistinguishable(q: np.ndarray, previous: np.ndarray) -> bool:
    """Whether two sweeps differ by no more than rounding."""
    return bool(np.abs(q - previous).max() <= 4 * np.finfo(np.float64).eps * np.abs(q).max())


def policy_iteration(mdp: MDP, gamma: float) -> tuple[np.ndarray, np.ndarray]:
    """An optimal policy (S, A) and its action values (S, A) (Howard 1960), beginning with the uniform policy.

    gamma=1 takes an MDP in which the uniform policy comes to an end, and no policy earns reward for ever.
    """
    policy = np.full_like(mdp.rewards, 1 / mdp.num_actions)
    while True:
        q = action_values(mdp, policy_values(mdp, policy, gamma), gamma)
        policy, changed = improve(policy, q)
        if not changed:
            return policy, q


def improve(policy: np.ndarray, q: np.ndarray) -> tuple[np.ndarray, int]:
    """The policy greedy for its action values `q`, and in how many states it changed.

    It changes only where something is better, so that ties do not go round in circles and, at gamma=1, no
    policy that ends is exchanged for an equal one that does not.
    """
    better = q.max(axis=1) > (policy * q).sum(axis=1) + TIE * np.abs(q).max()
    return np.where(better[:, None], greedy(q), policy), int(better.sum())


def optimal_return(mdp: MDP, gamma: float = 1.0, max_steps: int | None = None) -> float:
    """The largest `expected_return` there is; with `max_steps`, of policies that know how many are left."""
    if max_steps is None:
        return expected_return(mdp, policy_iteration(mdp, gamma)[0], gamma)
    _check_gamma(gamma)
    v = np.zeros(mdp.num_states)
    for _ in range(max_steps):
        v = action_values(mdp, v, gamma).max(axis=1)
    return float(mdp.start @ v)


# The policy gradient.


def softmax(theta: np.ndarray) -> np.ndarray:
    """The policy (S, A) with log-probabilities `theta` (S, A), up to a constant a state."""
    weights = np.exp(theta - theta.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)


def policy_gradient(mdp: MDP, theta: np.ndarray, gamma: float, discount_states: bool = True) -> np.ndarray:
    """d J / d theta (S, A) of the policy softmax(theta): d(s) pi(a|s) (q(s, a) - v(s)).

    With `discount_states`, d(s) = sum_t gamma^t Pr(S_t = s), and this is the gradient of the discounted
    return from the start distribution, J = `expected_return(mdp, softmax(theta), gamma)` (policy gradient
    theorem, Sutton et al. 2000). Without, d(s) = sum_t Pr(S_t = s): what REINFORCE with discounted
    rewards-to-go, A2C and PPO follow in practice, which drop gamma^t at step t. That is the gradient of no
    function (Nota and Thomas 2020, 1906.07073); at gamma=1 the two are the same.
    """
    policy = softmax(theta)
    v = policy_values(mdp, policy, gamma)
    d = occupancy(mdp, policy, gamma if discount_states else 1.0)
    return d[:, None] * policy * (action_values(mdp, v, gamma) - v[:, None])


def _check_gamma(gamma: float, below_one: bool = False) -> None:
    if not 0 <= gamma <= 1 or (below_one and gamma == 1):
        takes = "at least 0 and less than 1" if below_one else "between 0 and 1"
        raise ValueError(f"gamma must be {takes}, got {gamma}")


# The agents.


@dataclass(frozen=True)
class PolicyIterationConfig:
    """Settings. A step of a run is one backup: the value of an action in a state, from all its outcomes."""

    gamma: float = 0.99
    """Discount a step, at least 0 and less than 1."""
    num_envs: int = 1
    """Environments made; planning takes no step in them."""

    def __post_init__(self) -> None:
        _check_gamma(self.gamma, below_one=True)
        if self.num_envs < 1:
            raise ValueError(f"num_envs must be 1 or more, got {self.num_envs}")


@dataclass(frozen=True)
class ValueIterationConfig(PolicyIterationConfig):
    """Settings. A step of a run is one backup: the value of an action in a state, from all its outcomes."""

    max_error: float = 1e-9
    """Largest error of any action value at which the sweeps end."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.max_error > 0:
            raise ValueError(f"max_error must be greater than 0, got {self.max_error}")


@dataclass(frozen=True)
class QLearningConfig:
    """Settings. All steps are environment steps, counted over all environments together."""

    num_envs: int = 1
    """Environments stepped side by side."""
    gamma: float = 0.99
    """Discount a step, in [0, 1]."""
    learning_rate: float = 1.0
    """Step size at the first visit of a state and action, in (0, 1]."""
    learning_rate_power: float = 0.55
    """How the step size falls: at the n-th visit of a state and action it is learning_rate / n ** power.
    Values converge for powers in (1/2, 1] (Even-Dar and Mansour 2003); 0 keeps it constant."""
    initial_value: float = 0.0
    """Value of every action at the start; above what can be earned, it makes greedy actions explore."""
    exploration_initial: float = 1.0
    """Epsilon at the start."""
    exploration_final: float = 0.05
    """Epsilon at the end of its linear schedule, and from then on."""
    exploration_fraction: float = 0.8
    """Share of the training over which epsilon falls, in (0, 1]."""

    def __post_init__(self) -> None:
        if self.num_envs < 1:
            raise ValueError(f"num_envs must be 1 or more, got {self.num_envs}")
        for name in ("gamma", "learning_rate_power", "exploration_initial", "exploration_final"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be between 0 and 1, got {getattr(self, name)}")
        for name in ("learning_rate", "exploration_fraction"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must be greater than 0 and at most 1, got {getattr(self, name)}")
        if not np.isfinite(self.initial_value):
            raise ValueError(f"initial_value must be finite, got {self.initial_value}")


def epsilon_at(env_step: int, total_steps: int, config: QLearningConfig) -> float:
    """Linear from initial to final over the first part of the training."""
    progress = min(1.0, env_step / (config.exploration_fraction * total_steps))
    return config.exploration_initial + progress * (config.exploration_final - config.exploration_initial)


def act(q: np.ndarray, epsilon: float, rng: np.random.Generator) -> np.ndarray:
    """Epsilon-greedy actions (B,) for rows of values (B, A), drawn for each; equal values at random."""
    explore = rng.random(len(q)) < epsilon
    random = rng.integers(q.shape[1], size=len(q))
    best = q == q.max(axis=1, keepdims=True)
    return np.where(explore, random, np.argmax(best * (1 - rng.random(q.shape)), axis=1))


def q_learning_update(
    q: np.ndarray,
    visits: np.ndarray,
    transitions: Iterator[tuple[int, int, float, bool, int]],
    config: QLearningConfig,
) -> float:
    """q(s, a) += alpha (r + gamma (1 - terminated) max q(s') - q(s, a)), one transition after the other.

    Transitions are (state, action, reward, terminated, next state); q and visits (S, A) change in place.
    Returns the sum of the absolute errors in brackets.
    """
    total = 0.0
    for state, action, reward, terminated, successor in transitions:
        visits[state, action] += 1
        rate = config.learning_rate / visits[state, action] ** config.learning_rate_power
        target = reward if terminated else reward + config.gamma * q[successor].max()
        error = target - q[state, action]
        q[state, action] += rate * error
        total += abs(error)
    return total


class Table(nn.Module):
    """Action values of every state, (S, A) float64, as the one weight of an agent."""

    def __init__(self, num_states: int, num_actions: int, value: float):
        super().__init__()
        values = torch.full((num_states, num_actions), value, dtype=torch.float64)
        self.q = nn.Parameter(values, requires_grad=False)


class TabularAgent(Agent):
    """Base of the three: Discrete observations and actions, a table on the CPU, and acting from it."""

    network: Table

    def __init__(
        self,
        env: str | VectorEnv | UnmadeEnv,
        config: Any = None,
        encoder: str | nn.Module = "auto",
        seed: int = 0,
        device: str = "auto",
    ):
        super().__init__(env, config, encoder, seed, "cpu" if device == "auto" else device)
        observations, actions, env_id = self.observation_space, self.action_space, self.env_spec()["env_id"]
        if not isinstance(observations, spaces.Discrete):
            raise ValueError(f"{self.name} takes Discrete observations; {env_id} has {observations}")
        if not isinstance(actions, spaces.Discrete):
            raise ValueError(f"{self.name} takes Discrete actions; {env_id} has {actions}")
        if encoder not in ("auto", "table"):
            raise ValueError(f"encoder must be auto: {self.name} looks states up in a table, got {encoder!r}")
        if self.device.type != "cpu":
            raise ValueError(f"device must be auto or cpu: {self.name} has a table there, got {device!r}")
        self.first_state, self.first_action = int(observations.start), int(actions.start)
        value = getattr(self.config, "initial_value", 0.0)
        self.network = Table(int(observations.n), int(actions.n), value)
        self.q: np.ndarray = self.network.q.numpy()
        """The table (S, A), sharing the network's memory: change it in place."""

    def describe_network(self) -> dict[str, Any]:
        return {"name": "table", "spec": {"input": space_to_json(self.observation_space)}}


class Planner(TabularAgent):
    """Base of the two that plan: `sweep` over all states and actions until they have `converged`."""

    step_name: ClassVar[str] = "backups, each of one action in one state"
    run_options: ClassVar[dict[str, Any]] = {"total_steps": 1_000_000, "log_every": 1, "eval_every": 100}

    def __init__(
        self,
        env: str | VectorEnv | UnmadeEnv,
        config: Any = None,
        encoder: str | nn.Module = "auto",
        seed: int = 0,
        device: str = "auto",
    ):
        super().__init__(env, config, encoder, seed, device)
        if not isinstance(env, UnmadeEnv):
            self.start()

    @cached_property
    def mdp(self) -> MDP:
        """What is planned with."""
        spec = self.env_spec()
        return make_mdp(spec["env_id"], spec["env_kwargs"])

    def start(self) -> None:
        _ = self.mdp  # ValueError where the environment does not expose it

    def sweep(self) -> dict[str, float]:
        """Improve the table once, set `converged`, and tell how far it is."""
        raise NotImplementedError

    def training(self, total_steps: int, log_every: int = 1000) -> Iterator[Row]:
        """As every agent's, but a step is a backup, of which a sweep makes S A; it ends when converged."""
        window, window_step, window_updates = time.perf_counter(), self.env_step, self.grad_step
        while self.env_step < total_steps and not self.converged:
            metrics = self.sweep()
            check_finite(metrics, self.env_step, self.grad_step)
            before, self.env_step = self.env_step, self.env_step + self.q.size
            self.grad_step += 1
            if passes(log_every, before, self.env_step) or self.env_step >= total_steps or self.converged:
                now = time.perf_counter()
                row: Row = {"env_step": self.env_step, "grad_step": self.grad_step}
                row |= {f"train/{name}": value for name, value in metrics.items()}
                row["train/start_value"] = float(self.mdp.start @ self.q.max(axis=1))
                row["speed/env_steps_per_s"] = (self.env_step - window_step) / (now - window)
                row["speed/updates_per_s"] = (self.grad_step - window_updates) / (now - window)
                yield row
                window, window_step, window_updates = time.perf_counter(), self.env_step, self.grad_step

    def actions(
        self, obs: Tensor, state: Any, episode_start: np.ndarray | None, deterministic: bool
    ) -> tuple[np.ndarray, Any]:
        return self.q[obs.numpy() - self.first_state].argmax(axis=1) + self.first_action, state

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {}, {"converged": self.converged}

    def restore(
        self, tensors: dict[str, Tensor], meta: dict[str, Any], load: Callable[[str], dict[str, Tensor]]
    ) -> bool:
        self.converged = meta["converged"]
        return True


def _recipe(config: type) -> Any:
    def recipe(env_id: str, **changes: Any) -> Any:
        """The defaults, with `changes` made."""
        return config(**changes)

    return staticmethod(recipe)


class ValueIteration(Planner):
    """Value iteration (Bellman 1957), where an environment exposes its transitions; exact to `max_error`.

    >>> from foveal.agents import ValueIteration
    >>> agent = ValueIteration("foveal/GridWorld-v0").learn(100_000, progress=False)
    >>> agent.converged
    True
    """

    name: ClassVar[str] = "value-iteration"
    Config: ClassVar[type] = ValueIterationConfig
    recipe = _recipe(ValueIterationConfig)
    config: ValueIterationConfig

    def sweep(self) -> dict[str, float]:
        previous, gamma = self.q.copy(), self.config.gamma
        self.q[:] = optimality_backup(self.mdp, previous, gamma)
        estimate, error = optimum_near(self.mdp, self.q, previous, gamma)
        self.converged = error <= self.config.max_error or indistinguishable(self.q, previous)
        if self.converged:
            self.q[:] = estimate
        return {"max_error": error}


class PolicyIteration(Planner):
    """Policy iteration (Howard 1960), where an environment exposes its transitions; values in closed form."""

    name: ClassVar[str] = "policy-iteration"
    Config: ClassVar[type] = PolicyIterationConfig
    recipe = _recipe(PolicyIterationConfig)
    config: PolicyIterationConfig
    policy: np.ndarray | None = None
    """(S, A): the policy to be valued next; at the start the one that is greedy for the table."""

    def sweep(self) -> dict[str, float]:
        policy, gamma = greedy(self.q) if self.policy is None else self.policy, self.config.gamma
        self.q[:] = action_values(self.mdp, policy_values(self.mdp, policy, gamma), gamma)
        self.policy, changed = improve(policy, self.q)
        self.converged = not changed
        return {"changed_states": changed}

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, meta = super().state()
        return tensors if self.policy is None else {"policy": torch.from_numpy(self.policy)}, meta

    def restore(
        self, tensors: dict[str, Tensor], meta: dict[str, Any], load: Callable[[str], dict[str, Tensor]]
    ) -> bool:
        self.policy = tensors["policy"].numpy() if "policy" in tensors else None
        return super().restore(tensors, meta, load)


class QLearning(TabularAgent):
    """Q-learning (Watkins 1989, "Learning from Delayed Rewards") for Discrete observations and actions.

    >>> from foveal.agents import QLearning
    >>> agent = QLearning("foveal/GridWorld-v0", seed=1).learn(300, progress=False)
    >>> agent.q.shape
    (14, 4)
    """

    name: ClassVar[str] = "q-learning"
    Config: ClassVar[type] = QLearningConfig
    recipe = _recipe(QLearningConfig)
    config: QLearningConfig

    def __init__(
        self,
        env: str | VectorEnv | UnmadeEnv,
        config: QLearningConfig | None = None,
        encoder: str | nn.Module = "auto",
        seed: int = 0,
        device: str = "auto",
    ):
        super().__init__(env, config, encoder, seed, device)
        self.acting_rng, _, self.predict_rng, _ = random_streams(seed)
        self.visits = np.zeros(self.q.shape, np.int64)
        """(S, A): how often each action has been learned from."""
        self.epsilon = self.config.exploration_initial
        self.obs: Any = None
        """States that the environments stand at; None before training."""

    def start(self) -> None:
        if self.obs is None:
            self.obs = self.env.reset()

    def training(self, total_steps: int, log_every: int = 1000) -> Iterator[Row]:
        config, env = self.config, self.env
        self.start()
        episodes: list[Any] = []
        error_sum = 0.0
        window, window_step, window_updates = time.perf_counter(), self.env_step, self.grad_step

        while self.env_step < total_steps:
            self.epsilon = epsilon_at(self.env_step, total_steps, config)
            states = self.obs - self.first_state
            actions = act(self.q[states], self.epsilon, self.acting_rng)
            step = env.step(actions + self.first_action)
            # Values go on beyond a truncation: only a termination cuts them off.
            arrays = (states, actions, step.rewards, step.terminated, step.next_obs - self.first_state)
            transitions = zip(*(array.tolist() for array in arrays))
            error_sum += q_learning_update(self.q, self.visits, transitions, config)
            self.obs = step.obs
            episodes += step.episodes
            before, self.env_step = self.env_step, self.env_step + env.num_envs
            self.grad_step += 1

            if passes(log_every, before, self.env_step) or self.env_step >= total_steps:
                now = time.perf_counter()
                error = error_sum / (self.env_step - window_step)
                check_finite({"td_error": error}, self.env_step, self.grad_step)
                row: Row = {"env_step": self.env_step, "grad_step": self.grad_step}
                if episodes:
                    row["train/return_mean"] = float(np.mean([e.episode_return for e in episodes]))
                    row["train/length_mean"] = float(np.mean([e.length for e in episodes]))
                row["train/episodes"] = len(episodes)
                row["train/epsilon"] = self.epsilon
                row["train/td_error"] = error
                row["speed/env_steps_per_s"] = (self.env_step - window_step) / (now - window)
                row["speed/updates_per_s"] = (self.grad_step - window_updates) / (now - window)
                episodes, error_sum = [], 0.0
                yield row
                window, window_step, window_updates = time.perf_counter(), self.env_step, self.grad_step

    def actions(
        self, obs: Tensor, state: Any, episode_start: np.ndarray | None, deterministic: bool
    ) -> tuple[np.ndarray, Any]:
        q = self.q[obs.numpy() - self.first_state]
        if deterministic:
            return q.argmax(axis=1) + self.first_action, state
        return act(q, self.config.exploration_final, self.predict_rng) + self.first_action, state

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        self.start()
        env_arrays, env_meta = self.env.state()
        tensors = {"visits": torch.from_numpy(self.visits)}
        tensors |= {f"env.{name}": torch.as_tensor(array) for name, array in env_arrays.items()}
        meta = {
            "env": env_meta,
            "acting_rng": rng_to_json(self.acting_rng),
            "predict_rng": rng_to_json(self.predict_rng),
            "epsilon": self.epsilon,
        }
        return tensors, meta

    def restore(
        self, tensors: dict[str, Tensor], meta: dict[str, Any], load: Callable[[str], dict[str, Tensor]]
    ) -> bool:
        self.visits[:] = tensors["visits"].numpy()
        rng_from_json(self.acting_rng, meta["acting_rng"])
        rng_from_json(self.predict_rng, meta["predict_rng"])
        self.epsilon = meta["epsilon"]
        arrays = {k.removeprefix("env."): v.numpy() for k, v in tensors.items() if k.startswith("env.")}
        self.obs, exact = self.env.restore(arrays, meta["env"])
        return exact
