"""The driver's ear: what becomes of Ray Tune's trials, told to the queue and to people, and rows of dead ones."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aang_ray.store import CellIsDone, Store
from aang_ray.sweep.crash import describe_crash, last_lines
from aang_ray.sweep.jobs import End, Job
from aang_ray.sweep.progress import SweepProgress, duration
from aang_ray.sweep.queue import RETRIES, Queue
from aang_ray.train.record import failed_record

if TYPE_CHECKING:

    class Callback:
        """Ray carries no types; this stands for its base class."""

else:
    from ray.tune import Callback


class Monitor(Callback):
    """Turns events of trials into progress lines, ends of jobs, and rows of cells that died too often."""

    def __init__(self, queue: Queue, jobs: Mapping[str, Job], store: Store, progress: SweepProgress) -> None:
        self._queue = queue
        self._jobs = jobs
        self._store = store
        self._progress = progress
        self._results: dict[str, Mapping[str, Any]] = {}
        """By trial: how it said that it ended."""
        self._actors: dict[str, str] = {}
        """By trial: the id of its process."""
        self._alive: set[str] = set()
        """Trials whose functions run."""
        self.ended: dict[str, str] = {}
        """Cell -> how its last job ended: `done`, `elsewhere`, `cut` or `failed`."""
        self.errors: dict[str, str] = {}
        """Failed cell -> its error in one line."""

    def __getstate__(self) -> dict[str, Any]:
        """Tune pickles its callbacks for a restore. None is ever made, and a terminal cannot be pickled."""
        return {}

    @property
    def alive(self) -> int:
        """How many trials run; others may have been handed out, and wait for a node."""
        return len(self._alive)

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial has a process."""
        self._alive.add(trial.trial_id)
        self._actors[trial.trial_id] = trial.temporary_state.ray_actor._actor_id.hex()

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: Mapping[str, Any], **info: Any
    ) -> None:
        """The step that a cell goes on from, each evaluation, and its end."""
        job = self._jobs[trial.trial_id]
        if "resumed" in result:
            self._progress.said(f"{job.cell.title} · goes on from step {result['resumed']}")
        if "status" not in result:
            self._queue.came_to(job, result["step"])
            self._progress.evaluated(job.cell.cell, result["step"], result["steps"])
        elif trial.trial_id not in self._results:  # Tune repeats the last result when a function returns
            self._results[trial.trial_id] = result
            if result["status"] == "stopped":
                self._progress.said(f"{job.cell.title} · stopped, its checkpoint is written")
            else:
                self._tell(job, result)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial's function has returned, or was ended because it did not stop in time: then it has said nothing."""
        self._alive.discard(trial.trial_id)
        result = self._results.get(trial.trial_id)
        if result is not None:
            self._end(self._jobs[trial.trial_id], result)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial's process died, or never came up: exceptions of a cell are rows, not errors of its trial."""
        self._alive.discard(trial.trial_id)
        job = self._jobs[trial.trial_id]
        result = self._results.get(trial.trial_id) or self._end_in_store(job)
        if result is not None:
            self._end(job, result)
            return
        account = Path(trial.error_file).read_text(encoding="utf-8") if trial.error_file else ""
        error = describe_crash(account)
        times = self._queue.lost(job)
        if times is not None:
            self._progress.said(f"lost: {job.cell.title} · {error} · tried again, {times} of {RETRIES} times")
            return
        log = "\n".join([account, *last_lines(self._actors.get(trial.trial_id))])
        record = failed_record(job.cell.config, f"{error}; it was tried {RETRIES + 1} times", log)
        result = {"status": "failed", "error": record.result.error}
        try:
            self._store.write(record)
        except CellIsDone:  # by another process
            result = {"status": "elsewhere"}
        self._tell(job, result)
        self._end(job, result)

    def _end_in_store(self, job: Job) -> Mapping[str, Any] | None:
        """How a cell ended whose process died between its row and its last word."""
        if self._store.done().get(job.cell.cell) != "done":
            return None
        result = {"status": "elsewhere"}
        self._tell(job, result)
        return result

    def _tell(self, job: Job, result: Mapping[str, Any]) -> None:
        status = result["status"]
        self.ended[job.cell.cell] = status
        self.errors.pop(job.cell.cell, None)
        if status == "failed":
            self.errors[job.cell.cell] = str(result["error"])
        if status == "cut":
            self._progress.said(f"{job.cell.title} · {describe_end(result)}")
        else:
            self._progress.ended(job.cell, describe_end(result))

    def _end(self, job: Job, result: Mapping[str, Any]) -> None:
        if result["status"] == "stopped":
            self._queue.stopped(job)
            return
        dev = result.get("dev")
        if result["status"] == "elsewhere":
            row = self._store.record(job.cell.cell).result
            dev = None if row.dev is None else getattr(row.dev, row.metric)
        self._queue.ended(job, End(result["status"], dev))


def describe_end(result: Mapping[str, Any]) -> str:
    """How a cell ended, in one line; scores in percent."""
    match result["status"]:
        case "done":
            mark = " · stayed at the majority class" if result.get("majority") else ""
            scores = f"dev {100 * result['dev']:.2f} · test {100 * result['test']:.2f} {result['metric']}"
            return f"{scores} · {duration(result['seconds'])}{mark}"
        case "cut":
            score = "no dev score yet" if result.get("dev") is None else f"dev {100 * result['dev']:.2f} so far"
            return f"paused after step {result['step']} · {score}"
        case "elsewhere":
            return "done already, by another process"
        case _:
            return f"FAILED: {result['error']}"
