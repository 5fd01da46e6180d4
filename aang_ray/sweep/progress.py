"""What a person sees of a sweep while it runs: a line a finished trial, and how much is left."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from aang_ray.sweep.plan import PlannedCell

PLAIN_INTERVAL = 60.0
"""Seconds between two lines about the whole sweep where there is no terminal to draw a bar on."""


class SweepProgress:
    """The overall bar, measured in texts (see `PlannedCell.work`), and one line a finished trial.

    The time left is (texts left) x (seconds so far) / (texts so far): trials run side by side, so the
    wall time of the sweep, not the sum over trials, is what is extrapolated.
    """

    def __init__(self, cells: Sequence[PlannedCell], console: Console) -> None:
        self._console = console
        self._work = {cell.cell: max(cell.work, 1) for cell in cells}
        self._share = dict.fromkeys(self._work, 0.0)
        self._ended = 0
        self._started = self._said = time.monotonic()
        self._bar: Progress | None = None
        if console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
            self._bar = Progress(*columns, TextColumn("{task.fields[left]}"), console=console, transient=True)
            self._task = self._bar.add_task("", total=sum(self._work.values()), left="")

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        self._show()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def evaluated(self, cell: str, step: int, steps: int) -> None:
        """A trial has come as far as `step` of `steps`."""
        self._share[cell] = min(step / steps, 1.0) if steps else 0.0
        self._show()

    def ended(self, cell: PlannedCell, text: str) -> None:
        """A trial has ended, however: `text` says how."""
        self._share[cell.cell] = 1.0
        self._ended += 1
        self._line(f"[{self._ended}/{len(self._work)}] {cell.title} · {text}")
        self._show()

    def said(self, text: str) -> None:
        """Something that a person wants to know has happened, and no trial has ended for good."""
        self._line(text)

    def add(self, cells: Sequence[PlannedCell]) -> None:
        """There is more to do than was known at the beginning."""
        for cell in cells:
            self._work[cell.cell] = max(cell.work, 1)
            self._share.setdefault(cell.cell, 0.0)
        if self._bar is not None:
            self._bar.update(self._task, total=sum(self._work.values()))

    def _show(self) -> None:
        done = sum(self._work[cell] * share for cell, share in self._share.items())
        left = self._left(done)
        if self._bar is not None:
            description = f"{self._ended}/{len(self._work)} cells"
            self._bar.update(self._task, completed=done, description=description, left=left)
        elif time.monotonic() - self._said >= PLAIN_INTERVAL:
            self._said = time.monotonic()
            share = 100 * done / sum(self._work.values())
            self._line(f"{self._ended}/{len(self._work)} cells, {share:.0f} % of the work, {left}")

    def _line(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _left(self, done: float) -> str:
        if done <= 0:
            return "time left: not known yet"
        elapsed = time.monotonic() - self._started
        return f"about {duration(elapsed * (sum(self._work.values()) - done) / done)} left"


def duration(seconds: float) -> str:
    """Seconds as a person says them: `42 s`, `3 min 05 s`, `2 h 10 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
