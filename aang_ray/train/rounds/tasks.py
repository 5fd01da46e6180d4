"""The tasks of a run in rounds, and the batches of each alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

from aang_ray.config.methods import RoundsSection
from aang_ray.methods.base import Sampled
from aang_ray.train.domain import DomainBatch
from aang_ray.train.rounds.plan import Slot
from aang_ray.train.setup import Setup
from aang_ray.train.step import Prepared


@dataclass(frozen=True)
class RoundPrepared(Prepared):
    """A step's batch, and what this worker does meanwhile."""

    step: int = 0
    slot: Slot | None = None
    """None where all tasks are trained together."""
    own: Prepared | None = None
    """This worker's own step, where the slot leads and the worker has one."""

    @property
    def sampled(self) -> Sampled:
        count = len(self.batch.sampled)
        return Sampled(self.step, self.batch.sampled, self.batch.shares, (1.0,) * count)


class Tasks:
    """Task 0 is the end task, then come the objectives that step 0 samples, for the whole run.

    A task's batch is `batch.end_task` examples, or the whole of `batch.auxiliary`.
    """

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self.objectives = setup.domain.batch(0, False, None).sampled

    def __len__(self) -> int:
        return 1 + len(self.objectives)

    def steps(self, config: RoundsSection) -> list[int]:
        """Optimiser steps of each task in a round."""
        if config.round_steps is not None:
            return [config.round_steps] * len(self)
        setup, batch = self._setup, self._setup.config.batch
        sizes = [len(setup.task.train), *(setup.domain.size(objective) for objective in self.objectives)]
        at_once = [batch.end_task or 1, *(batch.auxiliary or 1 for _ in self.objectives)]
        return [math.ceil(config.round_fraction * size / of) for size, of in zip(sizes, at_once, strict=True)]

    def batch(self, task: int, number: int) -> DomainBatch:
        """Batch number so-and-so of a task."""
        objectives = (self.objectives[task - 1],) if task else ()
        return self._setup.domain.chosen(number, task == 0, objectives)

    def all_of(self, number: int) -> DomainBatch:
        """Batch number so-and-so of all tasks together."""
        return self._setup.domain.chosen(number, True, self.objectives)

    def tokens(self, batch: DomainBatch) -> int:
        """Of the whole batch, whoever computes them."""
        return sum(int(costs_E.sum()) for costs_E in self._setup.domain.costs(batch))
