"""How a sweep shows its progress: lines and a bar on the terminal, and one small file in the store.

`<store>/.progress/sweeps/<name>-<hash>.json` is written by the process that drives the sweep, whole or not at all: at
most once a second when something has changed, and every 20 s otherwise. `aang status` reads it. The files inform
people alone; deleting them loses nothing, because results are in the rows of the store.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Literal, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from aang_ray.store.files import Location, open_location, publish
from aang_ray.sweep.plan import PlannedCell, duration

FOLDER = (".progress", "sweeps")

BEAT_SECONDS = 20.0
"""Longest time between two writes of the file."""

QUICKEST_SECONDS = 1.0
"""Shortest time between two writes of the file."""

PLAIN_INTERVAL = 60.0
"""Seconds between two lines about the whole sweep where there is no terminal for a bar."""

ESTIMATE_SECONDS, ESTIMATE_SHARE = 60.0, 0.05
"""No time left is estimated before so many seconds and such a share of the work: the first trials load and compile."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CellProgress:
    """What the progress file holds of one cell."""

    cell: str
    title: str
    steps: int
    """Optimiser steps at most."""
    work: int
    """Texts that go through the body, see `PlannedCell.work`."""
    state: Literal["waiting", "running", "stopped", "ended"] = "waiting"
    """`stopped`: told to stop, its checkpoint is written; `ended`: the row in the store says how."""
    step: int = 0
    """Step of the last evaluation."""
    seconds: float = 0.0
    """Training time up to the last evaluation."""
    score: float | None = None
    """Dev score of the last evaluation by the task's metric, in [0, 1]."""
    metric: str = ""
    host: str = ""
    pid: int = 0
    updated_at: str = ""
    """Time of the last report: UTC, ISO 8601."""

    @classmethod
    def of(cls, planned: PlannedCell) -> CellProgress:
        """A cell that has not started."""
        metric = planned.config.data.metric or "accuracy"
        return cls(planned.cell, planned.title, planned.steps, planned.work, metric=metric)


class ProgressFile:
    """Writes the progress of a sweep, or of one run, while its `with` block is active.

    A thread of its own writes, so that a slow store delays nothing. A store that cannot be written for a while is a
    warning, never the end of a run: what must not be lost are the rows.
    """

    def __init__(self, store: str, name: str, key: str) -> None:
        """`name` is shown by `aang status`; `key` tells sweeps of the same name apart."""
        self._location = open_location(store)
        digest = hashlib.sha256(key.encode()).hexdigest()[:8]
        self._path = self._location.path(*FOLDER, f"{name}-{digest}.json")
        self._name, self._started_at, self._ended = name, now(), False
        self._cells: dict[str, CellProgress] = {}
        self._changed, self._stop = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)

    def __enter__(self) -> Self:
        self._write()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._changed.set()
        self._thread.join()
        self._ended = True
        self._write()

    def add(self, cells: Iterable[PlannedCell]) -> None:
        """Add cells that are to be run, or were run before."""
        self._cells |= {cell.cell: CellProgress.of(cell) for cell in cells}
        self._changed.set()

    def update(self, cell: str, **changes: Any) -> None:
        """Change fields of a cell's `CellProgress`."""
        self._cells[cell] = replace(self._cells[cell], updated_at=now(), **changes)
        self._changed.set()

    def _run(self) -> None:
        while not self._stop.wait(QUICKEST_SECONDS):
            self._changed.wait(BEAT_SECONDS)
            self._changed.clear()
            self._write()

    def _write(self) -> None:
        content = {
            "name": self._name,
            "started_at": self._started_at,
            "updated_at": now(),
            "ended": self._ended,
            "cells": [asdict(cell) for cell in list(self._cells.values())],
        }
        try:
            write_json(self._location, self._path, content)
        except OSError as error:
            logger.warning("the progress file %s could not be written: %s", self._path, error)


def write_json(location: Location, path: str, content: Mapping[str, Any]) -> None:
    """Write a JSON file of a store, whole or not at all, in the place of an earlier one."""
    if location.kind == "local":
        os.makedirs(location.root, exist_ok=True)  # temporary names are there
    publish(location, path, json.dumps(content, ensure_ascii=False).encode())


def now() -> str:
    """The present time, UTC, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


class ProgressLines:
    """One line a finished trial, and a bar (on a terminal) or a line a minute about the whole sweep.

    Work is measured in texts (see `PlannedCell.work`). The time left is (texts left) x (seconds so far) / (texts so
    far): trials run side by side, so the wall time of the sweep is extrapolated, not the sum over trials.
    """

    def __init__(self, cells: Sequence[PlannedCell], console: Console) -> None:
        self._console = console
        self._work = {cell.cell: max(cell.work, 1) for cell in cells}
        self._share = dict.fromkeys(self._work, 0.0)
        self._ended = 0
        self._started = self._printed = time.monotonic()
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

    def add(self, cells: Sequence[PlannedCell]) -> None:
        """Add cells that were not known at the beginning."""
        for cell in cells:
            self._work[cell.cell] = max(cell.work, 1)
            self._share.setdefault(cell.cell, 0.0)
        if self._bar is not None:
            self._bar.update(self._task, total=sum(self._work.values()))

    def evaluated(self, cell: str, step: int, steps: int) -> None:
        """A trial has come to `step` of `steps`."""
        self._share[cell] = min(step / steps, 1.0) if steps else 0.0
        self._show()

    def ended(self, cell: PlannedCell, text: str) -> None:
        """A trial has ended; `text` describes how."""
        self._share[cell.cell] = 1.0
        self._ended += 1
        self.line(f"[{self._ended}/{len(self._work)}] {cell.title} · {text}")
        self._show()

    def line(self, text: str) -> None:
        """Print a line above the bar."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _show(self) -> None:
        total = sum(self._work.values())
        done = sum(self._work[cell] * share for cell, share in self._share.items())
        elapsed = time.monotonic() - self._started
        left = "time left: not known yet"
        if elapsed >= ESTIMATE_SECONDS and done >= ESTIMATE_SHARE * total > 0:
            left = f"about {duration(elapsed * (total - done) / done)} left"
        if self._bar is not None:
            description = f"{self._ended}/{len(self._work)} cells"
            self._bar.update(self._task, completed=done, description=description, left=left)
        elif time.monotonic() - self._printed >= PLAIN_INTERVAL:
            self._printed = time.monotonic()
            self.line(f"{self._ended}/{len(self._work)} cells, {100 * done / max(total, 1):.0f} % of the work, {left}")
