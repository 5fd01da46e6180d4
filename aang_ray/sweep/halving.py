"""Asynchronous successive halving: every configuration a little, the better ones more, the best to the end."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Mapping, Sequence

from aang_ray.config import RunConfig
from aang_ray.sweep.jobs import End, Job
from aang_ray.sweep.plan import PlannedCell
from aang_ray.sweep.rungs import Asha, Group, Past, make_group


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
            [make_group(members, past, asha, alone=len(groups) == 1) for members in groups.values()]
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

    def _of_all(self) -> list[Group]:
        return [group for groups in self._brackets for group in groups]

    def _choose(self) -> Group | None:
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

    def _promotable(self, groups: Sequence[Group]) -> Group | None:
        """From the highest rung down, the best that is among the first 1/eta and has not gone on."""
        for level in reversed(range(max(group.last for group in groups))):
            there = _ranked(groups, level)
            for group in there[: len(there) // self._reduction]:
                if group.level == level < group.last:
                    return group
        return None

    def _busy(self, groups: Sequence[Group]) -> bool:
        waiting = {job.cell.cell for job in self._ready}
        return any(cell.cell in self._running or cell.cell in waiting for group in groups for cell in group.cells)


def _ranked(groups: Sequence[Group], level: int) -> list[Group]:
    """Those that have come to a rung, best first; of ties the one that was planned first."""
    valued = [(value, group) for group in groups if (value := group.value(level)) is not None]
    return [group for _, group in sorted(valued, key=lambda pair: -pair[0])]


def _furthest(groups: Sequence[Group]) -> Group | None:
    """The best of the highest rung that any has come to; None where one is at its end, and where all failed."""
    if any(group.level == group.last and not group.failed for group in groups):
        return None
    ranked = (_ranked(groups, level) for level in reversed(range(max(group.last for group in groups))))
    return next((there[0] for there in ranked if there), None)


def _row(config: RunConfig) -> str:
    """Configurations compete that stand in one row and one column of the table."""
    row = (config.method.name, config.space if config.method.auxiliary else "")
    return "\n".join((*row, config.data.model_dump_json(), config.encoder.model_dump_json()))
