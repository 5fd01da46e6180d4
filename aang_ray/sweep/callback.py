"""The Tune callback of a sweep: it prints lines, keeps the progress file and writes rows of trials that died."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ray.tune import Callback

from aang_ray.store import CellIsDone, Store
from aang_ray.sweep.plan import PlannedCell, duration
from aang_ray.sweep.progress import ProgressFile, ProgressLines
from aang_ray.train.record import failed_record

RETRIES = 3
"""How often in all a cell is tried again whose process died."""

LOG_LINES = 30
"""Lines of a dead process's log that its failed row keeps."""

CRASHED = (
    "the process ended unexpectedly: out of memory? lower batch.micro, or run fewer trials at once by a larger "
    "resources.cpus"
)


class SweepCallback(Callback):  # type: ignore[misc]  # Ray has no type information
    """Tune callback that prints progress, keeps the progress file, and writes a failed row for each trial that died.

    What trials report is described in `trial.run_and_store`.
    """

    def __init__(self, store: Store, lines: ProgressLines, file: ProgressFile) -> None:
        self._store, self._lines, self._file = store, lines, file
        self._cells: dict[str, PlannedCell] = {}
        self._actors: dict[str, str] = {}
        """By trial: id of its process."""
        self._last: dict[str, Mapping[str, Any]] = {}
        """By trial: its last report."""
        self.alive: set[str] = set()
        """Trials whose functions run; other trials may wait for resources."""
        self.ended: dict[str, str] = {}
        """Cell -> how its trial ended: `done`, `elsewhere`, `cut` or `failed`."""
        self.errors: dict[str, str] = {}
        """Failed cell -> its error in one line."""
        self.losses = 0
        """How often a trial's process died."""
        self.cannot_write = ""
        """Why the first trial that could not write its files could not; the sweep then stops."""

    def __getstate__(self) -> dict[str, Any]:
        """Tune pickles its callbacks for a restore, which is never made; a terminal cannot be pickled."""
        return {}

    def add(self, cells: Sequence[PlannedCell]) -> None:
        """Add cells that will have trials."""
        self._cells |= {cell.cell: cell for cell in cells}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial has a process, a new one or one that it shares with earlier trials."""
        self.alive.add(trial.trial_id)
        self._last.pop(trial.trial_id, None)
        self._file.update(self._cell(trial).cell, state="running", step=0, score=None)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: Mapping[str, Any], **info: Any
    ) -> None:
        """A trial has started, was evaluated, came to a rung, or ended."""
        cell = self._cell(trial)
        self._last[trial.trial_id] = dict(result)
        changes = {"host": result.get("hostname", ""), "pid": result.get("pid", 0)}
        changes |= {name: result[name] for name in ("step", "seconds", "score") if result.get(name) is not None}
        self._file.update(cell.cell, **changes)
        if "actor" in result:
            self._actors[trial.trial_id] = result["actor"]
        if result.get("resumed"):
            self._lines.line(f"{cell.title} · goes on from step {result['step']}")
        if "status" in result:
            self._end(cell, result)
        else:
            self._lines.evaluated(cell.cell, result["step"], cell.steps)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial's function has returned, or Tune's scheduler has ended the trial at a rung."""
        self.alive.discard(trial.trial_id)
        last = self._last.get(trial.trial_id, {})
        if "rung" in last and "status" not in last:
            self._end(self._cell(trial), {**last, "status": "cut"})

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial's process died, and Tune tries the trial again."""
        self.alive.discard(trial.trial_id)
        self.losses += 1
        cell = self._cell(trial)
        self._file.update(cell.cell, state="waiting")
        # Ray does not count a machine whose end was announced.
        times = f", {trial.num_failures} of {RETRIES} times" if trial.num_failures else ""
        self._lines.line(f"lost: {cell.title} · {describe_crash(_account(trial))} · tried again{times}")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial's process died too often, or never started. (An exception of a cell is no error of its trial.)"""
        self.alive.discard(trial.trial_id)
        self.losses += 1
        if "status" in self._last.get(trial.trial_id, {}):
            return  # it died after its row was written
        cell, account = self._cell(trial), _account(trial)
        # The record keeps the last lines only: Ray's account of the death stands last.
        log = "\n".join([*_last_lines(self._actors.get(trial.trial_id)), account])
        times = trial.num_failures
        error = describe_crash(account) + (f"; it was tried {times} times" if times > 1 else "")
        record = failed_record(cell.config, error, log)
        try:
            self._store.write(record)
        except CellIsDone:  # the process died after its row was written, or another process wrote it
            self._end(cell, {"status": "elsewhere"})
        except OSError as error:  # the store cannot be written right now: the next start runs the cell again
            self._end(cell, {"status": "failed", "error": f"{record.result.error}; its row was not written: {error}"})
        else:
            self._end(cell, {"status": "failed", "error": record.result.error})

    def _cell(self, trial: Any) -> PlannedCell:
        return self._cells[trial.config["trial"]["cell"]]

    def _end(self, cell: PlannedCell, result: Mapping[str, Any]) -> None:
        status = result["status"]
        if status == "not started":  # the sweep was stopping
            self._file.update(cell.cell, state="waiting")
            return
        stopped = status in ("stopped", "cannot write")
        self._file.update(cell.cell, state="stopped" if stopped else "ended")
        if status == "cannot write":
            self.cannot_write = self.cannot_write or str(result["error"])
        elif stopped:
            self._lines.line(f"{cell.title} · stopped, its checkpoint is written")
        if stopped:
            return
        self.ended[cell.cell] = status
        self.errors.pop(cell.cell, None)
        if status == "failed":
            self.errors[cell.cell] = str(result["error"])
        self._lines.ended(cell, describe_end(result))


def describe_end(result: Mapping[str, Any]) -> str:
    """How a cell ended, in one line; scores in percent."""
    match result["status"]:
        case "done":
            mark = " · stayed at the majority class" if result.get("majority") else ""
            scores = f"dev {100 * result['dev']:.2f} · test {100 * result['test']:.2f} {result['metric']}"
            return f"{scores} · {duration(result['seconds'])}{mark}"
        case "cut":
            score = "no dev score yet" if result.get("dev") is None else f"dev {100 * result['dev']:.2f} so far"
            return f"cut short after step {result['step']} · {score}"
        case "elsewhere":
            return "done already, by another process"
        case _:
            return f"FAILED: {result['error']}"


def describe_crash(account: str) -> str:
    """One line from Ray's account of a trial's end: the likely cause, or the account's own last line."""
    if "died" in account or "killed" in account.lower():
        return CRASHED
    lines = [line.strip() for line in account.splitlines() if line.strip()]
    return f"the trial could not run: {lines[-1] if lines else 'Ray gave no reason'}"


def _account(trial: Any) -> str:
    """Ray's account of the last failure of a trial; its file has all of them."""
    text = Path(trial.error_file).read_text(encoding="utf-8") if trial.error_file else ""
    return text[max(text.rfind("Failure #"), 0) :].strip()


def _last_lines(actor: str | None) -> list[str]:
    """The last lines that a process printed on stderr, from the node it ran on, or why there are none."""
    from ray.util.state import get_log
    from ray.util.state.exception import RayStateApiException

    if actor is None:
        return ["its process never started"]
    try:
        return "".join(get_log(actor_id=actor, suffix="err", tail=LOG_LINES)).splitlines()
    except (RayStateApiException, OSError, TimeoutError) as error:
        return [f"its log could not be read: {type(error).__name__}: {error}"]
