"""The rungs of successive halving, and a configuration with its seeds on its way up them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from aang_ray.config import RunConfig
from aang_ray.errors import UserError
from aang_ray.sweep.jobs import End, Job
from aang_ray.sweep.plan import PlannedCell


@dataclass(frozen=True)
class Asha:
    """Settings of the scheduler (Li et al. 2020, arXiv:1810.05934)."""

    grace: float = 0.1
    """Share of a run's steps after which it may be cut for the first time."""
    reduction: int = 3
    """One of so many configurations goes on at each rung, to so many times the steps: the paper's eta."""

    def __post_init__(self) -> None:
        """Refuse what makes no ladder."""
        if not 0 < self.grace < 1:
            raise UserError(f"--grace {self.grace:g}: must be a share of a run's steps, between 0 and 1")
        if self.reduction < 2:
            raise UserError(f"--reduction {self.reduction}: must be at least 2")

    def stops(self, config: RunConfig) -> tuple[int | None, ...]:
        """The steps at which a run is paused, the last of them None: its end.

        Rung k is at `grace * reduction**k` of the steps in which dev decides, rounded up to an evaluation; a
        pretraining stage before and a last fine-tuning after them are never cut.
        """
        steps, every = config.schedule.steps or 0, config.schedule.eval_every
        final = config.final_finetune.steps if config.final_finetune is not None else 0
        before = config.total_steps - steps - final
        rungs: list[int] = []
        share = self.grace
        while share < 1:
            step = math.ceil(round(share * steps / every, 9)) * every
            if step < steps and before + step not in rungs:
                rungs.append(before + step)
            share *= self.reduction
        return (*rungs, None)


@dataclass(frozen=True)
class Past:
    """What the store knows of a cell that is done or was cut."""

    done: bool
    steps: int
    dev: float | None
    """Best so far."""
    history: Sequence[tuple[int, float]]
    """Step and dev score of each evaluation."""

    def best_until(self, step: int | None) -> float | None:
        """Best dev score of the first `step` steps; None where the run did not come so far."""
        if step is None or self.done:
            return self.dev if self.done else None
        if self.steps < step:
            return None
        return max((score for at, score in self.history if at <= step), default=None)


@dataclass
class Group:
    """One configuration with its seeds: they go on, or not, together."""

    cells: Sequence[PlannedCell]
    stops: Sequence[int | None]
    level: int = -1
    """The rung that its cells have reached or are on their way to."""
    scores: dict[str, list[float | None]] = field(default_factory=dict)
    """Of each cell at each rung."""
    failed: bool = False

    @property
    def last(self) -> int:
        return len(self.stops) - 1

    def value(self, level: int) -> float | None:
        """Mean dev score over the seeds at a rung; None before the last of them has come there."""
        if self.failed or level > self.last:
            return None
        found = [self.scores[cell.cell][level] for cell in self.cells]
        scores = [score for score in found if score is not None]
        return fmean(scores) if len(scores) == len(found) else None

    def jobs(self) -> list[Job]:
        """What is missing at its rung."""
        stop = self.stops[self.level]
        return [Job(cell, stop) for cell in self.cells if self.scores[cell.cell][self.level] is None]

    def heard(self, job: Job, end: End) -> None:
        """A cell came to a rung, or to its end: then its score stands for all later rungs, too."""
        scores = self.scores[job.cell.cell]
        for level in range(self.level, self.level + 1 if end.status == "cut" else len(scores)):
            scores[level] = end.dev
        self.failed = self.failed or end.status == "failed" or end.dev is None
        if self.value(self.last) is not None:
            self.level = self.last


def make_group(members: Sequence[PlannedCell], past: Mapping[str, Past], asha: Asha, *, alone: bool) -> Group:
    """With what the store knows of its cells. A configuration without a rival is not paused."""
    stops = (None,) if alone else asha.stops(members[0].config)
    scores: dict[str, list[float | None]] = {}
    for cell in members:
        known = past.get(cell.cell)
        scores[cell.cell] = [None if known is None else known.best_until(stop) for stop in stops]
    reached = [level for cell in scores.values() for level, score in enumerate(cell) if score is not None]
    level = max(reached, default=-1)
    if level == len(stops) - 1:  # a cell that is done has scores at all rungs: the others say how far the group is
        others = [cell for cell in scores.values() if cell[-1] is None]
        level = max((sum(score is not None for score in cell) - 1 for cell in others), default=level)
    return Group(members, stops, level, scores)
