"""iqm and bootstrap_ci against hand-computed numbers and known theory."""

import numpy as np
import pytest

from foveal.runs.statistics import bootstrap_ci, iqm


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
