"""Score an agent on environments of its own, without touching its training.

Everything here steps environments that it builds itself (`make_vec(..., training=False)`: true rewards, no
life-loss endings, a step limit where there is none) and draws from no generator but its own, so a run's
weights are the same with and without evaluation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing
from typing import Any, Protocol

import numpy as np
from gymnasium.vector.utils import batch_space

from ..envs import VectorEnv, make_vec
from .statistics import bootstrap_ci

__all__ = [
    "Policy",
    "decimals",
    "evaluate",
    "evaluation_row",
    "random_policy_return",
    "score_text",
    "validation_seed",
]


class Policy(Protocol):
    """What evaluation and video need of an agent."""

    def env_spec(self) -> dict[str, Any]: ...

    def predict(
        self,
        obs: Any,
        state: Any = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, Any]: ...


Act = Callable[[Any, Any, np.ndarray], tuple[np.ndarray, Any]]  # obs, state, episode_start -> actions, state


def evaluate(
    agent: Policy,
    episodes: int = 100,
    *,
    seed: int | None = None,
    num_envs: int | None = None,
    deterministic: bool = True,
    env_kwargs: Mapping[str, Any] | None = None,
    max_episode_steps: int | None = None,
    watch: Callable[[Any, np.ndarray], None] | None = None,
) -> dict[str, Any]:
    """Play exactly `episodes` episodes with `agent` and summarize their scores.

    Each environment contributes its first `episodes // num_envs` (or one more) episodes, whenever they end.
    Counting the first to finish instead would favour short episodes, which in CartPole are the bad ones. The
    same seed and `num_envs` give the same episodes on every call, so checkpoints of one run are compared on
    equal terms.

    Args:
        agent: any object with `predict`, in Stable-Baselines3's convention, and `env_spec()`, the arguments
            of `make_vec` from which the evaluation environments are made. Recurrent state is passed through,
            with `episode_start` True at first observations. With `deterministic=False` its `predict` draws as
            it sees fit.
        episodes: number of episodes, at least 1.
        seed: of the environments' first states and dynamics; None is the training environments' seed, whose
            evaluation episodes differ from its training ones. To choose among checkpoints use
            `validation_seed`: a score on the episodes it was chosen on is too high.
        num_envs: environments stepped together, at least 1, at most one per episode is made; None is 8.
        deterministic: the greedy policy.
        env_kwargs: replaces single arguments of the environment, e.g. {"repeat_action_probability": 0.0}.
        max_episode_steps: another step limit than in training.
        watch: called with the observations that are acted on, and which of them begin an episode.

    Returns:
        "eval/return_mean", "eval/return_std" (over episodes, ddof 0), "eval/return_ci95" ([low, high], the
        percentile bootstrap's 95 % interval of the mean, 10,000 resamples), "eval/episodes",
        "eval/length_mean" (agent steps) and "eval/returns", the true undiscounted score of every episode,
        environment by environment.

    Raises:
        ValueError: `episodes` or `num_envs` below 1.
    """
    spec = dict(agent.env_spec())
    if env_kwargs:
        spec["env_kwargs"] = {**(spec.get("env_kwargs") or {}), **env_kwargs}
    if max_episode_steps is not None:
        spec["max_episode_steps"] = max_episode_steps

    def act(obs: Any, state: Any, episode_start: np.ndarray) -> tuple[np.ndarray, Any]:
        if watch is not None:
            watch(obs, episode_start)
        return agent.predict(obs, state=state, episode_start=episode_start, deterministic=deterministic)

    returns, lengths = play(spec, lambda env: act, episodes, seed=seed, num_envs=num_envs)
    return {
        "eval/return_mean": float(returns.mean()),
        "eval/return_std": float(returns.std()),
        "eval/return_ci95": list(bootstrap_ci(returns)),
        "eval/episodes": episodes,
        "eval/length_mean": float(lengths.mean()),
        "eval/returns": returns.tolist(),
    }


def evaluation_row(result: Mapping[str, Any]) -> dict[str, float]:
    """The result of `evaluate` as the flat columns of a metrics row: the interval becomes
    `eval/return_ci95_low` and `eval/return_ci95_high`, the single returns are left out."""
    row = {key: value for key, value in result.items() if key not in ("eval/return_ci95", "eval/returns")}
    row["eval/return_ci95_low"], row["eval/return_ci95_high"] = result["eval/return_ci95"]
    return row


def score_text(result: Mapping[str, Any]) -> str:
    """The result of `evaluate` in words, with an open bracket for more: "500.0 ± 0.0 over 100 episodes (95 %
    ..."."""
    digits, (low, high) = decimals(result), result["eval/return_ci95"]
    return (
        f"{result['eval/return_mean']:.{digits}f} ± {result['eval/return_std']:.{digits}f} over "
        f"{result['eval/episodes']} episodes (95 % interval {low:.{digits}f} to {high:.{digits}f}"
    )


def decimals(result: Mapping[str, Any]) -> int:
    """Decimals that a score is worth: three where scores are around 1, else one."""
    return 1 if max(abs(result["eval/return_mean"]), result["eval/return_std"]) >= 2 else 3


def random_policy_return(
    spec: Mapping[str, Any], episodes: int = 100, *, seed: int | None = None, num_envs: int | None = None
) -> float:
    """Mean score of uniformly random actions, the summary's `baseline/random_policy`.

    Args:
        spec: arguments of `make_vec`, as `VectorEnv.spec_dict()` gives them.
        episodes, seed, num_envs: as in `evaluate`; the same ones give the same first states.

    Raises:
        ValueError: `episodes` or `num_envs` below 1.
    """

    def uniform(env: VectorEnv) -> Act:
        actions = batch_space(env.single_action_space, env.num_envs)
        actions.seed(env.seed)
        return lambda obs, state, episode_start: (np.asarray(actions.sample()), None)

    returns, _ = play(dict(spec), uniform, episodes, seed=seed, num_envs=num_envs)
    return float(returns.mean())


def validation_seed(seed: int) -> int:
    """The seed for choosing among checkpoints in a run of seed `seed`, so that its final score, evaluated
    with `seed` itself, comes from episodes that played no part in the choice."""
    return int(np.random.SeedSequence(entropy=seed, spawn_key=(2,)).generate_state(1)[0] >> 1)


def quotas(episodes: int, num_envs: int) -> list[int]:
    """How many episodes of each environment count, its first ones."""
    return [episodes // num_envs + (i < episodes % num_envs) for i in range(num_envs)]


def play(
    spec: dict[str, Any],
    policy: Callable[[VectorEnv], Act],
    episodes: int,
    *,
    seed: int | None = None,
    num_envs: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Scores and lengths of exactly `episodes` episodes, float64 (episodes,), environment by environment."""
    if episodes < 1:
        raise ValueError(f"episodes must be at least 1, got {episodes}")
    if num_envs is not None and num_envs < 1:
        raise ValueError(f"num_envs must be at least 1, got {num_envs}")
    count = min(episodes, num_envs or 8)
    spec = {**spec, "num_envs": count, "training": False, "render_mode": None}
    if seed is not None:
        spec["seed"] = seed
    # Which episodes count is settled before the first step: this many of environment i, its first ones.
    quota = quotas(episodes, count)
    finished: list[list[tuple[float, int]]] = [[] for _ in range(count)]
    with closing(make_vec(**spec)) as env:
        act = policy(env)
        obs, state, episode_start = env.reset(), None, np.ones(count, dtype=bool)
        while sum(map(len, finished)) < episodes:
            actions, state = act(obs, state, episode_start)
            step = env.step(actions)
            for episode in step.episodes:
                if len(finished[episode.env]) < quota[episode.env]:
                    finished[episode.env].append((episode.episode_return, episode.length))
            obs, episode_start = step.obs, step.reset
    scores = np.array([score for done in finished for score in done], dtype=np.float64)
    return scores[:, 0], scores[:, 1]
