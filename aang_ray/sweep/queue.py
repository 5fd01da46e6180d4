"""The jobs that run: when the next may start, and what becomes of one whose process died."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from aang_ray.sweep.jobs import End, Job, Strategy
from aang_ray.sweep.needs import Need

RETRIES = 3
"""How often in a row a cell is tried again whose process died before it came further than the time before."""


@dataclass
class _Losses:
    """Of one cell."""

    in_a_row: int = 0
    furthest: int = 0
    """Last step that was reported."""
    furthest_before: int = 0
    """The same when it was lost last."""


class Queue:
    """Hands out the jobs of a strategy, as many at once as `room` says a need has room for.

    A trial with several workers runs beside trials of the same need alone: then whole groups of workers fit or wait,
    and none waits for ever for a node that smaller trials keep splitting among them.
    """

    def __init__(self, strategy: Strategy, room: Callable[[Need], int]) -> None:
        self._strategy = strategy
        self._room = room
        self._first: deque[Job] = deque()
        """To be handed out before what the strategy says next: lost ones, and one that found no room."""
        self._running: dict[str, Job] = {}
        self._losses: dict[str, _Losses] = {}
        self._closed = False

    @property
    def finished(self) -> bool:
        """Whether nothing runs and nothing is left."""
        return not self._running and (self._closed or (not self._first and self._strategy.finished))

    def close(self) -> None:
        """Hand out nothing any more."""
        self._closed = True

    def take(self) -> Job | None:
        """The next job, which counts as running from now on; None where there is none, or no room for it."""
        if self._closed:
            return None
        job = self._first.popleft() if self._first else self._strategy.next()
        if job is None:
            return None
        if not self._fits(job):
            self._first.appendleft(job)
            return None
        self._running[job.cell.cell] = job
        return job

    def came_to(self, job: Job, step: int) -> None:
        """A running job was evaluated after a step, or goes on from it."""
        losses = self._losses.setdefault(job.cell.cell, _Losses())
        losses.furthest = max(losses.furthest, step)

    def ended(self, job: Job, end: End) -> None:
        """A running job has ended; its room is free."""
        del self._running[job.cell.cell]
        self._strategy.ended(job, end)

    def stopped(self, job: Job) -> None:
        """A running job has written its checkpoint and ended, because the sweep ends; the next one goes on from it."""
        del self._running[job.cell.cell]

    def lost(self, job: Job) -> int | None:
        """A running job's process died. It goes on from its checkpoint at the next free place, if that may help.

        Returns how often it was lost in a row, or None where it was once too often: then `ended` is to be called.
        """
        losses = self._losses.setdefault(job.cell.cell, _Losses())
        progress = losses.furthest > losses.furthest_before
        losses.in_a_row = 1 if progress else losses.in_a_row + 1
        losses.furthest_before = losses.furthest
        if losses.in_a_row > RETRIES:
            return None
        del self._running[job.cell.cell]
        self._first.appendleft(job)
        return losses.in_a_row

    def _fits(self, job: Job) -> bool:
        need = job.need
        others = {other.need for other in self._running.values()} - {need}
        if others and (need.nested or any(other.nested for other in others)):
            return False
        return len(self._running) < max(1, self._room(need))
