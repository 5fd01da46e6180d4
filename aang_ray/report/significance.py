"""Paired comparisons of two rows of a table over the seeds that both have."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

MIN_PAIRS = 3
"""With fewer pairs there is no p-value: two differences say next to nothing about their spread."""
POWER, LEVEL = 0.8, 0.05
MOST_SEEDS = 10_000
COMPARED = ("pairs", "difference", "p_value", "no_test")
"""What `compare` returns."""
THOROUGH = ("difference_low", "difference_high", "p_wilcoxon", "p_holm", "seeds_needed")
"""What `compare` adds if it is thorough; `p_holm` depends on all rows of a column and is the caller's."""


def compare(
    ours: Mapping[str, Any], other: Mapping[str, Any], *, view: str = "test", thorough: bool = False
) -> dict[str, Any]:
    """Compare two configurations over their common seeds.

    With differences d_i over m common seeds, t = mean(d) / (sd(d) / sqrt(m)) with m - 1 degrees of freedom (the paired
    t-test of the AANG paper).

    Args:
        ours: `seeds` and `<view>_values` of one configuration.
        other: The same of the one that it is compared with.
        view: `test` or `test_clean`.
        thorough: Also compute what `THOROUGH` names, except `p_holm`.

    Returns:
        `pairs`; `difference`: the mean difference; `p_value`: two-sided, of the t-test, or None; `no_test`: why there
        is none. If thorough: `difference_low` and `difference_high`, the 95 % bootstrap interval of the mean difference
        (percentiles, over the pairs); `p_wilcoxon`: two-sided, of the signed-rank test; `seeds_needed`: see the
        function of this name.
    """
    # Scores of a view without examples are None.
    first, second = (dict(zip(one["seeds"], one[f"{view}_values"] or [], strict=False)) for one in (ours, other))
    differences = [first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())]
    found: dict[str, Any] = {"pairs": len(differences), "difference": fmean(differences) if differences else None}
    if len(differences) < MIN_PAIRS:
        return found | {"p_value": None, "no_test": f"fewer than {MIN_PAIRS} pairs of matching seeds"}
    if max(differences) - min(differences) <= 1e-12:  # the rounding of a subtraction is not a spread
        return found | {"p_value": None, "no_test": "all differences are equal"}
    from scipy import special  # imports here: a table without tests does not wait for SciPy

    t = fmean(differences) / (stdev(differences) / math.sqrt(len(differences)))
    found |= {"p_value": 2 * float(special.stdtr(len(differences) - 1, -abs(t))), "no_test": None}
    if thorough:
        import numpy as np
        from scipy import stats

        resampled = stats.bootstrap((differences,), np.mean, method="percentile", rng=np.random.default_rng(0))
        found["difference_low"], found["difference_high"] = map(float, resampled.confidence_interval)
        found["p_wilcoxon"] = float(stats.wilcoxon(differences).pvalue)
        found["seeds_needed"] = seeds_needed(fmean(differences), stdev(differences))
    return found


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Return Holm's adjusted p-values of several tests; None stays None and does not count as a test."""
    order = sorted((p, position) for position, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, position) in enumerate(order):
        largest = max(largest, min(1.0, p * (len(order) - rank)))
        adjusted[position] = largest
    return adjusted


def seeds_needed(difference: float, deviation: float) -> int | None:
    """Return how many pairs a two-sided paired t-test needs to find a difference of this size.

    With n pairs the test's statistic has a noncentral t distribution with n - 1 degrees of freedom and noncentrality
    sqrt(n) |difference| / deviation. The answer is the smallest n whose power at the level 0.05 is 0.8.

    Args:
        difference: Mean difference of a pair.
        deviation: Standard deviation of the differences.

    Returns:
        The number of pairs, at least 2; None if it is above 10,000.
    """
    from scipy import stats

    def power(pairs: int) -> float:
        edge, centre = stats.t.isf(LEVEL / 2, pairs - 1), math.sqrt(pairs) * abs(difference) / deviation
        return float(stats.nct.sf(edge, pairs - 1, centre) + stats.nct.cdf(-edge, pairs - 1, centre))

    low, high = 1, 2
    while power(high) < POWER:
        low, high = high, 2 * high
        if low >= MOST_SEEDS:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if power(middle) < POWER else (low, middle)
    return high


def mcnemar(only_first: int, only_second: int) -> float:
    """Return the two-sided p-value of the exact McNemar test: a binomial test with 1/2 of the examples that differ.

    Args:
        only_first: Number of examples on which the first alone is right.
        only_second: Number of examples on which the second alone is right.
    """
    from scipy import stats

    pairs = only_first + only_second
    return float(stats.binomtest(only_first, pairs).pvalue) if pairs else 1.0


def p_text(p: float | None) -> str:
    """Return a p-value with three digits; one below 0.001 as `< 0.001`."""
    if p is None or math.isnan(p):
        return "–"
    return "< 0.001" if p < 0.001 else f"{p:.3f}"
