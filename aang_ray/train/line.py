"""The line between a process and those that train for it: workers of a run, trials of a sweep."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import ray
from ray.exceptions import ActorDiedError, GetTimeoutError, RayActorError
from ray.util.queue import Queue
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from aang_ray.store.rows import HistoryRow


class Line:
    """From those who train to who waits for them: evaluations go over it, and that it is cut says that nobody does."""

    def __init__(self, queue: Queue) -> None:
        self._queue = queue

    @classmethod
    def from_here(cls) -> Line:
        """A line that lasts as long as this node: kept anywhere else it would be one more machine to lose."""
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        return cls(Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here}))

    def evaluated(self, row: HistoryRow) -> None:
        """Tell the launcher; where it has gone the run soon hears of that elsewhere."""
        with suppress(RayActorError):  # or it is not reached right now: one line of progress
            self._queue.put(row)

    def cut(self) -> bool:
        """Whether the launcher has hung up."""
        try:
            ray.get(self._queue.actor.qsize.remote(), timeout=10)
        except ActorDiedError:
            return True
        except (RayActorError, GetTimeoutError):  # not reached right now
            return False
        return False

    def listen(self, heard: Callable[[HistoryRow], None]) -> None:
        """Hand on each evaluation until the other side has ended."""
        while (row := self._queue.get()) is not None:
            heard(row)

    def end(self) -> None:
        """No further evaluation comes."""
        try:
            self._queue.put(None)
        except ActorDiedError:  # the launcher hung up before
            return
        except RayActorError:  # not reached right now: better an error than a launcher that listens for ever
            self.close()

    def close(self) -> None:
        """Hang up."""
        ray.kill(self._queue.actor)
