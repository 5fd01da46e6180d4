"""When a run's checkpoint is written and read: every so many minutes, before it obeys a signal, at its start."""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from enum import IntEnum
from typing import Any

from torch import Tensor

from aang_ray.train.checkpoint_files import CheckpointFiles
from aang_ray.train.checkpoint_signals import Interrupted, StopSignals
from aang_ray.train.micro import is_out_of_memory
from aang_ray.train.notices import Notices
from aang_ray.train.parallel.workers import Workers
from aang_ray.train.precision import Compute

DRAINING_MINUTES = 0.25
"""Between two checkpoints while the machine is about to go away: a spot machine says so two minutes before."""

logger = logging.getLogger(__name__)


class Wish(IntEnum):
    """What to do after a step; of several workers' wishes the largest is done by all."""

    GO_ON = 0
    SAVE = 1
    CUT = 2
    END = 3
    INTERRUPT = 4


class CutShort(Exception):
    """A run has come as far as it was to go for now, and its checkpoint is written."""


class Keeper:
    """Keeps a run's checkpoint up to date; with 0 minutes it writes after every step.

    Of several workers the first writes. What is to be done after a step is one small message between all of them.
    """

    def __init__(
        self,
        files: CheckpointFiles,
        compute: Compute,
        minutes: float,
        workers: Workers | None = None,
        notices: Notices | None = None,
    ) -> None:
        self._files = files
        self._compute = f"{compute.device_name}, {compute.precision}"
        self._signals = StopSignals()
        self._minutes = minutes
        self._workers = workers or Workers.alone()
        self._notices = notices or Notices()
        self._drained = False
        self._written = time.monotonic()

    def watching(self) -> AbstractContextManager[object]:
        """While entered, SIGTERM and Ctrl-C wait for the end of the step."""
        return self._signals

    def after_step(
        self, step: int, state: Callable[[], dict[str, Any]], best_step: int, kept: Mapping[str, Tensor]
    ) -> None:
        """Write a checkpoint if it is time to, the machine goes away or a signal came; called by all workers.

        Raises:
            CutShort: after the step that `Notices.until` names.
            Interrupted: after SIGTERM, or when nobody waits for the run any more.
            KeyboardInterrupt: after Ctrl-C.
        """
        wish = Wish(self._workers.max_host([self._wish(step)])[0])
        if wish == Wish.GO_ON:
            return
        content = {"compute": self._compute, **state()}  # by all: a sharded optimiser is gathered for it
        if self._workers.first:
            self._files.save(step, content, best_step, kept)
        self._written = time.monotonic()
        if wish > Wish.SAVE:
            self._workers.wait_for_all()  # who leaves early may be taken for lost before the file is there
        if wish == Wish.INTERRUPT:
            raise KeyboardInterrupt
        if wish == Wish.CUT:
            raise CutShort
        if wish == Wish.END:
            received = self._signals.received
            by = "another process" if received is None else received.name
            raise Interrupted(
                f"stopped by {by} after step {step}; the same command goes on from there ({self._files.folder})"
            )

    def after_resume(self, step: int) -> None:
        """The run goes on after a step.

        Raises:
            CutShort: it has come far enough already: its process died before it could say so.
        """
        if self._notices.until is not None and step >= self._notices.until:
            raise CutShort

    def _wish(self, step: int) -> Wish:
        received = self._signals.received
        if received is not None:
            return Wish.INTERRUPT if received == signal.SIGINT else Wish.END
        if self._notices.stop:
            return Wish.END
        if self._notices.until is not None and step >= self._notices.until:
            return Wish.CUT
        minutes = self._minutes
        if self._notices.draining:
            minutes = min(minutes, DRAINING_MINUTES) if self._drained else 0.0
            self._drained = True
        return Wish.SAVE if time.monotonic() - self._written >= 60 * minutes else Wish.GO_ON

    def resume(self, restore: Callable[[Mapping[str, Any], dict[str, Tensor]], None]) -> bool:
        """Hand the newest state and the best model's parameters to `restore`; False where there is none.

        Of several workers the first chooses the file, and all read it.

        Raises:
            UserError: for a checkpoint that cannot be read or is another run's.
        """
        name = self._workers.text_of(self._files.newest() if self._workers.first else "", 0)
        if not name:
            return False
        found = self._files.read(name)
        try:
            restore(found.state, found.kept)
            begun = found.state["compute"]
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and is_out_of_memory(error):
                raise
            reason = str(error).partition("\n")[0]
            raise self._files.unusable(found.path, f"does not fit this version ({reason})") from error
        logger.info("the run goes on from %s", found.path)
        if begun != self._compute:
            logger.warning("begun on %s, resumed on %s: the numbers may differ by rounding", begun, self._compute)
        return True
