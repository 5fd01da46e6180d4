"""`aang status`: how far a sweep or a run is, from its store, while it runs and after it died."""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args

import psutil
from pyarrow import fs
from pydantic import ValidationError
from rich.console import Console

from aang_ray.errors import UserError
from aang_ray.store import Store
from aang_ray.store.files import Location, open_location
from aang_ray.sweep.plan import duration
from aang_ray.sweep.progress import FOLDER, CellProgress, SweepFile, describe_step

SILENT_SECONDS = 90.0
"""A driver that has not written for longer is taken for dead: four of its longest pauses, and delays of clocks."""

ROW_COLUMNS = ("cell", "status", "steps", "seconds", "metric", "dev_score", "test_score", "error")
"""The columns of a cell's row that a status needs."""

CellState = Literal["done", "running", "stopped", "cut", "failed", "waiting"]
"""`stopped`: it ran when its driver stopped or died; `cut`: a scheduler ended it early, or will continue it. They are
shown in this order."""


@dataclass(frozen=True)
class CellStatus:
    """One cell: what its driver wrote last, and its row, if it has one."""

    progress: CellProgress
    state: CellState
    row: Mapping[str, Any] | None

    @property
    def past(self) -> tuple[float, float]:
        """Texts that went through the body so far, and the seconds they took."""
        if self.state == "done" and self.row is not None:
            return self.progress.work_until(self.row["steps"]), self.row["seconds"]
        return self.progress.work_until(self.progress.step), self.progress.seconds


@dataclass(frozen=True)
class SweepStatus:
    """A sweep at one moment."""

    store: str
    file: SweepFile
    alive: bool
    """Whether its driver runs, as far as one can tell."""
    silent: float
    """Seconds since the driver wrote last."""
    cells: tuple[CellStatus, ...]

    def having(self, *states: CellState) -> list[CellStatus]:
        """The cells in some states."""
        return [cell for cell in self.cells if cell.state in states]

    @property
    def counts(self) -> str:
        """How many cells are in each state, in one line."""
        counts = Counter(cell.state for cell in self.cells)
        parts = [f"{counts[state]} {state}" for state in get_args(CellState) if counts[state]]
        to_come = self.file.to_come
        parts += [f"{to_come} not chosen yet"] if to_come else []
        return f"{self.file.name}: {len(self.cells) + to_come} cells: {', '.join(parts)}"

    @property
    def work(self) -> tuple[float, float]:
        """Texts that went through the body so far, and those of the whole sweep."""
        ended = ("done", "cut", "failed")
        done = sum(cell.progress.work if cell.state in ended else cell.past[0] for cell in self.cells)
        return done, sum(cell.progress.work for cell in self.cells) + self.file.work_to_come

    @property
    def seconds_left(self) -> float | None:
        """(Texts left) x (seconds a text) / (trials that run now); None when nothing runs or nothing was measured.

        Seconds a text are those of all done cells, and of the running ones up to their last evaluation. Waiting and
        stopped cells count whole, though a stopped one may continue from a checkpoint; failed ones do not count,
        because only the next start runs them again. With early stopping it is an upper bound.
        """
        running = self.having("running")
        past = [cell.past for cell in self.having("done", "running")]
        texts, seconds = sum(work for work, _ in past), sum(spent for _, spent in past)
        if not running or texts <= 0 or seconds <= 0:
            return None
        left = sum(cell.progress.work - cell.past[0] for cell in running) + self.file.work_to_come
        left += sum(cell.progress.work for cell in self.having("waiting", "stopped"))
        return left * seconds / texts / len(running)


def read_status(store: Store, sweep: Path | None = None, now: datetime | None = None) -> SweepStatus:
    """Read the sweep that was last started on a store, of a sweep file's name if one is given.

    A done row decides, whatever the driver wrote. A trial of a living driver is running, also where an earlier attempt
    left a failed row.

    Raises:
        UserError: No such sweep was started.
    """
    return status_of(store, newest_file(store, sweep), read_rows(store), now)


def read_rows(store: Store) -> dict[str, Mapping[str, Any]]:
    """Return what a status needs of the rows of a store, by cell."""
    return {row["cell"]: row for row in store.results(ROW_COLUMNS).to_pylist()}


def status_of(
    store: Store, file: SweepFile, rows: Mapping[str, Mapping[str, Any]], now: datetime | None = None
) -> SweepStatus:
    """Return the status that follows from a progress file and the rows of the store."""
    # Not negative where clocks differ.
    silent = max(0.0, ((now or datetime.now(UTC)) - file.updated_at).total_seconds())
    alive = not file.ended and silent <= SILENT_SECONDS
    cells = [CellStatus(cell, _state(cell, rows.get(cell.cell), alive), rows.get(cell.cell)) for cell in file.cells]
    return SweepStatus(store.uri, file, alive, silent, tuple(cells))


def show_status(status: SweepStatus, console: Console, now: datetime | None = None) -> None:
    """Print counts, hosts, the time left, the trials that run or stopped, and the errors of those that failed."""

    def line(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    line(status.counts)
    hosts = Counter(cell.progress.host for cell in status.having("running") if cell.progress.host)
    if hosts:
        line(f"trials run on {', '.join(f'{host} ({trials})' for host, trials in sorted(hosts.items()))}")
    line(time_left(status))
    for cell in [*status.having("running"), *status.having("stopped")]:
        line(f"{cell.progress.title}: {', '.join(_parts(cell, now or datetime.now(UTC)))}")
    for cell in status.having("failed"):
        line(f"failed: {cell.progress.title}: {cell.row['error'] if cell.row is not None else None}")
        line(f"  its traceback and its log: aang show {cell.progress.cell} --store {status.store}")


def _parts(cell: CellStatus, now: datetime) -> Iterator[str]:
    """Yield what there is to say of a cell that runs or ran: state, step and loss, speed, time left, machine."""
    progress, (texts, seconds) = cell.progress, cell.past
    yield cell.state
    yield describe_step(progress)
    if texts > 0 and seconds > 0:
        yield f"{texts / seconds:,.0f} texts a second"
        if cell.state == "running":
            yield f"at most about {duration((progress.work - texts) * seconds / texts)} left"
    if progress.host:
        yield f"on {progress.host}"
    if progress.updated_at:
        silent = (now - datetime.fromisoformat(progress.updated_at)).total_seconds()
        yield f"last report {duration(max(silent, 0.0))} ago"


def others_at_work(store: Store, cells: Collection[str]) -> list[str]:
    """Warnings about living drivers on the same store that have some of these cells to do, too."""
    lines = []
    for file in _files(open_location(store.uri)):
        silent = (datetime.now(UTC) - file.updated_at).total_seconds()
        dead = file.host == socket.gethostname() and not psutil.pid_exists(file.pid)
        shared = [cell for cell in file.cells if cell.cell in cells and cell.state in ("waiting", "running")]
        if shared and not file.ended and not dead and silent <= SILENT_SECONDS:
            lines.append(
                f"warning: {file.name}, process {file.pid} on {file.host}, has "
                f"{len(shared)} of these cells to do, too: of a cell that both run, the first row counts"
            )
    return lines


def newest_file(store: Store, sweep: Path | None) -> SweepFile:
    """The progress file of the sweep that was last started, of a sweep file's name if one is given.

    Raises:
        UserError: No such sweep was started.
    """
    location = open_location(store.uri)
    found = _files(location)
    wanted = [file for file in found if sweep is None or file.name == sweep.stem]
    if not wanted and found:
        names = ", ".join(sorted({file.name for file in found}))
        raise UserError(f"store {location.uri} knows no sweep {sweep}; it knows {names}")
    if not wanted:
        raise UserError(f"no sweep was started on store {location.uri}; start one with `aang sweep FILE --store URI`")
    return max(wanted, key=lambda file: file.started_at)


def _files(location: Location) -> list[SweepFile]:
    """The progress files of a store."""
    folder = fs.FileSelector(location.path(*FOLDER), allow_not_found=True)
    infos = location.filesystem.get_file_info(folder)
    paths = sorted(info.path for info in infos if info.type == fs.FileType.File and info.path.endswith(".json"))
    with ThreadPoolExecutor() as pool:  # the files are small: waiting for each is what takes time
        return [file for file in pool.map(lambda path: _read(location, path), paths) if file is not None]


def _read(location: Location, path: str) -> SweepFile | None:
    """The content of a progress file; None for one of another version, and for one that has vanished meanwhile."""
    try:
        with location.filesystem.open_input_file(path) as stream:
            return SweepFile.model_validate_json(stream.read())
    except (FileNotFoundError, ValidationError):
        return None


def _state(progress: CellProgress, row: Mapping[str, Any] | None, alive: bool) -> CellState:
    if row is not None and row["status"] == "done":
        return "done"
    if progress.state in ("running", "stopped"):  # it began again: an earlier row does not count
        return "running" if alive and progress.state == "running" else "stopped"
    if row is not None:
        return "cut" if row["status"] == "cut" else "failed"
    return "waiting"


def time_left(status: SweepStatus) -> str:
    """Say how long the sweep will take, or why nothing runs."""
    if not status.having("running"):
        if not status.having("waiting", "stopped") and not status.file.to_come:
            return "nothing runs, nothing is left to run"
        if status.alive:
            return "no trial runs yet: they wait for resources, or are being started"
        return f"not running: its process last wrote {duration(status.silent)} ago; start it again to continue"
    left = status.seconds_left
    return "time left: not known before the first evaluation" if left is None else f"about {duration(left)} left"
