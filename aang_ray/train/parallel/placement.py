"""Which worker computes which examples of a step: a function of the batch alone, so that nobody has to be told.

A segment's cost is its number of tokens. Every worker computes the dev batch, segment 0, itself.

- `whole`: segments stay whole, the longest first, each onto the worker with the least to do (LPT; Graham 1969): its
  largest load is at most 4/3 of the best possible. With more workers than segments, the segment with the
  most tokens a worker gets one more worker, again and again, until none is left; its examples are cut into
  near-equal parts. A step that asks for norms is placed so.
- otherwise all examples stand in one row that is cut into near-equal parts: nothing but sums is wanted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol, Self, TypeVar

import numpy as np
import numpy.typing as npt

Costs = npt.NDArray[np.int64]
Range = tuple[int, int]
EMPTY: Range = (0, 0)


class Divisible(Protocol):
    """Examples in a row."""

    def part(self, start: int, stop: int) -> Self: ...


Part = TypeVar("Part", bound=Divisible)


@dataclass(frozen=True)
class Placement:
    """For each worker the range of examples of each segment, [W][S]."""

    ranges: tuple[tuple[Range, ...], ...]

    def members(self, segment: int) -> tuple[int, ...]:
        """The workers that compute examples of a segment, ascending."""
        return tuple(rank for rank, of_rank in enumerate(self.ranges) if of_rank[segment][0] < of_rank[segment][1])

    def split(self) -> dict[int, tuple[int, ...]]:
        """Segments, but for dev, that more than one worker computes, with these workers."""
        members = {segment: self.members(segment) for segment in range(1, len(self.ranges[0]))}
        return {segment: ranks for segment, ranks in members.items() if len(ranks) > 1}


def place(costs: Sequence[Costs], workers: int, whole: bool) -> Placement:
    """Place the examples of segments with these tokens an example, [S] of [E], onto workers."""
    ranges = [[EMPTY] * len(costs) for _ in range(workers)]
    for of_rank in ranges:
        of_rank[0] = (0, len(costs[0]))
    numbers = [segment for segment in range(1, len(costs)) if len(costs[segment])]
    if not whole:
        _place_row(costs, numbers, ranges)
    elif len(numbers) >= workers:
        _place_longest_first(costs, numbers, ranges)
    else:
        _place_split(costs, numbers, ranges)
    return Placement(tuple(tuple(of_rank) for of_rank in ranges))


def parts_of(segments: Sequence[Part], ranges: Sequence[Range]) -> list[Part]:
    """The examples of each segment that a worker computes; segments keep their numbers."""
    return [segment.part(*of_segment) for segment, of_segment in zip(segments, ranges, strict=True)]


def near_equal(costs_E: Costs, parts: int) -> list[Range]:
    """Cut a row of examples into parts of near-equal cost, none of them empty while there are examples."""
    parts = min(parts, len(costs_E))
    ends = np.cumsum(costs_E)
    bounds = [0]
    for part in range(1, parts):
        wanted = int(ends[-1]) * part / parts
        nearest = int(np.abs(ends - wanted).argmin()) + 1
        bounds.append(min(max(nearest, bounds[-1] + 1), len(costs_E) - (parts - part)))
    bounds.append(len(costs_E))
    return list(pairwise(bounds))


def _place_row(costs: Sequence[Costs], numbers: Sequence[int], ranges: list[list[Range]]) -> None:
    """Cut all examples, segment after segment, into as many parts as there are workers."""
    joined = np.concatenate([costs[segment] for segment in numbers])
    for of_rank, (start, stop) in zip(ranges, near_equal(joined, len(ranges)), strict=False):
        offset = 0
        for segment in numbers:
            size = len(costs[segment])
            first, last = max(0, start - offset), min(size, stop - offset)
            if first < last:
                of_rank[segment] = (first, last)
            offset += size


def _place_longest_first(costs: Sequence[Costs], numbers: Sequence[int], ranges: list[list[Range]]) -> None:
    loads = [0] * len(ranges)
    for segment in sorted(numbers, key=lambda s: (-int(costs[s].sum()), s)):
        rank = loads.index(min(loads))
        ranges[rank][segment] = (0, len(costs[segment]))
        loads[rank] += int(costs[segment].sum())


def _place_split(costs: Sequence[Costs], numbers: Sequence[int], ranges: list[list[Range]]) -> None:
    """Hand the workers that are left over to the segments with the most tokens for each of theirs."""
    count = dict.fromkeys(numbers, 1)
    for _ in range(len(ranges) - len(numbers)):
        divisible = [segment for segment in numbers if count[segment] < len(costs[segment])]
        if not divisible:
            break
        count[max(divisible, key=lambda s: (int(costs[s].sum()) / count[s], -s))] += 1
    rank = 0
    for segment in numbers:
        for part in near_equal(costs[segment], count[segment]):
            ranges[rank][segment] = part
            rank += 1
