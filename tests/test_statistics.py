"""iqm and bootstrap_ci against hand-computed numbers and known theory."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from foveal.runs.statistics import (
    bootstrap_band,
    bootstrap_ci,
    iqm,
    performance_profile,
    probability_of_improvement,
    stratified_ci,
)


def test_iqm_drops_a_quarter_at_each_end():
    assert iqm([100, 3, 1, 2, 5, 0, 4, 6]) == pytest.approx((2 + 3 + 4 + 5) / 4)
    assert iqm([1, 2, 3, 4, 1000]) == pytest.approx(3)  # 5 // 4 = 1 at each end
    assert iqm([1, 2, 6]) == pytest.approx(3)  # too few to drop any
    assert iqm([7.5]) == 7.5
    assert iqm([[0, 3], [2, 100]]) == pytest.approx(2.5)  # all values together


def test_iqm_along_an_axis():
    values = np.array([[1, 2, 3, 1000], [5, 7, 100, -50]])
    assert iqm(values, axis=1) == pytest.approx([2.5, 6.0])
    assert iqm(values.T, axis=0) == pytest.approx([2.5, 6.0])


def test_iqm_is_scipys_trimmed_mean():
    stats = pytest.importorskip("scipy.stats")
    values = np.random.default_rng(0).normal(size=(11, 6))
    assert iqm(values) == pytest.approx(stats.trim_mean(values, 0.25, axis=None))
    assert iqm(values, axis=0) == pytest.approx(stats.trim_mean(values, 0.25, axis=0))


def test_iqm_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="at least one value"):
        iqm([])


def test_interval_of_two_values_is_exact():
    # Means of two draws from {0, 1}: 0 with probability 1/4, .5 with 1/2, 1 with 1/4.
    assert bootstrap_ci([0, 1]) == (0, 1)
    assert bootstrap_ci([0, 1], confidence=0.4) == (0.5, 0.5)
    assert bootstrap_ci([3.0]) == (3, 3)


def test_interval_matches_the_normal_one_and_narrows():
    values = np.random.default_rng(1).normal(10, 2, size=400)
    low, high = bootstrap_ci(values)
    half = 1.96 * values.std() / np.sqrt(400)
    assert low == pytest.approx(values.mean() - half, abs=0.02)
    assert high == pytest.approx(values.mean() + half, abs=0.02)
    few_low, few_high = bootstrap_ci(values[:25])
    assert few_high - few_low > 2 * (high - low)
    wide_low, wide_high = bootstrap_ci(values, confidence=0.99)
    assert wide_low < low < high < wide_high


def test_interval_of_another_statistic():
    values = [*np.linspace(0, 1, 29), 1e6]  # one huge outlier moves the mean, not the IQM
    low, high = bootstrap_ci(values, iqm)
    assert 0.2 < low < iqm(values) < high < 0.8


def test_interval_repeats_and_moves_no_global_state():
    values = np.arange(50.0)
    before = str(np.random.get_state())  # noqa: NPY002
    assert bootstrap_ci(values) == bootstrap_ci(values) != bootstrap_ci(values, seed=1)
    assert str(np.random.get_state()) == before  # noqa: NPY002


def test_slices_cover_exactly_the_resamples(monkeypatch):
    seen = []

    def counting_mean(values, *, axis):
        seen.append(len(values))
        return values.mean(axis=axis)

    bootstrap_ci(np.zeros(3_000), counting_mean, resamples=1_000)
    assert sum(seen) == 1_000
    assert max(seen) <= 333


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"values": []}, "n >= 1"),
        ({"values": [[1, 2]]}, "shape"),
        ({"values": [1], "confidence": 95}, "confidence"),
        ({"values": [1], "resamples": 0}, "resamples"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        bootstrap_ci(**arguments)


RLIABLE: dict[str, Any] = {
    "a": [
        [0.6, 0.422, 0.612, 0.476, 0.621, 0.739, 0.22, 0.553, 0.631, 0.492],
        [0.99, 0.764, 1.302, 1.047, 0.621, 0.497, 0.513, 0.52, 0.844, 0.885],
        [0.373, 0.301, 0.351, 0.436, 0.397, 0.354, 0.216, 0.427, 0.148, 0.411],
    ],
    "b": [
        [0.194, 0.338, 0.493, 0.478, 0.255, 0.191, 0.372, 0.26],
        [0.704, 1.012, 0.977, 0.822, 0.815, 0.972, 1.2, 0.815],
        [0.352, 0.369, 0.392, 0.456, 0.586, 0.462, 0.526, 0.508],
    ],
    "mean a": [0.558766666667, 0.497566666667, 0.622366666667],
    "mean b": [0.564541666667, 0.519958333333, 0.611625],
    "iqm a": [0.5143125, 0.4708125, 0.572625],
    "iqm b": [0.513416666667, 0.467166666667, 0.55675],
    "improvement": [0.475, 0.35, 0.604166666667],
    "profile a": [
        [0.966667, 0.733333, 0.366667, 0.166667, 0.066667],
        [0.9, 0.633333, 0.233333, 0.066667, 0.0],
        [1.0, 0.833333, 0.5, 0.266667, 0.166667],
    ],
    "profile b": [
        [0.916667, 0.625, 0.333333, 0.291667, 0.083333],
        [0.791667, 0.458333, 0.333333, 0.208333, 0.0],
        [1.0, 0.791667, 0.333333, 0.333333, 0.208333],
    ],
    "mean first task": [0.5366, 0.4462, 0.6143],
    "iqm first task": [0.559, 0.455495833333, 0.622833333333],
}
"""Scores (task by task) of two methods with ten and eight runs on three tasks, and what rliable 1.2.0 makes
of them with 50,000 resamples: `get_interval_estimates` with `aggregate_mean`, `aggregate_iqm` (of all tasks,
and of the first alone), `probability_of_improvement`; `create_performance_profile`. Value, low, high."""


def close(ours: tuple[float, ...], theirs: Sequence[float]) -> None:
    """The same value, and bounds within 1 % of the interval's width. Both are of 50,000 draws, of which a
    bound has a standard error of 0.2 to 0.4 % of the width (measured over four of rliable's)."""
    width = theirs[2] - theirs[1]
    assert ours[0] == pytest.approx(theirs[0], abs=1e-12)
    assert ours[1:] == pytest.approx(theirs[1:], abs=0.01 * width)


@pytest.mark.parametrize("method", ["a", "b"])
@pytest.mark.parametrize(("name", "statistic"), [("mean", np.mean), ("iqm", iqm)])
def test_aggregates_are_rliables(name, statistic, method):
    scores = [np.array(task) for task in RLIABLE[method]]
    value = float(statistic(np.concatenate(scores), axis=0))
    close((value, *stratified_ci(scores, statistic, resamples=50_000)), RLIABLE[f"{name} {method}"])
    if method == "a":
        first = (float(statistic(scores[0], axis=0)), *bootstrap_ci(scores[0], statistic, resamples=50_000))
        close(first, RLIABLE[f"{name} first task"])


def test_improvement_and_profiles_are_rliables():
    close(probability_of_improvement(RLIABLE["a"], RLIABLE["b"], resamples=50_000), RLIABLE["improvement"])
    for method in ("a", "b"):
        ours = performance_profile(RLIABLE[method], [0.2, 0.4, 0.6, 0.8, 1.0], resamples=50_000)
        for mine, theirs in zip(ours, RLIABLE[f"profile {method}"]):
            assert mine == pytest.approx(np.array(theirs), abs=0.035)  # a run is 1/30 or 1/24
        assert ours[0] == pytest.approx(np.array(RLIABLE[f"profile {method}"][0]), abs=1e-6)


def test_band_is_the_interval_of_every_step():
    values = np.random.default_rng(3).normal(size=(7, 5))
    for statistic in (np.mean, iqm):
        low, high = bootstrap_band(values, statistic)
        bounds = [bootstrap_ci(row, statistic, resamples=2_000) for row in values]
        assert np.stack([low, high], axis=1) == pytest.approx(np.array(bounds))


def test_improvement_counts_ties_as_half_and_needs_scores():
    assert probability_of_improvement([[1.0]], [[1.0]]) == (0.5, 0.5, 0.5)
    assert probability_of_improvement([[2], [0]], [[1], [0]])[0] == 0.75
    with pytest.raises(ValueError, match="every task takes at least one"):
        probability_of_improvement([[]], [[1]])
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        probability_of_improvement([[1], [2]], [[1]])
