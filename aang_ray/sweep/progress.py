"""The progress of a sweep or of one run: lines and a bar on the terminal, and a small file in the store.

The process that drives a sweep writes `<store>/.progress/sweeps/<name>-<hash>.json`, whole or not at all: at most once
a second when something has changed, and every 20 s otherwise. `aang status` reads it. Deleting these files loses
nothing, because results are in the rows of the store.
"""

from __future__ import annotations

import hashlib
import logging
import os
import socket
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn

from aang_ray.config import RunConfig
from aang_ray.store import HistoryRow, WeightRow
from aang_ray.store.files import Location, open_location, publish
from aang_ray.store.schema import space_weights
from aang_ray.sweep.plan import PlannedCell, duration, to_run

FOLDER = (".progress", "sweeps")

BEAT_SECONDS = 20.0
"""Longest time between two writes of the file."""

QUICKEST_SECONDS = 1.0
"""Shortest time between two writes of the file."""

PLAIN_INTERVAL = 60.0
"""Seconds between two lines about the whole sweep where there is no terminal for a bar."""

MOST_ROWS = 8
"""Runs of which the step and the loss are shown."""

ESTIMATE_SECONDS, ESTIMATE_SHARE = 60.0, 0.05
"""No time left is estimated before so many seconds and such a share of the work: the first trials load and compile."""

logger = logging.getLogger(__name__)


KEPT_SCORES, KEPT_OBJECTIVES = 30, 5
"""How many of the last evaluations, and of the objectives with most weight, the file holds of each cell."""


@dataclass(frozen=True)
class Evaluation:
    """One evaluation as a trial reports it: a dictionary of plain values, which `asdict` makes."""

    step: int
    seconds: float
    score: float | None
    """Dev score by the task's metric, in [0, 1]; None in a stage that does not score dev."""
    losses: Mapping[str, float]
    """Mean training loss since the last evaluation, of the `end_task` and of each objective by name."""
    end_task_weight: float | None
    """The weight of the end task, lambda; None: the method has no weights."""
    weights: Mapping[str, float]
    """The weight of each objective of the space where it follows from factors, else of those that the step sampled."""

    @classmethod
    def of(cls, config: RunConfig, row: HistoryRow, weights: WeightRow | None) -> Evaluation:
        """Return the evaluation of a run, whose rows these are."""
        score = None if row.dev is None else getattr(row.dev, config.data.metric or "accuracy")
        if weights is None:
            return cls(row.step, row.seconds, score, row.losses, None, {})
        published = config.objectives.allocation == "published"
        found = space_weights(weights.weights, weights.factors, published=published)
        return cls(row.step, row.seconds, score, row.losses, weights.end_task_weight, found)

    @classmethod
    def of_report(cls, report: Mapping[str, Any]) -> Evaluation | None:
        """Return the evaluation in a report; None if it is a report of something else."""
        return cls(**{one.name: report[one.name] for one in fields(cls)}) if "losses" in report else None


class CellProgress(BaseModel):
    """What the progress file holds of one cell."""

    model_config = ConfigDict(frozen=True)

    cell: str
    title: str
    steps: int
    """Optimiser steps at most."""
    work: int
    """Texts that go through the body, see `PlannedCell.work`."""
    state: Literal["waiting", "running", "stopped", "ended"] = "waiting"
    """`stopped`: told to stop, its checkpoint is written; `ended`: the row in the store says how."""
    step: int = 0
    """Step of the last report."""
    seconds: float = 0.0
    """Training time up to the last report."""
    loss: float | None = None
    """Loss of the end task at the last sign of life."""
    score: float | None = None
    """Dev score of the last evaluation by the task's metric, in [0, 1]."""
    metric: str = ""
    scores: tuple[float, ...] = ()
    """Dev scores of the last `KEPT_SCORES` evaluations."""
    end_task_weights: tuple[float, ...] = ()
    """The weight of the end task at these evaluations."""
    weights: dict[str, float] = {}
    """The `KEPT_OBJECTIVES` objectives with most weight at the last evaluation."""
    weights_before: dict[str, float] = {}
    """Their weights at the evaluation before, as far as they had one."""
    host: str = ""
    pid: int = 0
    updated_at: str = ""
    """Time of the last report, ISO 8601."""

    @classmethod
    def of(cls, planned: PlannedCell) -> CellProgress:
        metric = planned.config.data.metric or "accuracy"
        return cls(cell=planned.cell, title=planned.title, steps=planned.steps, work=planned.work, metric=metric)

    def after(self, evaluation: Evaluation, known: Mapping[str, float]) -> dict[str, Any]:
        """Return the fields that an evaluation changes; `known` are all weights of the evaluation before."""
        most = sorted(evaluation.weights, key=lambda name: -evaluation.weights[name])[:KEPT_OBJECTIVES]
        scored = () if evaluation.score is None else (evaluation.score,)
        weighed = () if evaluation.end_task_weight is None else (evaluation.end_task_weight,)
        return {
            "step": evaluation.step,
            "seconds": evaluation.seconds,
            "score": evaluation.score,
            "scores": (*self.scores, *scored)[-KEPT_SCORES:],
            "end_task_weights": (*self.end_task_weights, *weighed)[-KEPT_SCORES:],
            "weights": {name: evaluation.weights[name] for name in most},
            "weights_before": {name: known[name] for name in most if name in known},
        }

    def work_until(self, step: int) -> float:
        """Texts that have gone through the body after a step."""
        return self.work * min(step / max(self.steps, 1), 1.0)


class SweepFile(BaseModel):
    """Content of a progress file."""

    name: str
    """Name of the sweep file without folder and suffix; `train` for a single run."""
    started_at: datetime
    updated_at: datetime
    ended: bool
    host: str = ""
    pid: int = 0
    """The process that drives the sweep, and its machine."""
    to_come: int = 0
    """Cells that a search has still to choose."""
    cells: list[CellProgress]

    @property
    def work_to_come(self) -> float:
        """Texts of the cells to come: each as many as the mean of the known ones."""
        return self.to_come * sum(cell.work for cell in self.cells) / max(len(self.cells), 1)

    def write(self, location: Location, path: str) -> None:
        publish(location, path, self.model_dump_json().encode())


class SweepProgress:
    """Shows the progress on a console and writes the file while its `with` block is active.

    A terminal has a bar, and one below it for each of the first runs; any other output has a line a minute, also where
    nothing was reported meanwhile. The time left is (texts left) x (seconds so far) / (texts so far): trials run side
    by side, so the wall time of the sweep is extrapolated, not the sum over trials. What a checkpoint brought does not
    count as texts so far.

    A thread prints and writes the file, so that a slow store delays nothing. A store that cannot be written for a while
    is a warning, never the end of a run.
    """

    def __init__(self, store: str, name: str, key: str, console: Console) -> None:
        """`name` is shown by `aang status`; `key` tells sweeps of the same name apart."""
        self._location = open_location(store)
        digest = hashlib.sha256(key.encode()).hexdigest()[:8]
        self._path = self._location.path(*FOLDER, f"{name}-{digest}.json")
        self._name, self._started_at, self._ended = name, datetime.now(UTC), False
        self.to_come = 0
        """Cells that a search has still to choose."""
        self._cells: dict[str, CellProgress] = {}
        self._resumed: dict[str, float] = {}
        """By cell: texts that its checkpoint brought."""
        self._to_run: set[str] = set()
        self._weights: dict[str, Mapping[str, float]] = {}
        """By cell: all weights of the last evaluation."""
        self._changed, self._stop = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)
        self._console = console
        self._started = self._printed = time.monotonic()
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
        left = TextColumn("{task.fields[left]}")
        self._bar = Progress(*columns, left, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._bar.add_task("", left="")
        self._rows: dict[str, TaskID] = {}
        """By cell that runs: its own bar."""
        self._printing = threading.Lock()

    def __enter__(self) -> Self:
        self._write()
        self._thread.start()
        self._bar.start()
        self._show()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()
        self._stop.set()
        self._changed.set()
        self._thread.join()
        self._ended = True
        self._write()

    def add(self, cells: Iterable[PlannedCell], *, keep_failed: bool = False) -> None:
        """Add cells of the sweep. The bar and the lines count those that `to_run` lets run."""
        self._cells |= {cell.cell: CellProgress.of(cell) for cell in cells}
        self._to_run |= {cell.cell for cell in to_run(cells, keep_failed=keep_failed)}
        self._changed.set()

    def update(self, cell: str, **changes: Any) -> None:
        """Change fields of a cell's `CellProgress`."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        self._cells[cell] = self._cells[cell].model_copy(update={"updated_at": now, **changes})
        self._changed.set()
        self._show()

    def evaluated(self, cell: str, evaluation: Evaluation, **changes: Any) -> None:
        """A cell was evaluated; `changes` as for `update`."""
        found = self._cells[cell].after(evaluation, self._weights.get(cell, {}))
        self._weights[cell] = evaluation.weights
        self.update(cell, **found, **changes)

    def resumed(self, cell: str, step: int) -> None:
        """A cell continues from a checkpoint of a step."""
        self._resumed[cell] = self._cells[cell].work_until(step)

    def ended(self, cell: PlannedCell, text: str) -> None:
        """A trial has ended; `text` describes how."""
        self._cells[cell.cell] = self._cells[cell.cell].model_copy(update={"state": "ended"})
        self.line(f"[{self._count()}] {cell.title} · {text}")
        self.update(cell.cell)

    def line(self, text: str) -> None:
        """Print a line above the bar."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _content(self) -> SweepFile:
        return SweepFile(
            name=self._name,
            started_at=self._started_at,
            updated_at=datetime.now(UTC),
            ended=self._ended,
            host=socket.gethostname(),
            pid=os.getpid(),
            to_come=self.to_come,
            cells=list(self._cells.values()),
        )

    def _run(self) -> None:
        written = time.monotonic()
        while not self._stop.wait(QUICKEST_SECONDS):
            if self._changed.is_set() or time.monotonic() - written >= BEAT_SECONDS:
                written = time.monotonic()
                self._changed.clear()
                self._write()
            self._show()

    def _write(self) -> None:
        try:
            self._content().write(self._location, self._path)
        except OSError as error:
            logger.warning("the progress file %s could not be written: %s", self._path, error)

    def _count(self) -> str:
        ended = sum(self._cells[cell].state == "ended" for cell in self._to_run)
        return f"{ended}/{len(self._to_run) + self.to_come}"

    def _show(self) -> None:
        """Bring the bars up to date; print a line where there is no terminal, if it is time for one."""
        with self._printing:
            cells = [self._cells[cell] for cell in list(self._to_run)]
            running = [cell for cell in cells if cell.state == "running"]
            total = sum(cell.work for cell in cells) + self._content().work_to_come
            done = sum(cell.work_until(cell.steps if cell.state == "ended" else cell.step) for cell in cells)
            new, elapsed = done - sum(self._resumed.values()), time.monotonic() - self._started
            left, unit = "time left: not known yet", "texts a second"
            if self._console.is_terminal:
                left, unit = f"{duration(elapsed)} so far", "texts/s"
            rate = f"{new / elapsed:,.0f} {unit}, " if new > 0 < elapsed else ""
            if elapsed >= ESTIMATE_SECONDS and new > 0 and done >= ESTIMATE_SHARE * total:
                left = f"about {duration(elapsed * (total - done) / new)} left"
            if self._console.is_terminal:
                shown: dict[str, Any] = {"total": total, "completed": done, "left": f"{rate}{left}"}
                self._bar.update(self._task, description=f"{self._count()} cells", **shown)
                self._show_rows(running[:MOST_ROWS])
            elif time.monotonic() - self._printed >= PLAIN_INTERVAL:
                self._printed = time.monotonic()
                parts = [f"{cell.title}: {describe_step(cell)}" for cell in running[:MOST_ROWS]]
                more = [f"{len(running) - MOST_ROWS} more run"] if len(running) > MOST_ROWS else []
                share = f"{self._count()} cells, {100 * done / max(total, 1):.0f} % of the work"
                self.line("; ".join([f"{share}, {rate}{left}", *parts, *more]))

    def _show_rows(self, running: Sequence[CellProgress]) -> None:
        """Show a bar for each of these cells, and none for others."""
        for name in self._rows.keys() - {cell.cell for cell in running}:
            self._bar.remove_task(self._rows.pop(name))
        for cell in running:
            if cell.cell not in self._rows:
                self._rows[cell.cell] = self._bar.add_task(cell.title, left="")
            self._bar.update(self._rows[cell.cell], total=cell.steps, completed=cell.step, left=describe_step(cell))


def describe_step(cell: CellProgress) -> str:
    """Return how far a cell is: `step 30/150, loss 1.234, dev 71.05 accuracy`."""
    parts = [f"step {cell.step}/{cell.steps}", *([] if cell.loss is None else [f"loss {cell.loss:.3f}"])]
    if cell.score is not None:
        parts.append(f"dev {100 * cell.score:.2f} {cell.metric}")
    return ", ".join(parts)
