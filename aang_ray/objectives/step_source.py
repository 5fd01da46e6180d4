"""The segments of a step, whatever the examples are: what texts and images share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt

from aang_ray.objectives import randomness
from aang_ray.objectives.allocation import Share
from aang_ray.objectives.readings import NOTHING, Readings
from aang_ray.objectives.texts import Int64

SegmentT = TypeVar("SegmentT")


@dataclass(frozen=True)
class SegmentBatch(Generic[SegmentT]):
    """All segments of a step: dev (empty unless asked for), end task, sampled objectives."""

    step: int
    sampled: tuple[int, ...]
    segments: tuple[SegmentT, ...]
    shares: tuple[float, ...]
    """b / B of each sampled objective; 1 each in equal allocation, where they do not enter the loss."""


class StepSource(ABC, Generic[SegmentT]):
    """Makes the batch of any step as a pure function of (seed, step)."""

    readings: Readings
    """Which examples it reads."""

    def step(
        self, step: int, with_dev: bool, factors: Mapping[str, npt.NDArray[np.float64]] | None = None
    ) -> SegmentBatch[SegmentT]:
        """The segments of a step.

        `factors` (by factor letter, aligned with `Space.factors()`) are needed for `published` allocation only.
        """
        dev = self.readings.dev_batch(step) if with_dev else NOTHING
        return self._batch(step, dev, self.readings.end_task(step), self.readings.auxiliary(step, factors))

    def chosen(self, number: int, end_task: bool, objectives: Sequence[int]) -> SegmentBatch[SegmentT]:
        """Batch number so-and-so of these objectives, with the end task or without it: see `Readings.chosen`."""
        examples = self.readings.end_task(number) if end_task else NOTHING
        return self._batch(number, NOTHING, examples, self.readings.chosen(number, objectives))

    def _batch(self, step: int, dev: Int64, end_task: Int64, auxiliary: Sequence[Share]) -> SegmentBatch[SegmentT]:
        segments = [self._dev(dev), self._end_task(end_task)]
        segments += [self._objective(index, examples, keys) for index, examples, keys, _ in auxiliary]
        sampled, shares = tuple(index for index, *_ in auxiliary), tuple(share for *_, share in auxiliary)
        return SegmentBatch(step, sampled, tuple(segments), shares)

    @abstractmethod
    def _dev(self, examples: Int64) -> SegmentT:
        """The dev batch."""

    @abstractmethod
    def _end_task(self, examples: Int64) -> SegmentT:
        """Train examples with their labels."""

    @abstractmethod
    def _objective(self, index: int, examples: Int64, keys: randomness.U64) -> SegmentT:
        """Examples of an objective's data, corrupted and labelled."""
