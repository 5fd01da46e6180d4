"""Asynchronous successive halving: every configuration a little, the better ones more, the best to the end."""

from __future__ import annotations

import math
from collections import defaultdict, deque
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
class _Group:
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


class Halving:
    """ASHA on configurations, each judged by the mean over its seeds, against those of the same row and task.

    Whenever there is room: of each rung the best 1/eta of the configurations that have come there go on to the next
    one; where none may, the next configuration begins. In the end the best of the highest rung goes on alone, so that
    each row has a whole run. Configurations of different methods never compete: a baseline is not cut by another row.

    A cell that is paused has its checkpoint and a row that says `cut`; going on is going on from the checkpoint. All
    that this class knows is in those rows, so a sweep that is started again decides as if it had never stopped.
    """

    def __init__(self, cells: Sequence[PlannedCell], past: Mapping[str, Past], asha: Asha) -> None:
        brackets: dict[str, dict[str, list[PlannedCell]]] = defaultdict(lambda: defaultdict(list))
        for cell in cells:
            brackets[_row(cell.config)][cell.config.group].append(cell)
        self._brackets = [
            [_group(members, past, asha, alone=len(groups) == 1) for members in groups.values()]
            for groups in brackets.values()
        ]
        self._of = {cell.cell: group for groups in self._brackets for group in groups for cell in group.cells}
        self._reduction = asha.reduction
        self._ready: deque[Job] = deque(job for group in self._of_all() if group.level >= 0 for job in group.jobs())
        self._running: set[str] = set()

    def next(self) -> Job | None:
        """A cell of the configuration that goes on or begins; None where that depends on those that run."""
        while not self._ready:
            group = self._choose()
            if group is None:
                return None
            group.level += 1
            self._ready.extend(group.jobs())
        job = self._ready.popleft()
        self._running.add(job.cell.cell)
        return job

    def ended(self, job: Job, end: End) -> None:
        """A cell has come to its rung, or to its end."""
        self._running.discard(job.cell.cell)
        self._of[job.cell.cell].heard(job, end)

    @property
    def finished(self) -> bool:
        """Whether no configuration goes on or begins."""
        return not self._ready and not self._running and self._choose() is None

    def _of_all(self) -> list[_Group]:
        return [group for groups in self._brackets for group in groups]

    def _choose(self) -> _Group | None:
        """The configuration whose level rises by one."""
        for groups in self._brackets:
            promoted = self._promotable(groups)
            if promoted is not None:
                return promoted
        new = next((group for group in self._of_all() if group.level < 0), None)
        if new is not None:
            return new
        idle = (groups for groups in self._brackets if not self._busy(groups))
        return next((best for groups in idle if (best := _furthest(groups)) is not None), None)

    def _promotable(self, groups: Sequence[_Group]) -> _Group | None:
        """From the highest rung down, the best that is among the first 1/eta and has not gone on."""
        for level in reversed(range(max(group.last for group in groups))):
            there = _ranked(groups, level)
            for group in there[: len(there) // self._reduction]:
                if group.level == level < group.last:
                    return group
        return None

    def _busy(self, groups: Sequence[_Group]) -> bool:
        waiting = {job.cell.cell for job in self._ready}
        return any(cell.cell in self._running or cell.cell in waiting for group in groups for cell in group.cells)


def _ranked(groups: Sequence[_Group], level: int) -> list[_Group]:
    """Those that have come to a rung, best first; of ties the one that was planned first."""
    valued = [(value, group) for group in groups if (value := group.value(level)) is not None]
    return [group for _, group in sorted(valued, key=lambda pair: -pair[0])]


def _furthest(groups: Sequence[_Group]) -> _Group | None:
    """The best of the highest rung that any has come to; None where one is at its end, and where all failed."""
    if any(group.level == group.last and not group.failed for group in groups):
        return None
    ranked = (_ranked(groups, level) for level in reversed(range(max(group.last for group in groups))))
    return next((there[0] for there in ranked if there), None)


def _group(members: Sequence[PlannedCell], past: Mapping[str, Past], asha: Asha, *, alone: bool) -> _Group:
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
    return _Group(members, stops, level, scores)


def _row(config: RunConfig) -> str:
    """Configurations compete that stand in one row and one column of the table."""
    row = (config.method.name, config.space if config.method.auxiliary else "")
    return "\n".join((*row, config.data.model_dump_json(), config.encoder.model_dump_json()))
