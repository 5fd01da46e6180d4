"""Decides which worker computes which examples of a step.

The placement is a function of the batch alone, which every worker knows: nothing is sent. An example costs its number
of tokens. Every worker computes the dev batch, segment 0, itself. The other segments are placed in one of two ways:

- `whole`, for steps that ask for norms: the longest segment first, each on the worker with the least to do (LPT;
  Graham 1969: the largest load is at most 4/3 of the best possible). The norm of a segment that several workers share
  costs one more body-sized sum among them. So a segment is cut only if there are more workers than segments, or if
  it alone would be a load of more than `FAIR` times the mean. The segment with the most tokens a part is then cut
  into one part more, again and again.
- otherwise all examples form one row that is cut into near-equal parts: only sums are wanted.

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
"""A segment is cut if it alone exceeds the mean load by this factor: the cut costs a body-sized sum."""


class Divisible(Protocol):
    """A row of examples of which a part can be taken."""

    def part(self, start: int, stop: int) -> Self: ...


Part = TypeVar("Part", bound=Divisible)


@dataclass(frozen=True)
class Placement:
    """Which examples of each segment each worker computes."""

    ranges: tuple[tuple[Range, ...], ...]
    """[W][S]"""

    def members(self, segment: int) -> tuple[int, ...]:
        """Return the workers that compute examples of a segment, ascending."""
        return tuple(rank for rank, of_rank in enumerate(self.ranges) if of_rank[segment][0] < of_rank[segment][1])

    def split(self) -> dict[int, tuple[int, ...]]:
        """Return the segments except dev that more than one worker computes, with these workers."""
        members = {segment: self.members(segment) for segment in range(1, len(self.ranges[0]))}
        return {segment: ranks for segment, ranks in members.items() if len(ranks) > 1}


def place(costs: Sequence[Costs], workers: int, whole: bool) -> Placement:
    """Place the examples of all segments on workers.

    Args:
        costs: Tokens of every example, [S][E].
        workers: Number of workers.
        whole: Whether segments should stay whole, because norms of their gradients are wanted.
    """
    ranges = _longest_first(costs, workers) if whole else _one_row(costs, workers)
    for of_rank in ranges:
        of_rank[0] = (0, len(costs[0]))
    return Placement(tuple(tuple(of_rank) for of_rank in ranges))


def parts_of(segments: Sequence[Part], ranges: Sequence[Range]) -> list[Part]:
    """Return the examples of each segment in a worker's ranges; segments keep their numbers."""
    return [segment.part(*of_segment) for segment, of_segment in zip(segments, ranges, strict=True)]


def near_equal(costs_E: Costs, parts: int) -> list[Range]:
    """Cut a row of examples into parts of near-equal cost, none of them empty; fewer parts if there are fewer examples."""
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
    """Cut the row of all segments' examples into as many parts as there are workers."""
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
    """Return the placement with the smallest largest load, over the candidate cuts; of equal ones the first."""
    best: list[list[Range]] = []
    least = math.inf
    for parts in _cuts(costs, workers):
        ranges, largest = _placed(costs, parts, workers)
        if largest < least:
            best, least = ranges, largest
    return best


def _cuts(costs: Sequence[Costs], workers: int) -> Iterator[dict[int, int]]:
    """Yield candidate numbers of parts by segment: as few as keep all workers busy, then more while a part is too long."""
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
    """Place segments that are cut into these parts, longest first; return the ranges and the largest load.

    Cut segments come first, so that the same workers share one in most steps: a group of workers is costly to make.
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
