"""How a sweep ends before its time: runs write their checkpoints first, and nothing new starts."""

from __future__ import annotations

import time
from collections.abc import Callable
from signal import Signals
from typing import TYPE_CHECKING, Any

from aang_ray.sweep.monitor import Monitor
from aang_ray.sweep.progress import SweepProgress
from aang_ray.sweep.queue import Queue

if TYPE_CHECKING:

    class Stopper:
        """Ray carries no types; this stands for its base class."""

else:
    from ray.tune import Stopper

WAIT_SECONDS = 60.0
"""How long runs may take to write their checkpoints and end; then they are ended as they are."""


class Ending(Stopper):
    """Looks at each turn of Tune's loop whether the sweep is to end: after a signal, or when its time is up.

    Then `hang_up` tells the trials, and the loop goes on until they have ended.
    """

    def __init__(
        self,
        queue: Queue,
        monitor: Monitor,
        progress: SweepProgress,
        hang_up: Callable[[], None],
        received: Callable[[], Signals | None],
        max_hours: float | None,
    ) -> None:
        self._queue, self._monitor, self._progress = queue, monitor, progress
        self._hang_up, self._received = hang_up, received
        self._ends = float("inf") if max_hours is None else time.monotonic() + 3600 * max_hours
        self._began: float | None = None
        """When it did."""

    def __getstate__(self) -> dict[str, Any]:
        """Tune keeps its stoppers for a restore. None is ever made: the store remembers."""
        return {}

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """No trial is ended for what it reports."""
        return False

    def stop_all(self) -> bool:
        """Whether Tune is to end what is left: trials that wait for a node, and such as have not ended in time."""
        now = time.monotonic()
        if self._began is None:
            signal = self._received()
            if signal is None and now < self._ends:
                return False
            self._began = now
            self._queue.close()
            self._hang_up()
            self._say(signal)
        return not self._monitor.alive or now - self._began > WAIT_SECONDS

    def _say(self, signal: Signals | None) -> None:
        running = self._monitor.alive
        if running:
            runs = "1 run writes its checkpoint" if running == 1 else f"{running} runs write their checkpoints"
            hurry = "; Ctrl-C again does not wait" if signal == Signals.SIGINT else ""
            self._progress.said(f"stopping: {runs}{hurry}")
