"""`aang status`: how far a sweep is, from its store alone, while it runs and after it died. `live` asks the cluster."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from aang_ray.store import Store
from aang_ray.sweep.agenda import Agenda, AgendaCell, read_agenda
from aang_ray.sweep.heartbeat import Beat, read_beats
from aang_ray.sweep.progress import duration

CellState = Literal["done", "running", "stopped", "cut", "failed", "waiting"]
"""`stopped`: its trial died; `cut`: a scheduler has paused it or ended it early."""

STATES: tuple[CellState, ...] = ("done", "running", "stopped", "cut", "failed", "waiting")
"""In the order in which they are shown."""


@dataclass(frozen=True)
class CellStatus:
    """One cell as the store shows it."""

    planned: AgendaCell
    state: CellState
    beat: Beat | None
    row: Mapping[str, Any] | None


@dataclass(frozen=True)
class SweepStatus:
    """A sweep at one moment."""

    agenda: Agenda
    cells: tuple[CellStatus, ...]

    def having(self, state: CellState) -> list[CellStatus]:
        """The cells in a state."""
        return [cell for cell in self.cells if cell.state == state]

    @property
    def hosts(self) -> Counter[str]:
        """Running trials by host."""
        return Counter(cell.beat.host for cell in self.having("running") if cell.beat is not None)

    @property
    def seconds_left(self) -> float | None:
        """Texts left x seconds a text / trials that run now; None when nothing runs or nothing was measured.

        Seconds a text are those of all done cells, and of the running ones up to their last evaluation. Waiting and
        stopped cells count whole, though a stopped one may go on from a checkpoint; failed ones do not count, because
        only the next start runs them again. With early stopping, too, it is an upper bound.
        """
        running = self.having("running")
        past = [_past(cell) for cell in self.cells if cell.state in ("done", "running")]
        texts, seconds = sum(work for work, _ in past), sum(spent for _, spent in past)
        if not running or texts <= 0 or seconds <= 0:
            return None
        left = sum(cell.planned.work - _past(cell)[0] for cell in running)
        left += sum(cell.planned.work for state in ("waiting", "stopped") for cell in self.having(state))
        return left * seconds / texts / len(running)


def read_status(store: Store, sweep: Path | None = None, now: datetime | None = None) -> SweepStatus:
    """Read the sweep last started on a store, of a sweep file's name if one is given.

    A done row is the truth whatever else there is. A trial that gives signs of life is running, also where an earlier
    attempt left a failed row; one that fell silent without a row has stopped, and is run again by the next start.

    Raises:
        UserError: where no such sweep was started.
    """
    now = now or datetime.now(UTC)
    agenda = read_agenda(store.uri, sweep)
    beats = read_beats(store.uri)  # before the rows: a cell that ends in between is then seen as done, not as waiting
    names = {cell.cell for cell in agenda.cells}
    rows = {row["cell"]: row for row in store.results().to_pylist() if row["cell"] in names}
    cells = (_status(cell, beats.get(cell.cell), rows.get(cell.cell), now) for cell in agenda.cells)
    return SweepStatus(agenda, tuple(cells))


def show_status(status: SweepStatus, console: Console, now: datetime | None = None) -> None:
    """Print counts, hosts, the time left, the trials that run or stopped, and the errors of those that failed."""
    now = now or datetime.now(UTC)
    counts = Counter(cell.state for cell in status.cells)
    parts = ", ".join(f"{counts[state]} {state}" for state in STATES if counts[state])
    console.print(f"{status.agenda.name}: {len(status.cells)} cells: {parts}", markup=False, highlight=False)
    if status.hosts:
        hosts = ", ".join(f"{host} ({trials})" for host, trials in sorted(status.hosts.items()))
        _line(console, f"trials run on {hosts}")
    _line(console, _time_left(status))
    active = [*status.having("running"), *status.having("stopped")]
    if active:
        console.print(_table(active, now))
    for cell in status.having("failed"):
        error = cell.row["error"] if cell.row is not None else None
        _line(console, f"failed: {cell.planned.title}: {error}")


def _status(planned: AgendaCell, beat: Beat | None, row: Mapping[str, Any] | None, now: datetime) -> CellStatus:
    state: CellState
    if row is not None and row["status"] == "done":
        state = "done"
    elif beat is not None and beat.alive(now):
        state = "running"
    elif row is not None:
        state = "cut" if row["status"] == "cut" else "failed"
    else:
        state = "waiting" if beat is None else "stopped"
    return CellStatus(planned, state, beat, row)


def _past(cell: CellStatus) -> tuple[float, float]:
    """Texts that went through the body of a cell, and the seconds they took."""
    steps = max(cell.planned.steps, 1)
    if cell.state == "done" and cell.row is not None:
        return cell.planned.work * min(cell.row["steps"] / steps, 1.0), cell.row["seconds"]
    if cell.beat is not None:
        return cell.planned.work * min(cell.beat.step / steps, 1.0), cell.beat.seconds
    return 0.0, 0.0


def _time_left(status: SweepStatus) -> str:
    if not status.having("running"):
        waiting = len(status.having("waiting")) + len(status.having("stopped"))
        if not waiting:
            return "nothing runs, nothing is left to run"
        return "no trial runs; if the sweep has ended, start it again to go on"  # it may wait for nodes
    left = status.seconds_left
    return "time left: not known before the first evaluation" if left is None else f"about {duration(left)} left"


def _table(cells: Sequence[CellStatus], now: datetime) -> Table:
    table = Table("cell", "state", "step", "dev", "host", "last sign")
    for cell in cells:
        beat = cell.beat
        if beat is None:
            continue
        score = "" if beat.score is None else f"{100 * beat.score:.2f} {beat.metric}"
        ago = f"{duration(beat.silent(now))} ago"
        table.add_row(cell.planned.title, cell.state, f"{beat.step}/{beat.steps}", score, beat.host, ago)
    return table


def _line(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
