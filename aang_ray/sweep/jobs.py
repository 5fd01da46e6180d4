"""What a sweep runs next: a strategy hands out jobs and hears how they ended."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, Protocol

from aang_ray.sweep.needs import Need
from aang_ray.sweep.plan import PlannedCell

Ending = Literal["done", "failed", "cut", "elsewhere"]
"""`cut`: it came to the step where it was to stop; `elsewhere`: another process had done the cell."""


@dataclass(frozen=True)
class Job:
    """A cell to be run, to its end or to a step."""

    cell: PlannedCell
    until: int | None = None

    @property
    def need(self) -> Need:
        """The resources of its trial."""
        return Need.of(self.cell.config)


@dataclass(frozen=True)
class End:
    """How a job ended."""

    status: Ending
    dev: float | None = None
    """Best dev score so far by the task's metric; None for a failed cell."""


class Strategy(Protocol):
    """Chooses what is run. Called from one thread; the store holds all that must survive it."""

    def next(self) -> Job | None:
        """The next job; None while nothing can be said before another one has ended, and when all is done."""

    def ended(self, job: Job, end: End) -> None:
        """A job that `next` gave has ended."""

    @property
    def finished(self) -> bool:
        """Whether nothing is left, once the jobs that were handed out have ended."""


class Grid:
    """Each cell once: in the order of the plan, cells of one need together.

    Together, because trials with several workers run beside trials of the same need alone (see `Queue`).
    """

    def __init__(self, cells: Iterable[PlannedCell]) -> None:
        self._left = deque(sorted(map(Job, cells), key=lambda job: job.need))

    def next(self) -> Job | None:
        """The next cell; None after the last."""
        return self._left.popleft() if self._left else None

    def ended(self, job: Job, end: End) -> None:
        """Nothing depends on how a cell of a grid ends."""

    @property
    def finished(self) -> bool:
        """Whether every cell was handed out."""
        return not self._left
