"""Every example is placed once, loads are about equal, and norms need few sub-groups."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aang_ray.train.workers.placement import FAIR, Costs, Placement, near_equal, place

lengths = st.lists(st.integers(1, 50), max_size=12)
segments = st.lists(lengths, min_size=2, max_size=9).filter(lambda all_: any(all_[1:]))


def costs_of(lengths_SE: list[list[int]]) -> list[Costs]:
    return [np.array(lengths_E, dtype=np.int64) for lengths_E in lengths_SE]


def loads(placement: Placement, costs: list[Costs]) -> list[int]:
    """Tokens of each worker, without the dev batch that every worker has."""
    return [
        sum(int(costs_E[start:stop].sum()) for costs_E, (start, stop) in zip(costs[1:], ranges[1:], strict=True))
        for ranges in placement.ranges
    ]


@given(segments, st.integers(1, 9), st.booleans())
def test_every_example_is_placed_once_and_dev_on_all(lengths_SE: list[list[int]], workers: int, whole: bool) -> None:
    costs = costs_of(lengths_SE)
    placement = place(costs, workers, whole)
    assert len(placement.ranges) == workers
    for segment, costs_E in enumerate(costs):
        placed = sorted(r for ranges in placement.ranges for r in range(*ranges[segment]))
        times = workers if segment == 0 else 1
        assert placed == sorted(list(range(len(costs_E))) * times)
    assert sum(load > 0 for load in loads(placement, costs)) == min(workers, sum(map(len, costs[1:])))


@given(segments, st.integers(1, 9))
def test_whole_segments_are_cut_only_where_they_must_be(lengths_SE: list[list[int]], workers: int) -> None:
    costs = costs_of(lengths_SE)
    placement = place(costs, workers, whole=True)
    tokens = [int(costs_E.sum()) for costs_E in costs]
    mean = sum(tokens[1:]) / workers
    examples = sum(len(costs_E) for costs_E in costs[1:])
    assert sum(load > 0 for load in loads(placement, costs)) == min(workers, examples)
    if sum(len(costs_E) > 0 for costs_E in costs[1:]) >= workers:
        assert all(tokens[segment] > FAIR * mean for segment in placement.split())
    if not placement.split():  # Graham's bound for lists in any order
        assert max(loads(placement, costs)) <= mean + (1 - 1 / workers) * max(tokens[1:]) + 1e-9


def optimum(totals: list[int], workers: int) -> int:
    """The least possible largest load, by trying everything."""
    return min(
        max(sum(t for t, at in zip(totals, chosen, strict=True) if at == w) for w in range(workers))
        for chosen in product(range(workers), repeat=len(totals))
    )


@given(st.lists(st.integers(1, 30), min_size=3, max_size=6), st.integers(2, 3))
def test_the_longest_first_bound(totals: list[int], workers: int) -> None:
    """At most 4/3 - 1/(3W) of the optimum (Graham 1969, theorem 2)."""
    costs = [np.zeros(0, dtype=np.int64), *(np.array([total]) for total in totals)]
    largest = max(loads(place(costs, workers, whole=True), costs))
    assert largest <= (4 / 3 - 1 / (3 * workers)) * optimum(totals, workers) + 1e-9


@given(st.permutations([0, 1, 2, 3, 4]), st.integers(1, 5))
def test_equal_costs_may_stand_in_any_order(order: list[int], workers: int) -> None:
    lengths_SE = [[7, 3], [3, 7], [5, 5], [4, 4, 2], [10]]
    expected = place(costs_of([[], *lengths_SE]), workers, whole=True)
    costs = costs_of([[], *(lengths_SE[s] for s in order)])
    assert sorted(loads(place(costs, workers, whole=True), costs)) == sorted(
        loads(expected, costs_of([[], *lengths_SE]))
    )


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(1, 12))
def test_near_equal_parts(costs: list[int], parts: int) -> None:
    """A part exceeds its fair share by no more than one example at each end, and none is empty."""
    costs_E = np.array(costs)
    ranges = near_equal(costs_E, parts)
    assert [start for start, _ in ranges] == [0, *(stop for _, stop in ranges[:-1])]
    assert ranges[-1][1] == len(costs)
    assert all(start < stop for start, stop in ranges)
    share = sum(costs) / len(ranges)
    for start, stop in ranges:
        assert int(costs_E[start:stop].sum()) <= share + 2 * max(costs)


def test_more_workers_than_segments() -> None:
    """40 and 10 tokens on 5 workers: 40 / 4 = 10 each."""
    placement = place(costs_of([[1], [5] * 8, [5, 5]]), 5, whole=True)
    assert placement.split() == {1: (0, 1, 2, 3)}
    assert [ranges[1] for ranges in placement.ranges] == [(0, 2), (2, 4), (4, 6), (6, 8), (0, 0)]
    assert placement.ranges[4][2] == (0, 2)
    assert placement.members(0) == (0, 1, 2, 3, 4)


def test_a_segment_that_outweighs_the_others_is_cut() -> None:
    """30 of 48 tokens on 3 workers, 16 each: 30 > 1.25 * 16, its halves are not."""
    placement = place(costs_of([[], [3] * 10, [6], [6], [6]]), 3, whole=True)
    assert placement.split() == {1: (0, 1)}
    assert sorted(loads(placement, costs_of([[], [3] * 10, [6], [6], [6]]))) == [15, 15, 18]


def test_one_row_where_only_sums_are_wanted() -> None:
    placement = place(costs_of([[], [4, 4], [4], [4]]), 2, whole=False)
    assert placement.ranges == (((0, 0), (0, 2), (0, 0), (0, 0)), ((0, 0), (0, 0), (0, 1), (0, 1)))


@pytest.mark.parametrize("whole", [False, True])
def test_more_workers_than_examples(whole: bool) -> None:
    assert loads(place(costs_of([[3], [2], [1]]), 4, whole), costs_of([[3], [2], [1]])).count(0) == 2
