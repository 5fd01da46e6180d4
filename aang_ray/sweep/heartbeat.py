"""Signs of life of running trials: a small file each in the store, which any other shell can read.

`<store>/.progress/<cell>.json` is rewritten after evaluations and every `BEAT_SECONDS`, whole or not at all, and goes
away with the end of the cell. A file that is no longer rewritten is of a trial that died.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from types import TracebackType
from typing import Self

from aang_ray.config import RunConfig
from aang_ray.store import HistoryRow
from aang_ray.store.files import Location, open_location, remove
from aang_ray.sweep.progress_files import FOLDER, as_fields, read_folder, write_json

BEAT_SECONDS = 20.0
"""Between two signs of life without an evaluation."""

STOPPED_AFTER_SECONDS = 90.0
"""A trial that has been silent for longer is taken for dead: four beats, and some delay of clocks and networks."""

QUICKEST_SECONDS = 1.0
"""Between two writes at least, however often a run is evaluated."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Beat:
    """One sign of life."""

    cell: str
    step: int
    """At the last evaluation; 0 before the first."""
    steps: int
    """Optimiser steps at most."""
    seconds: float
    """Of the run at the last evaluation."""
    score: float | None
    """The task's metric on dev at the last evaluation, in [0, 1]."""
    metric: str
    host: str
    pid: int
    started_at: str
    """UTC, ISO 8601, as `updated_at`."""
    updated_at: str
    ended: bool = False
    """Whether the process said that it ended without a row: it was interrupted."""

    def silent(self, now: datetime) -> float:
        """Seconds since it was written; not negative where clocks differ."""
        return max(0.0, (now - datetime.fromisoformat(self.updated_at)).total_seconds())

    def alive(self, now: datetime) -> bool:
        """Whether its trial is running still, as far as one can tell."""
        return not self.ended and self.silent(now) <= STOPPED_AFTER_SECONDS


def read_beats(uri: str) -> dict[str, Beat]:
    """The last sign of life of every cell that has one; empty where no trial has ever run.

    Raises:
        UserError: for a file that is none of these.
    """
    location = open_location(uri)
    found = (as_fields(path, mapping, Beat) for path, mapping in read_folder(location, FOLDER))
    return {beat.cell: beat for beat in found}


class Heartbeat:
    """Writes the signs of life of one cell while its `with` block runs.

    They are for people who watch, so a store that cannot be written for a while is a warning, never the end of a run:
    what must not be lost is the row, and its own writing fails aloud.
    """

    def __init__(self, uri: str, config: RunConfig) -> None:
        self._location: Location = open_location(uri)
        self._path = beat_path(self._location, config.cell)
        self._metric = config.data.metric or "accuracy"
        now = _now()
        self._beat = Beat(
            cell=config.cell,
            step=0,
            steps=config.total_steps,
            seconds=0.0,
            score=None,
            metric=self._metric,
            host=socket.gethostname(),
            pid=os.getpid(),
            started_at=now,
            updated_at=now,
        )
        self._wake = threading.Event()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"heartbeat-{config.cell}", daemon=True)

    def __enter__(self) -> Self:
        self._write()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._wake.set()
        self._thread.join()
        if kind is None:
            self._forget()
        else:
            self._beat = replace(self._beat, ended=True)
            self._write()

    def evaluated(self, row: HistoryRow) -> None:
        """The run was scored, on dev where that decides; written soon, by the thread: training does not wait for it."""
        score: float | None = None if row.dev is None else getattr(row.dev, self._metric)
        self._beat = replace(self._beat, step=row.step, seconds=row.seconds, score=score)
        self._wake.set()

    def _run(self) -> None:
        while not self._stop.wait(QUICKEST_SECONDS):
            self._wake.wait(BEAT_SECONDS)
            self._wake.clear()
            if not self._stop.is_set():
                self._write()

    def _write(self) -> None:
        try:
            write_json(self._location, self._path, asdict(replace(self._beat, updated_at=_now())))
        except OSError as error:
            logger.warning("no sign of life could be written to %s: %s", self._path, error)

    def _forget(self) -> None:
        try:
            remove(self._location, self._path)
        except OSError as error:
            logger.warning("%s could not be removed: %s", self._path, error)


def beat_path(location: Location, cell: str) -> str:
    """Where a cell's signs of life are."""
    return location.path(FOLDER, f"{cell}.json")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
