"""When a run's checkpoint is written and read: every so many minutes, before it obeys a signal, at its start."""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from aang_ray.train.checkpoint_files import CheckpointFiles
from aang_ray.train.checkpoint_signals import Interrupted, StopSignals
from aang_ray.train.micro import is_out_of_memory
from aang_ray.train.precision import Compute

MINUTES = 5.0
"""Between two checkpoints."""

logger = logging.getLogger(__name__)


class Keeper:
    """Keeps a run's checkpoint up to date; with 0 minutes it writes after every step."""

    def __init__(self, files: CheckpointFiles, compute: Compute, minutes: float = MINUTES) -> None:
        self._files = files
        self._compute = f"{compute.device_name}, {compute.precision}"
        self._signals = StopSignals()
        self._pause = 60 * minutes
        self._written = time.monotonic()

    def watching(self) -> AbstractContextManager[object]:
        """While entered, SIGTERM and Ctrl-C wait for the end of the step."""
        return self._signals

    def after_step(
        self, step: int, state: Callable[[], dict[str, Any]], best_step: int, kept: Mapping[str, Tensor]
    ) -> None:
        """Write a checkpoint if it is time to or a signal came.

        Raises:
            Interrupted: after SIGTERM.
            KeyboardInterrupt: after Ctrl-C.
        """
        received = self._signals.received
        if received is None and time.monotonic() - self._written < self._pause:
            return
        path = self._files.save(step, {"compute": self._compute, **state()}, best_step, kept)
        self._written = time.monotonic()
        if received == signal.SIGINT:
            raise KeyboardInterrupt
        if received is not None:
            raise Interrupted(
                f"stopped by {received.name} after step {step}; the same command goes on from there ({path})"
            )

    def resume(self, restore: Callable[[Mapping[str, Any], dict[str, Tensor]], None]) -> bool:
        """Hand the newest state and the best model's parameters to `restore`; False where there is none.

        Raises:
            UserError: for a checkpoint that cannot be read or is another run's.
        """
        found = self._files.load()
        if found is None:
            return False
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
