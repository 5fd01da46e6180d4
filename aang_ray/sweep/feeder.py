"""Ray Tune's side of the queue: a searcher whose suggestions are the jobs that may start now."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from aang_ray.sweep.jobs import Job
from aang_ray.sweep.queue import Queue

if TYPE_CHECKING:

    class Searcher:
        """Ray carries no types; this stands for its base class."""

        FINISHED: str

else:
    from ray.tune.search import Searcher

Prepare = Callable[[Job], dict[str, Any]]


class Feeder(Searcher):
    """Gives Tune a job whenever the queue has one and room for it.

    How jobs end the queue hears from the `Monitor`, which sees more of a trial than a searcher does.
    """

    def __init__(self, queue: Queue, prepare: Prepare) -> None:
        super().__init__()
        self._queue = queue
        self._prepare = prepare
        self.jobs: dict[str, Job] = {}
        """By the trial's id."""

    def __getstate__(self) -> dict[str, Any]:
        """Tune keeps its searchers for a restore. None is ever made: the store remembers."""
        return {}

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """The parameters of the next trial; None where it has to wait."""
        if self._queue.finished:
            return Searcher.FINISHED
        job = self._queue.take()
        if job is None:
            return None
        self.jobs[trial_id] = job
        return self._prepare(job)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Heard by the monitor."""

    def save(self, checkpoint_path: str) -> None:
        """See `__getstate__`."""

    def restore(self, checkpoint_path: str) -> None:
        """See `__getstate__`."""
