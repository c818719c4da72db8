"""Statistics over the seeds of a setting: spread, bootstrap intervals and paired tests.

scipy is imported within functions: a training run imports this file long before it reports.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

CONFIDENCE = 0.95
RESAMPLES = 9999
ROUNDING = 1e-9  # differences of percentages that are closer are equal


@dataclass(frozen=True)
class Spread:
    """The results of the seeds of one setting; `sd` is None for a single seed."""

    values: tuple[float, ...]
    mean: float
    sd: float | None  # sample standard deviation, n - 1
    median: float
    low: float
    high: float

    @classmethod
    def of(cls, results: Iterable[float | None]) -> Spread | None:
        """The spread of the results that are known, or None if none is."""
        values = tuple(value for value in results if value is not None)
        if not values:
            return None
        mean, median = statistics.fmean(values), statistics.median(values)
        sd = statistics.stdev(values) if len(values) > 1 else None
        return cls(values, mean, sd, median, min(values), max(values))

    @property
    def n(self) -> int:
        return len(self.values)

    def overlaps(self, other: Spread) -> bool:
        return self.low <= other.high and other.low <= self.high


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval; `low` and `high` are None if it has none."""

    value: float
    low: float | None = None
    high: float | None = None
    p: float | None = None  # of the test that the number is 0
    n: int = 0


def bootstrap_interval(values: Sequence[float]) -> Estimate:
    """The mean of the values with its 95 % percentile bootstrap interval.

    The interval of a few values is too narrow: with three it cannot leave their range.

    Raises:
        ValueError: without values.
    """
    if not values:
        raise ValueError("no values: expected at least one")
    value = statistics.fmean(values)
    if len(set(values)) < 2:
        return Estimate(value, n=len(values))
    import numpy as np
    from scipy.stats import bootstrap

    result = bootstrap(
        (np.asarray(values),),
        np.mean,
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(0),  # the same table each time
    )
    low, high = result.confidence_interval
    return Estimate(value, float(low), float(high), n=len(values))


def paired_difference(
    results: Mapping[Any, float], baseline: Mapping[Any, float]
) -> Estimate | None:
    """Mean difference of two settings over their common seeds; None if they have none.

    The interval and p are those of Student's paired t-test. Rank tests cannot reach p < 0.05 with
    five seeds or fewer.
    """
    seeds = sorted(results.keys() & baseline.keys())
    if not seeds:
        return None
    differences = [results[seed] - baseline[seed] for seed in seeds]
    mean = statistics.fmean(differences)
    if max(differences) - min(differences) < ROUNDING:  # also for a single seed
        return Estimate(mean, n=len(seeds))
    from scipy.stats import ttest_rel

    test = ttest_rel([results[seed] for seed in seeds], [baseline[seed] for seed in seeds])
    low, high = test.confidence_interval(CONFIDENCE)
    return Estimate(mean, float(low), float(high), float(test.pvalue), len(seeds))


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> Estimate | None:
    """Spearman's rank correlation with its bootstrap interval and the p of a permutation test.

    None for fewer than three pairs, if all of x or all of y are equal, and for values that are not
    finite.
    """
    if len(x) < 3 or len(set(x)) < 2 or len(set(y)) < 2:
        return None
    if not all(map(math.isfinite, (*x, *y))):
        return None
    import numpy as np
    from scipy.stats import PermutationMethod, pearsonr, rankdata

    generator = np.random.default_rng(0)
    method = PermutationMethod(n_resamples=RESAMPLES, rng=generator)
    # Pearson's correlation of ranks is Spearman's.
    test = pearsonr(rankdata(x), rankdata(y), method=method)
    pairs = np.asarray([x, y])[:, generator.integers(0, len(x), (RESAMPLES, len(x)))]
    varied = (np.ptp(pairs, axis=-1) > 0).all(axis=0)  # a constant sample has no correlation
    resampled = pearsonr(*rankdata(pairs[:, varied], axis=-1), axis=-1).statistic
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail])
    return Estimate(float(test.statistic), float(low), float(high), float(test.pvalue), len(x))
