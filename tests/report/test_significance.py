"""Comparisons against SciPy and statsmodels on the same numbers, and what has no test."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower

from aang_ray.report.significance import compare, holm, p_text, seeds_needed


def sides(first: list[float], second: list[float]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Two configurations of the same seeds; the second has them in another order, and one seed more."""
    seeds = list(range(len(first)))
    return (
        {"seeds": seeds, "test_values": first},
        {"seeds": [99, *seeds[::-1]], "test_values": [0.0, *second[::-1]]},
    )


@given(st.integers(3, 12), st.integers(0, 2**32 - 1))
def test_the_t_test_is_scipys(size: int, seed: int) -> None:
    first, second = np.random.default_rng(seed).normal(0.7, 0.02, (2, size))
    found = compare(*sides(list(first), list(second)))
    assert found["pairs"] == size
    assert found["difference"] == pytest.approx(np.mean(first - second))
    assert found["p_value"] == pytest.approx(stats.ttest_rel(first, second).pvalue, rel=1e-9)


def test_the_other_tests_are_scipys() -> None:
    first, second = [0.70, 0.75, 0.72, 0.78, 0.71], [0.69, 0.70, 0.73, 0.74, 0.68]
    found = compare(*sides(first, second), thorough=True)
    differences = np.subtract(first, second)
    assert found["p_wilcoxon"] == pytest.approx(stats.wilcoxon(differences).pvalue)
    # All 5^5 resamples, each as likely as the others: the exact percentiles that the drawn resamples estimate.
    means = np.stack(np.meshgrid(*[differences] * 5)).reshape(5, -1).mean(axis=0)
    assert found["difference_low"] == pytest.approx(np.quantile(means, 0.025), abs=0.002)
    assert found["difference_high"] == pytest.approx(np.quantile(means, 0.975), abs=0.002)
    needed = TTestPower().solve_power(np.mean(differences) / np.std(differences, ddof=1), power=0.8, alpha=0.05)
    assert found["seeds_needed"] == np.ceil(needed)


@pytest.mark.parametrize("effect", [0.05, 0.1, 0.3, 0.5, 1.0, 2.0])
def test_seeds_needed_is_what_statsmodels_solves(effect: float) -> None:
    needed = TTestPower().solve_power(effect_size=effect, power=0.8, alpha=0.05, alternative="two-sided")
    assert seeds_needed(-effect * 3, 3.0) == np.ceil(needed)


def test_a_difference_that_no_number_of_seeds_finds() -> None:
    assert seeds_needed(1e-9, 1.0) is None
    assert seeds_needed(100.0, 1.0) == 2


@settings(max_examples=20)  # a call of statsmodels takes a tenth of a second
@given(st.lists(st.floats(0, 1), min_size=1, max_size=10))
def test_holm_is_that_of_statsmodels(p_values: list[float]) -> None:
    expected = multipletests(p_values, method="holm")[1]
    assert holm(p_values) == pytest.approx(list(expected))
    assert holm([None, *p_values, None]) == [None, *holm(p_values), None]


@pytest.mark.parametrize(
    ("first", "second", "why"),
    [
        ([], [], "fewer than 3 pairs of matching seeds"),
        ([0.5, 0.7], [0.1, 0.2], "fewer than 3 pairs of matching seeds"),
        ([0.5, 0.6, 0.7], [0.4, 0.5, 0.6], "all differences are equal"),
    ],
)
def test_why_there_is_no_test(first: list[float], second: list[float], why: str) -> None:
    found = compare(*sides(first, second), thorough=True)
    assert (found["p_value"], found["no_test"], found["pairs"]) == (None, why, len(first))
    assert "seeds_needed" not in found


def test_a_view_without_scores_has_no_pairs() -> None:
    one = {"seeds": [0, 1, 2], "test_clean_values": None}
    assert compare(one, one, view="test_clean")["pairs"] == 0


def test_p_values_are_never_zero() -> None:
    assert [p_text(p) for p in (1e-9, 0.00099, 0.001, 0.0344, 1.0, None, float("nan"))] == [
        *("< 0.001", "< 0.001", "0.001", "0.034", "1.000", "–", "–")
    ]
