"""Decides after each step whether a run continues, writes its checkpoint, or stops.

A run asks its `RunControl` between two steps, so a checkpoint always holds the state after a whole step.

This module imports only the standard library, so that a command line can use it without loading torch or Ray.
"""

from __future__ import annotations

import signal
import threading
from dataclasses import dataclass, field
from enum import IntEnum
from types import FrameType, TracebackType
from typing import Any

DRAINING_SECONDS = 15.0
"""Longest time between two checkpoints on a draining machine: spot machines give two minutes' notice."""


class Interrupted(SystemExit):
    """A run was asked to stop and has written its checkpoint; the message says how to continue it.

    It is a `SystemExit` because the run has not failed: no `except Exception` should turn it into a failed row.
    Uncaught, it ends the process with exit code 143 = 128 + SIGTERM.
    """

    def __init__(self, message: str) -> None:
        super().__init__(128 + signal.SIGTERM)
        self.message = message

    def __str__(self) -> str:
        return self.message


class StepLimitReached(Exception):
    """A run has reached its step limit (`RunControl.until`) and has written its checkpoint."""


class StopSignals:
    """Context manager that records SIGTERM and Ctrl-C instead of acting on them; a second Ctrl-C acts at once.

    Outside the main thread, where Python cannot install handlers, it does nothing.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        self.received = None
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                # `signal.signal` returns None for a handler that was not installed from Python; it cannot be restored.
                self._previous[number] = signal.signal(number, self._record) or signal.SIG_DFL
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()
        if self.received is not None and kind is None:
            signal.raise_signal(self.received)  # the signal came after the last check: act on it now

    def _record(self, number: int, frame: FrameType | None) -> None:
        if number == self.received == signal.SIGINT:
            self._restore()
            raise KeyboardInterrupt
        self.received = signal.Signals(number)

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()


class AfterStep(IntEnum):
    """What a run does after a step. With several workers, the largest value of any worker counts for all."""

    CONTINUE = 0
    SAVE = 1
    STOP_AT_LIMIT = 2
    """Save and stop: the step limit is reached."""
    STOP = 3
    """Save and stop: SIGTERM came, or the driver process has ended."""
    INTERRUPT = 4
    """Save and stop: Ctrl-C came."""


@dataclass
class RunControl:
    """Decides after each step whether a run continues, saves or stops. Other threads may set the flags at any time."""

    until: int | None = None
    """Save and stop after this step; the caller decides whether the run continues later."""
    draining: bool = False
    """The machine will shut down soon: save now, then at least every `DRAINING_SECONDS`."""
    stop: bool = False
    """The process that started the run has ended: save and stop."""
    signals: StopSignals = field(default_factory=StopSignals, compare=False, repr=False)
    """Entered by the run while it trains."""
    _saved_for_drain: bool = field(default=False, init=False, compare=False, repr=False)

    def limit_reached(self, step: int) -> bool:
        """Return whether the run's step limit is reached after `step` steps."""
        return self.until is not None and step >= self.until

    def after_step(self, step: int, unsaved_seconds: float, save_seconds: float) -> AfterStep:
        """Return what to do after a step. `save_seconds`: intended time between checkpoints; 0: after every step."""
        received = self.signals.received
        if received is not None:
            return AfterStep.INTERRUPT if received == signal.SIGINT else AfterStep.STOP
        if self.stop:
            return AfterStep.STOP
        if self.limit_reached(step):
            return AfterStep.STOP_AT_LIMIT
        if self.draining:
            save_seconds = min(save_seconds, DRAINING_SECONDS) if self._saved_for_drain else 0.0
            self._saved_for_drain = True
        return AfterStep.SAVE if unsaved_seconds >= save_seconds else AfterStep.CONTINUE

    def stop_error(self, action: AfterStep, step: int, folder: str) -> BaseException:
        """Return the exception that ends the run, for an action above `SAVE`, which another worker may have caused."""
        if action == AfterStep.INTERRUPT:
            return KeyboardInterrupt()
        if action == AfterStep.STOP_AT_LIMIT:
            return StepLimitReached()
        by = "another process" if self.signals.received is None else self.signals.received.name
        return Interrupted(f"stopped by {by} after step {step}; the same command continues from there ({folder})")
