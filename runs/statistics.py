"""Summaries of scores that stay honest with few runs or episodes.

The definitions are those of rliable (Agarwal et al. 2021, "Deep Reinforcement Learning at the Edge of the
Statistical Precipice", arXiv:2108.13264): the interquartile mean is the mean of the middle 50 %, and
intervals are percentile bootstraps. Deviation: resampling is over one axis only; rliable also stratifies over
tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike

__all__ = ["bootstrap_ci", "iqm"]


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
    tail = 100 * (1 - confidence) / 2
    low, high = np.percentile(np.concatenate(draws), [tail, 100 - tail])
    return float(low), float(high)
