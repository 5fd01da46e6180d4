"""How a sweep ended, for its exit code and for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console

from aang_ray.sweep.plan import PlannedCell
from aang_ray.sweep.run import Ends


@dataclass(frozen=True)
class SweepOutcome:
    """How a sweep ended."""

    cells: int
    done: int
    """Cells with a done row, those of earlier sweeps included."""
    cut: int
    """Cells that the scheduler of this sweep cut short."""
    failed: Mapping[str, str]
    """Title of each failed cell -> its error."""

    @property
    def remaining(self) -> int:
        """Cells that would still have to run."""
        return self.cells - self.done - self.cut - len(self.failed)

    @property
    def exit_code(self) -> int:
        """0 when every cell is done or was cut short on purpose, else 1."""
        return 0 if self.done + self.cut == self.cells else 1


def outcome_of(cells: Sequence[PlannedCell], ends: Ends, *, scheduled: bool = False, to_come: int = 0) -> SweepOutcome:
    """From the plan and what became of its jobs.

    `scheduled`: cells may be cut short on purpose; `to_come` counts those that were not planned yet when it ended.
    """
    status = {cell.cell: ends.status.get(cell.cell, cell.state) for cell in cells}
    failed = {
        cell.title: ends.errors.get(cell.cell, "failed before (kept)")
        for cell in cells
        if status[cell.cell] == "failed"
    }
    done = sum(state in ("done", "elsewhere") for state in status.values())
    cut = sum(state == "cut" for state in status.values()) if scheduled else 0
    return SweepOutcome(len(cells) + to_come, done, cut, failed)


def report(outcome: SweepOutcome, console: Console, max_hours: float | None) -> None:
    """Print what did not end well, and what remains."""
    for title, error in outcome.failed.items():
        console.print(f"failed: {title}: {error}", markup=False, highlight=False, soft_wrap=True)
    if outcome.cut:
        console.print(
            f"{outcome.cut} cells were cut short by asha and have no test score; without --scheduler the same command "
            "runs them to their end",
            soft_wrap=True,
        )
    if outcome.remaining:
        reason = f"--max-hours {max_hours:g} is over" if max_hours is not None else "the sweep ended early"
        console.print(f"{reason}: {outcome.remaining} cells remain; run the same command again to go on")
