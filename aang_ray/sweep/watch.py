"""`aang watch`: a sweep or a run as it goes, in the terminal; in a pipe, a line for each evaluation and each end."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from aang_ray.report.logged import readable
from aang_ray.store import Store
from aang_ray.sweep.plan import duration
from aang_ray.sweep.progress import PLAIN_INTERVAL, CellProgress, SweepFile
from aang_ray.sweep.status import CellStatus, SweepStatus, newest_file, read_rows, show_status, status_of, time_left

PAUSE_SECONDS = 1.0
"""Time between two looks at the progress file, which is written once a second at most."""
ENDED = 5
"""Cells that are shown of those that have ended: the last ones."""
SPARKS = "▁▂▃▄▅▆▇█"
SPARK_COLUMNS = 10
_FIXED_LINES = 5
"""Lines that are always there: counts, bar, time left, and the empty ones."""
_NARROW = 100
"""On a narrower terminal the bars are shorter."""


def watch(store: Store, sweep: Path | None, console: Console, pause: float = PAUSE_SECONDS) -> SweepStatus:
    """Show the sweep that was last started, of a sweep file's name if one is given, until its driver has ended.

    Ctrl-C ends the watching, and nothing else.

    Args:
        store: The store that the sweep writes into.
        sweep: A sweep file; None for the last one.
        console: Where it is shown. Without a terminal, lines are printed.
        pause: Seconds between two looks.

    Returns:
        The last status that was read.

    Raises:
        UserError: No such sweep was started.
    """
    looks = _look(store, sweep, pause)
    status = next(looks)
    try:
        if not console.is_terminal:
            printed = _Lines(console)
            printed.show(status)
            for status in looks:
                printed.show(status)
        elif status.alive:
            with Live(screen_of(status, console), console=console, auto_refresh=False, transient=True) as live:
                for status in looks:
                    live.update(screen_of(status, console), refresh=True)
    except KeyboardInterrupt:
        console.print("the sweep goes on; `aang watch` shows it again", highlight=False)
        return status
    show_status(status, console)
    return status


def _look(store: Store, sweep: Path | None, pause: float) -> Iterator[SweepStatus]:
    """Yield the status until the driver has ended. Rows are read again only when a cell has ended since."""
    rows: Mapping[str, Mapping[str, Any]] = {}
    before: frozenset[str] | None = None
    while True:
        file = newest_file(store, sweep)
        ended = _ended(file)
        if ended != before:
            rows, before = read_rows(store), ended
        status = status_of(store, file, rows)
        yield status
        if not status.alive:
            return
        time.sleep(pause)


def _ended(file: SweepFile) -> frozenset[str]:
    # With the name: another sweep may have been started meanwhile.
    return frozenset(
        [f"{file.name} {file.started_at} {file.ended}", *(c.cell for c in file.cells if c.state == "ended")]
    )


def screen_of(status: SweepStatus, console: Console) -> RenderableType:
    """Return what fits on the screen: the whole sweep, running cells with their weights, and the last ended ones."""
    done, total = status.work
    bar = Table.grid(padding=(0, 1), expand=True)
    bar.add_column(ratio=1)
    bar.add_column(no_wrap=True)
    share = done / total if total else 0.0
    bar.add_row(ProgressBar(total=1.0, completed=share), Text(f"{100 * share:.0f} % of the work"))
    head: list[RenderableType] = [Text(status.counts, style="bold"), bar, Text(time_left(status))]
    ended = sorted(status.having("done", "failed", "cut"), key=lambda cell: cell.progress.updated_at)
    last = ended[-ENDED:]
    free = console.height - _FIXED_LINES - (len(last) + 2 if last else 0)
    parts: list[RenderableType] = [*head, Text(), *_running(status.having("running"), free, console)]
    if last:
        parts += [Text(), Text("ended last", style="bold"), _ended_cells(last[::-1], console.width)]
    return Group(*parts)


def _running(cells: list[CellStatus], free: int, console: Console) -> Iterator[RenderableType]:
    """Yield a line for each running cell, and below it its objectives with most weight, as far as there is room."""
    shown = cells[: max(free - 1, 1)]
    room = free - len(shown) - (len(shown) < len(cells))
    narrow = console.width < _NARROW
    for cell in shown:
        yield _cell_line(cell.progress, 12 if narrow else 24, SPARK_COLUMNS)
        weights = list(cell.progress.weights.items())
        if len(weights) <= room:
            room -= len(weights)
            if weights:
                yield _weight_lines(cell.progress, 12 if narrow else 24)
    if len(shown) < len(cells):
        yield Text(f"and {len(cells) - len(shown)} more that run")


def _cell_line(cell: CellProgress, bar: int, sparks: int) -> Table:
    line = Table.grid(padding=(0, 1), expand=True)
    line.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
    for width in (bar, 2 * len(str(cell.steps)) + 1, 9, sparks, 8):
        line.add_column(width=width, no_wrap=True, overflow="crop")
    weight = ""
    if cell.end_task_weights:
        before = cell.end_task_weights[-2] if len(cell.end_task_weights) > 1 else None
        weight = f"λ {cell.end_task_weights[-1]:.2f} {_arrow(cell.end_task_weights[-1], before)}"
    steps = f"{cell.step}/{cell.steps}".rjust(2 * len(str(cell.steps)) + 1)
    score = f"dev {100 * cell.scores[-1]:.2f}" if cell.scores else "no score"
    line.add_row(
        Text(cell.title),
        ProgressBar(total=max(cell.steps, 1), completed=cell.step, width=bar),
        steps,
        score,
        sparkline(cell.scores[-sparks:]),
        weight,
    )
    return line


def _weight_lines(cell: CellProgress, bar: int) -> Table:
    lines = Table.grid(padding=(0, 1), expand=True)
    lines.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
    lines.add_column(width=bar)
    lines.add_column(width=8, no_wrap=True, justify="right")
    most = max(cell.weights.values())
    for name, weight in cell.weights.items():
        arrow = _arrow(weight, cell.weights_before.get(name))
        share = ProgressBar(
            total=most or 1.0, completed=weight, width=bar, complete_style="cyan", finished_style="cyan"
        )
        lines.add_row(Text(f"  {readable(name)}", style="dim"), share, f"{weight:.3f} {arrow}")
    return lines


def _ended_cells(cells: list[CellStatus], width: int) -> Table:
    lines = Table.grid(padding=(0, 2))
    title = min(max(len(cell.progress.title) for cell in cells), width // 2)
    for column in (title, width - title - 4):  # an error may be long, and must not displace the name
        lines.add_column(width=column, no_wrap=True, overflow="ellipsis")
    for cell in cells:
        lines.add_row(Text(cell.progress.title), Text(describe(cell), style="red" if cell.state == "failed" else ""))
    return lines


def describe(cell: CellStatus) -> str:
    """Return how a cell ended: scores in percent and its time, or the error."""
    row = cell.row
    if row is None:
        return cell.state
    if row["status"] == "failed":
        return f"failed: {row['error']}"
    scores = [
        f"{view} {100 * row[f'{view}_score']:.2f}" for view in ("dev", "test") if row[f"{view}_score"] is not None
    ]
    return " · ".join([*([] if row["status"] == "done" else ["cut"]), *scores, duration(row["seconds"])])


def sparkline(values: Iterable[float]) -> str:
    """Return one bar for each value, from the lowest to the highest of them."""
    found = list(values)
    low, high = min(found, default=0.0), max(found, default=0.0)
    if low == high:
        return SPARKS[len(SPARKS) // 2] * len(found)
    return "".join(SPARKS[round((value - low) / (high - low) * (len(SPARKS) - 1))] for value in found)


def _arrow(now: float, before: float | None) -> str:
    """Return in which direction a number moves, by what is shown of it."""
    if before is None or round(now, 3) == round(before, 3):
        return " "
    return "▲" if now > before else "▼"


class _Lines:
    """Prints what has changed since the last status."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._seen: dict[str, tuple[Any, ...]] = {}
        self._counted = -float("inf")

    def show(self, status: SweepStatus) -> None:
        """Print a line for each new evaluation and each new state, and now and then one about the whole sweep."""
        first = not self._seen
        for cell in status.cells:
            progress = cell.progress
            now = (cell.state, progress.scores, progress.end_task_weights)
            if self._seen.get(cell.progress.cell) == now:
                continue
            self._seen[progress.cell] = now
            if cell.state == "running":
                self._line(f"{progress.title} · {_told(progress)}")
            elif cell.state in ("done", "failed", "cut") and not first:
                self._line(f"{progress.title} · {describe(cell)}")
        if status.alive and time.monotonic() - self._counted >= PLAIN_INTERVAL:
            self._counted = time.monotonic()
            self._line(f"{status.counts}; {time_left(status)}")

    def _line(self, text: str) -> None:
        clock = datetime.now(UTC).astimezone().strftime("%H:%M:%S")
        self._console.print(f"{clock} {text}", markup=False, highlight=False, soft_wrap=True)


def _told(cell: CellProgress) -> str:
    parts = [f"step {cell.step}/{cell.steps}"]
    if cell.scores:
        parts.append(f"dev {100 * cell.scores[-1]:.2f}")
    if cell.end_task_weights:
        parts.append(f"λ {cell.end_task_weights[-1]:.3f}")
    if cell.weights:
        parts.append("most weight: " + ", ".join(f"{readable(k)} {v:.3f}" for k, v in cell.weights.items()))
    return " · ".join(parts)
