"""Summaries of scores that stay honest with few runs or episodes.

The definitions are those of rliable (Agarwal et al. 2021, "Deep Reinforcement Learning at the Edge of the
Statistical Precipice", arXiv:2108.13264): the interquartile mean is the mean of the middle 50 %, and
intervals are percentile bootstraps, over several tasks stratified: each task's scores are drawn from its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike

__all__ = [
    "bootstrap_band",
    "bootstrap_ci",
    "iqm",
    "performance_profile",
    "probability_of_improvement",
    "stratified_ci",
]

Scores = Sequence[np.ndarray | Sequence[float]]
"""Of one method: for each task (n,) scores, n >= 1 and not the same in all."""


class Statistic(Protocol):
    """A function that reduces one axis of an array, as `np.mean` and `iqm` do."""

    def __call__(self, values: np.ndarray, /, *, axis: int) -> np.ndarray: ...


def iqm(values: ArrayLike, *, axis: int | None = None) -> np.ndarray:
    """Interquartile mean: sort, drop the lowest and the highest quarter, average the rest.

    A quarter that is not a whole number of values is rounded down (scipy's and rliable's rule), so with fewer
    than four values nothing is dropped.

    Args:
        values: scores of any shape, at least one.
        axis: the axis to reduce; None takes all values together.

    Returns:
        float64, `values` without `axis` (a scalar for None).

    >>> float(iqm([0, 1, 2, 3, 4, 5, 6, 100]))
    3.5
    """
    array = np.asarray(values, dtype=np.float64)
    if axis is None:
        array, axis = array.reshape(-1), 0
    array = np.sort(np.moveaxis(array, axis, -1), axis=-1)
    count = array.shape[-1]
    if count == 0:
        raise ValueError("iqm needs at least one value, got none")
    cut = count // 4
    return array[..., cut : count - cut].mean(axis=-1)


def bootstrap_ci(
    values: Sequence[float] | np.ndarray,
    statistic: Statistic = np.mean,
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval of a statistic of independent scores (Efron 1979).

    The values are drawn again with replacement `resamples` times; the interval spans the middle `confidence`
    of the statistic over the draws. The draws come from a generator of its own, so the same values give the
    same interval and no other random state moves. One value gives an interval of width zero, which says
    nothing about its spread.

    Args:
        values: (n,) scores, n >= 1.
        statistic: reduces the last axis of an (m, n) array, given as `axis=-1`.
        confidence: share of the draws inside, in (0, 1).
        resamples: number of draws, at least 1.
        seed: of the draws.

    Returns:
        (low, high), in the scores' unit.

    Raises:
        ValueError: no values, more than one axis, or `confidence` or `resamples` out of range.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"values must be (n,) with n >= 1, got shape {array.shape}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be in (0, 1), got {confidence}")
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, got {resamples}")
    rng = np.random.default_rng(seed)
    # In slices of about a million numbers: 10,000 draws of 10,000 episodes at once would take 1.6 GB.
    rows = max(1, 1_000_000 // array.size)
    draws = [
        statistic(array[rng.integers(array.size, size=(min(rows, resamples - start), array.size))], axis=-1)
        for start in range(0, resamples, rows)
    ]
    return _percentiles(np.concatenate(draws), confidence)


def bootstrap_band(
    values: np.ndarray,
    statistic: Statistic = np.mean,
    *,
    confidence: float = 0.95,
    resamples: int = 2_000,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """`bootstrap_ci` of every row of `values` (T, n), which are the same n seeds at T steps: low and high,
    (T,) each. A draw takes whole seeds, the same at all steps."""
    steps, n = values.shape
    draws = np.random.default_rng(seed).integers(n, size=(resamples, n))
    tail = 100 * (1 - confidence) / 2
    bounds = np.empty((2, steps))
    rows = max(1, 4_000_000 // draws.size)
    for start in range(0, steps, rows):
        part = statistic(values[start : start + rows, draws], axis=-1)  # (rows, resamples)
        bounds[:, start : start + rows] = np.percentile(part, [tail, 100 - tail], axis=-1)
    return bounds[0], bounds[1]


def stratified_ci(
    scores: Scores,
    statistic: Statistic = np.mean,
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> tuple[float, float]:
    """The interval of `statistic` of the scores of all tasks together, where every draw takes as many of each
    task's scores as it has (rliable's). Of one task it is `bootstrap_ci`.

    Raises `ValueError` where there is no task, or one without scores.
    """
    tasks = _tasks(scores)
    rng = np.random.default_rng(seed)
    drawn = [task[rng.integers(task.size, size=(resamples, task.size))] for task in tasks]
    return _percentiles(statistic(np.concatenate(drawn, axis=1), axis=-1), confidence)


def probability_of_improvement(
    ours: Scores, theirs: Scores, *, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float, float]:
    """How likely a run of ours scores higher than one of theirs on a task, averaged over the tasks (a tie
    counts half: Mann and Whitney's U over the number of pairs), with its interval: both sides are drawn
    again.

    Returns:
        (probability, low, high).

    Raises `ValueError` where the two have not the same number of tasks, or one has no scores.

    >>> probability_of_improvement([[3, 2]], [[1, 2]])[0]
    0.875
    """
    pairs = list(zip(_tasks(ours), _tasks(theirs), strict=True))
    rng = np.random.default_rng(seed)
    whole, drawn = 0.0, np.zeros(resamples)
    for mine, other in pairs:
        wins = (np.sign(mine[:, None] - other[None, :]) + 1) / 2  # (n, m) of 0, 1/2, 1
        whole += wins.mean() / len(pairs)
        left, right = _shares(rng, mine.size, resamples), _shares(rng, other.size, resamples)
        drawn += np.einsum("bi,ij,bj->b", left, wins, right, optimize=True) / len(pairs)
    return float(whole), *_percentiles(drawn, confidence)


def performance_profile(
    scores: Scores,
    thresholds: ArrayLike,
    *,
    confidence: float = 0.95,
    resamples: int = 2_000,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The share of runs that score more than each threshold, averaged over the tasks, whose scores are on one
    scale (rliable's score distribution): share, low and high, (T,) each for T thresholds."""
    tasks = _tasks(scores)
    above = np.asarray(thresholds, dtype=np.float64)
    rng = np.random.default_rng(seed)
    whole, drawn = np.zeros(above.size), np.zeros((resamples, above.size))
    for task in tasks:
        higher = (task[:, None] > above).astype(np.float64)  # (n, T)
        whole += higher.mean(axis=0) / len(tasks)
        drawn += _shares(rng, task.size, resamples) @ higher / len(tasks)
    tail = 100 * (1 - confidence) / 2
    low, high = np.percentile(drawn, [tail, 100 - tail], axis=0)
    return whole, low, high


def _tasks(scores: Scores) -> list[np.ndarray]:
    tasks = [np.asarray(task, dtype=np.float64).reshape(-1) for task in scores]
    if not tasks or min(task.size for task in tasks) == 0:
        raise ValueError("scores: every task takes at least one, and there must be a task")
    return tasks


def _shares(rng: np.random.Generator, n: int, resamples: int) -> np.ndarray:
    """(resamples, n): what share of a draw with replacement each of n scores is."""
    return rng.multinomial(n, np.full(n, 1 / n), size=resamples) / n


def _percentiles(draws: np.ndarray, confidence: float) -> tuple[float, float]:
    tail = 100 * (1 - confidence) / 2
    low, high = np.percentile(draws, [tail, 100 - tail])
    return float(low), float(high)
