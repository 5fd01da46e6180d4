"""The driver's ear: what Ray Tune's trials report, made into progress, and rows for trials that were killed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aang_ray.store import CellIsDone, Store
from aang_ray.sweep.failure import failed_record
from aang_ray.sweep.plan import PlannedCell
from aang_ray.sweep.progress import SweepProgress, duration

CRASHED = (
    "the process ended unexpectedly: out of memory? lower batch.micro, or run fewer trials at once by a larger "
    "resources.cpus"
)

if TYPE_CHECKING:

    class Callback:
        """Ray carries no types; this stands for its base class."""

else:
    from ray.tune import Callback


class Monitor(Callback):
    """Turns events of trials into progress lines; keeps which cells have ended, and how."""

    def __init__(self, cells: Sequence[PlannedCell], store: Store, progress: SweepProgress) -> None:
        self._cells = cells
        self._store = store
        self._progress = progress
        self.ended: dict[str, str] = {}
        """Cell -> `done`, `elsewhere` or `failed`."""
        self.errors: dict[str, str] = {}
        """Failed cell -> its error in one line."""

    def __getstate__(self) -> dict[str, Any]:
        """Tune pickles its callbacks for a restore. None is ever made, and a terminal cannot be pickled."""
        return {}

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: Mapping[str, Any], **info: Any
    ) -> None:
        """Each evaluation, and the end of a cell."""
        cell = self._cell(trial)
        if "status" in result:
            self._end(cell, result)
        else:
            self._progress.evaluated(cell.cell, result["step"], result["steps"])

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial that did not end by itself: its process was killed, or never came up."""
        cell = self._cell(trial)
        if cell.cell in self.ended:
            return
        log = Path(trial.error_file).read_text(encoding="utf-8") if trial.error_file else ""
        record = failed_record(cell.config, describe_crash(log), log)
        try:
            self._store.write(record)
        except CellIsDone:  # it was killed after its row was written
            self._end(cell, {"status": "elsewhere"})
        else:
            self._end(cell, {"status": "failed", "error": record.result.error})

    def _cell(self, trial: Any) -> PlannedCell:
        index: int = trial.config["index"]
        return self._cells[index]

    def _end(self, cell: PlannedCell, result: Mapping[str, Any]) -> None:
        if cell.cell in self.ended:  # Tune repeats the last result when a function returns
            return
        self.ended[cell.cell] = result["status"]
        if result["status"] == "failed":
            self.errors[cell.cell] = str(result["error"])
        self._progress.ended(cell, describe_end(result))


def describe_crash(log: str) -> str:
    """One line for a trial that Ray gave up: the likely cause, or the last line of Ray's own account."""
    if "died" in log or "killed" in log.lower():
        return CRASHED
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return f"the trial could not run: {lines[-1] if lines else 'Ray gave no reason'}"


def describe_end(result: Mapping[str, Any]) -> str:
    """How a cell ended, in one line; scores in percent."""
    match result["status"]:
        case "done":
            mark = " · stayed at the majority class" if result.get("majority") else ""
            scores = f"dev {100 * result['dev']:.2f} · test {100 * result['test']:.2f} {result['metric']}"
            return f"{scores} · {duration(result['seconds'])}{mark}"
        case "elsewhere":
            return "done already, by another process"
        case _:
            return f"FAILED: {result['error']}"
