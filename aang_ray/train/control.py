"""Signals that ask a run to stop: heard between two steps, so that the checkpoint is a whole step's.

Needs the standard library alone: a command line may import `Interrupted` without loading anything heavy.
"""

from __future__ import annotations

import signal
import threading
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Any


class Interrupted(SystemExit):
    """A run was asked by SIGTERM to stop, and its checkpoint is written; the message says how it goes on.

    Not an error of the run, so no `except Exception` makes a failed row of it. Uncaught it ends the process with
    exit code 143 = 128 + SIGTERM.
    """

    def __init__(self, message: str) -> None:
        super().__init__(128 + signal.SIGTERM)
        self.message = message

    def __str__(self) -> str:
        return self.message


class StopSignals:
    """While entered, SIGTERM and Ctrl-C are noted instead of acted on; a second Ctrl-C acts at once.

    Handlers can be installed in the main thread alone: on another one nothing is noted and signals do what they did.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        self.received = None
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                # None stands for a handler that was not installed from Python and cannot be put back.
                self._before[number] = signal.signal(number, self._note) or signal.SIG_DFL
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()
        if self.received is not None and kind is None:
            signal.raise_signal(self.received)  # it came after the last look: now it does what it always did

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == self.received == signal.SIGINT:
            self._restore()
            raise KeyboardInterrupt
        self.received = signal.Signals(number)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()


# --- train.notices: What a run hears from outside its own process's signals: that its machine goes away, or that nobody waits for it.


@dataclass
class Notices:
    """Set by another thread at any moment, and looked at between two steps."""

    draining: bool = False
    """The machine goes away soon: keep the checkpoint fresh."""
    stop: bool = False
    """Whoever started the run has gone: write the checkpoint and end."""
    until: int | None = None
    """Write the checkpoint and end after this step: a scheduler decides whether the run goes on from there."""
