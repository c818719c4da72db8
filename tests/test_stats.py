"""Statistics over seeds, against values computed by hand and by scipy."""

from __future__ import annotations

import math

import pytest
from scipy.stats import ttest_1samp

from attention_transfer.stats import (
    Spread,
    bootstrap_interval,
    paired_difference,
    rank_correlation,
)


def test_spread():
    spread = Spread.of([3.0, None, 1.0, 2.0])
    assert spread is not None
    assert (spread.n, spread.mean, spread.median, spread.low, spread.high) == (3, 2, 2, 1, 3)
    assert spread.sd == 1.0
    assert Spread.of([None]) is None


def test_the_bootstrap_interval_contains_the_mean_and_is_the_same_each_time():
    values = [8.7, 8.9, 8.5, 8.8, 8.6]
    estimate = bootstrap_interval(values)
    assert estimate.value == pytest.approx(8.7)
    assert 8.5 < estimate.low < 8.7 < estimate.high < 8.9
    assert estimate == bootstrap_interval(values)


def test_one_value_has_no_interval():
    assert bootstrap_interval([1.0]).low is None
    with pytest.raises(ValueError, match="no values"):
        bootstrap_interval([])


def test_seeds_are_paired():
    """Differences -1, -2, -3: mean -2, standard error 1/√3, t = -2√3 with 2 degrees of freedom."""
    estimate = paired_difference({0: 9.0, 1: 18.0, 2: 27.0, 7: 1.0}, {2: 30.0, 1: 20.0, 0: 10.0})
    expected = ttest_1samp([-1.0, -2.0, -3.0], 0.0)
    assert (estimate.value, estimate.n) == (-2.0, 3)
    assert estimate.p == pytest.approx(expected.pvalue)
    half = 4.302652729 / math.sqrt(3)
    assert (estimate.low, estimate.high) == pytest.approx((-2 - half, -2 + half))


def test_too_few_seeds_have_no_test():
    assert paired_difference({0: 1.0}, {1: 1.0}) is None
    estimate = paired_difference({0: 1.0}, {0: 3.0})
    assert (estimate.value, estimate.p) == (-2.0, None)


def test_equal_differences_have_no_test():
    """0.4 each time; as floats they differ in the last bits."""
    estimate = paired_difference({0: 25.7, 1: 25.1}, {0: 26.1, 1: 25.5})
    assert estimate.value == pytest.approx(-0.4)
    assert (estimate.low, estimate.p, estimate.n) == (None, None, 2)


def test_rank_correlation():
    x = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
    estimate = rank_correlation(x, [v**3 for v in x])
    assert estimate.value == pytest.approx(1.0)
    assert estimate.p < 0.01
    assert rank_correlation(x, [1.0] * 7) is None
    assert rank_correlation([1.0, 2.0], [1.0, 2.0]) is None
