"""Decides which worker computes which examples of a step (docs/objective-parallel.md).

The placement is a function of the batch alone, so nothing is sent. The cost of an example is its number of tokens.
Every worker computes the whole dev batch, segment 0. The other segments are placed in one of two ways:

- `whole`, for steps that request norms: the longest segments first, each on the worker with the smallest load (LPT;
  Graham 1969). Segments are divided only if they must be, because the norm then needs one more body-sized sum.
- otherwise all examples form one row, which is divided into parts of near-equal cost.

Shape suffixes: W workers, S segments, E examples of a segment.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol, Self, TypeVar

import numpy as np
import numpy.typing as npt

Costs = npt.NDArray[np.int64]
Range = tuple[int, int]
EMPTY: Range = (0, 0)
FAIR = 1.25
"""A segment is divided only if its load alone exceeds this factor times the mean load."""


class Divisible(Protocol):
    """A sequence of examples with a method that returns a part of it."""

    def part(self, start: int, stop: int) -> Self: ...


Part = TypeVar("Part", bound=Divisible)


@dataclass(frozen=True)
class Placement:
    """The examples of each segment that each worker computes."""

    ranges: tuple[tuple[Range, ...], ...]
    """Examples [start, stop) by worker and segment, [W][S]."""

    def members(self, segment: int) -> tuple[int, ...]:
        """Return the ranks of the workers that compute examples of a segment, in ascending order."""
        return tuple(rank for rank, of_rank in enumerate(self.ranges) if of_rank[segment][0] < of_rank[segment][1])

    def split(self) -> dict[int, tuple[int, ...]]:
        """Return the segments (except dev) that several workers compute, each with the ranks of these workers."""
        members = {segment: self.members(segment) for segment in range(1, len(self.ranges[0]))}
        return {segment: ranks for segment, ranks in members.items() if len(ranks) > 1}


def place(costs: Sequence[Costs], workers: int, whole: bool) -> Placement:
    """Return the placement of examples of given costs, [S][E]; `whole`: norms are needed, keep segments whole."""
    ranges = _longest_first(costs, workers) if whole else _one_row(costs, workers)
    for of_rank in ranges:
        of_rank[0] = (0, len(costs[0]))
    return Placement(tuple(tuple(of_rank) for of_rank in ranges))


def parts_of(segments: Sequence[Part], ranges: Sequence[Range]) -> list[Part]:
    """Return the part of each segment that is in a worker's ranges, [S]; parts may be empty."""
    return [segment.part(*of_segment) for segment, of_segment in zip(segments, ranges, strict=True)]


def near_equal(costs_E: Costs, parts: int) -> list[Range]:
    """Return the ranges of consecutive, non-empty parts of near-equal cost: `parts`, or one for each example."""
    parts = min(parts, len(costs_E))
    ends = np.cumsum(costs_E)
    bounds = [0]
    for part in range(1, parts):
        wanted = int(ends[-1]) * part / parts
        nearest = int(np.abs(ends - wanted).argmin()) + 1
        bounds.append(min(max(nearest, bounds[-1] + 1), len(costs_E) - (parts - part)))
    bounds.append(len(costs_E))
    return list(pairwise(bounds))


def _one_row(costs: Sequence[Costs], workers: int) -> list[list[Range]]:
    """Divide the row of all segments' examples into one part per worker; return ranges [W][S]."""
    ranges = [[EMPTY] * len(costs) for _ in range(workers)]
    for of_rank, (start, stop) in zip(ranges, near_equal(np.concatenate(costs[1:]), workers), strict=False):
        offset = 0
        for segment, costs_E in enumerate(costs[1:], start=1):
            first, last = max(0, start - offset), min(len(costs_E), stop - offset)
            if first < last:
                of_rank[segment] = (first, last)
            offset += len(costs_E)
    return ranges


def _longest_first(costs: Sequence[Costs], workers: int) -> list[list[Range]]:
    """Return the placement [W][S] with the smallest maximum load among the candidates; the first one in a tie."""
    best: list[list[Range]] = []
    least = math.inf
    for parts in _cuts(costs, workers):
        ranges, largest = _placed(costs, parts, workers)
        if largest < least:
            best, least = ranges, largest
    return best


def _cuts(costs: Sequence[Costs], workers: int) -> Iterator[dict[int, int]]:
    """Yield candidates for the number of parts of each segment: first the fewest with which all workers are busy, then
    one part more of the segment with the longest parts, until no part exceeds `FAIR` times the mean load.
    """
    parts = {segment: 1 for segment in range(1, len(costs)) if len(costs[segment])}
    tokens = {segment: int(costs[segment].sum()) for segment in parts}
    fair = FAIR * sum(tokens.values()) / workers
    while True:
        divisible = [s for s in parts if parts[s] < min(workers, len(costs[s]))]
        longest = max(divisible, key=lambda s: (tokens[s] / parts[s], -s), default=None)
        busy = longest is None or sum(parts.values()) >= workers
        if busy:
            yield dict(parts)
        if longest is None or (busy and tokens[longest] / parts[longest] <= fair):
            return
        parts[longest] += 1


def _placed(costs: Sequence[Costs], parts: Mapping[int, int], workers: int) -> tuple[list[list[Range]], int]:
    """Place the segments' parts, the longest segments first; return the ranges [W][S] and the largest load.

    Divided segments come before all others, so that mostly the same workers share them: making a group is expensive.
    """
    ranges = [[EMPTY] * len(costs) for _ in range(workers)]
    loads = [0] * workers
    for segment in sorted(parts, key=lambda s: (parts[s] == 1, -int(costs[s].sum()), s)):
        for start, stop in near_equal(costs[segment], parts[segment]):
            free = [rank for rank, of_rank in enumerate(ranges) if of_rank[segment] == EMPTY]
            rank = min(free, key=lambda r: (loads[r], r))
            ranges[rank][segment] = (start, stop)
            loads[rank] += int(costs[segment][start:stop].sum())
    return ranges, max(loads)
