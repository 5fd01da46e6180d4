"""Starting the processes of a run: what is a loss and what a bug, and what a run hears from outside."""

from __future__ import annotations

import pickle
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from ray import train
from ray.exceptions import ActorDiedError
from ray.train.v2._internal.exceptions import (
    WorkerGroupStartupFailedError,
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
)

from aang_ray.errors import RunFailure, UserError
from aang_ray.store.schema import CellRecord, HistoryRow
from aang_ray.train.checkpoint import CheckpointFiles
from aang_ray.train.control import Interrupted, RunControl
from aang_ray.train.run import run_cell
from aang_ray.train.workers import launch as launching
from aang_ray.train.workers.group import WorkerLost, Workers
from aang_ray.train.workers.launch import (
    ATTEMPTS,
    PLACEMENT_MINUTES,
    Job,
    WorkerError,
    cause_of,
    describe_loss,
    launch,
    watching,
)
from tests.train.running import tiny_config
from tests.train.test_checkpoint import numbers

DEAD = WorkerHealthCheckFailedError("worker 1", ActorDiedError())
STEPS = ("schedule.steps=8", "schedule.eval_every=4")


def group(*failures: Exception) -> Exception:
    return train.WorkerGroupError("workers failed", dict(enumerate(failures)))


@pytest.mark.parametrize(
    "error",
    [
        group(DEAD),
        group(DEAD, WorkerLost("worker 1 ended")),
        group(WorkerLost("gone"), WorkerLost("gone")),
        train.ControllerError(WorkerGroupStartupFailedError("a node died")),
        ActorDiedError(),
    ],
)
def test_a_loss_has_no_cause_in_the_run(tiny: dict[str, Any], error: Exception) -> None:
    assert cause_of(error, tiny_config(tiny)) is None


def test_a_loss_is_said_by_its_kinds() -> None:
    assert describe_loss(group(WorkerLost("gone"), DEAD, WorkerLost("gone"))) == "ActorDiedError, WorkerLost"
    assert describe_loss(ActorDiedError()) == "ActorDiedError"


@pytest.mark.parametrize("bug", [WorkerError("ZeroDivisionError: by nothing"), UserError("data: no such file")])
def test_an_exception_of_one_worker_is_the_cause_whatever_it_took_with_it(tiny: dict[str, Any], bug: Exception) -> None:
    assert cause_of(group(WorkerLost("gone"), DEAD, bug), tiny_config(tiny)) is bug


def test_workers_that_find_no_place(tiny: dict[str, Any]) -> None:
    config = tiny_config(tiny, "resources.workers=2", "resources.gpus_per_worker=0.5")
    cause = cause_of(train.ControllerError(WorkerGroupStartupTimeoutError(2)), config)
    assert isinstance(cause, RunFailure)
    assert str(cause) == f"{PLACEMENT_MINUTES} minutes were not enough to place 2 workers of 1 CPU and 0.5 GPU each"


def test_other_errors_of_the_controller_are_bugs(tiny: dict[str, Any]) -> None:
    bug = ValueError("no such strategy")
    assert cause_of(train.ControllerError(bug), tiny_config(tiny)) is bug


def test_a_workers_error_travels_with_its_note() -> None:
    error = WorkerError("ZeroDivisionError: by nothing")
    error.add_note("in worker 1: Traceback")
    back = pickle.loads(pickle.dumps(error))
    assert (str(back), back.__notes__) == (str(error), error.__notes__)


def test_a_bug_in_one_of_several_workers_is_told_with_its_traceback(
    tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_cell(*_: object, **__: object) -> CellRecord:
        raise ZeroDivisionError("by nothing")

    monkeypatch.setattr(launching, "run_cell", run_cell)
    monkeypatch.setattr(launching.Workers, "from_environment", lambda device: Workers(rank=1, size=2))
    job = Job(tiny_config(tiny), str(tmp_path), None, print, lambda: False, None)
    with pytest.raises(WorkerError, match="ZeroDivisionError: by nothing") as told:
        launching._train_loop({"job": job})
    (note,) = told.value.__notes__
    assert note.startswith("in worker 1:\nTraceback")
    assert note.endswith("ZeroDivisionError: by nothing\n")


class Lives:
    """Stands for the lives of a worker group: each reaches a step, then is lost, or ends with a record."""

    def __init__(self, folder: Path, cell: str, *reached: int | CellRecord) -> None:
        self._files = CheckpointFiles(folder, cell)
        self._reached = list(reached)

    def __call__(self, *_: object) -> CellRecord:
        reached = self._reached.pop(0)
        if isinstance(reached, CellRecord):
            return reached
        self._files.save(reached, {}, 0, {})
        raise group(DEAD)

    @property
    def left(self) -> int:
        return len(self._reached)


def test_lost_workers_are_started_again_as_long_as_the_run_gets_on(
    tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(tiny, "method=finetune", *STEPS, "resources.workers=2")
    record = run_cell(config)
    lives = Lives(tmp_path, config.cell, 1, 2, 3, 4, 4, record)
    monkeypatch.setattr(launching, "_together", lives)
    assert launch(config, checkpoints=str(tmp_path), on_evaluation=print) is record
    assert lives.left == 0


def test_a_run_that_does_not_get_on_is_given_up(
    tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(tiny, "resources.workers=2")
    lives = Lives(tmp_path, config.cell, 3, *[3] * ATTEMPTS)
    monkeypatch.setattr(launching, "_together", lives)
    with pytest.raises(RunFailure, match=f"workers were lost {ATTEMPTS} times in a row without a newer checkpoint"):
        launch(config, checkpoints=str(tmp_path), on_evaluation=print)
    assert lives.left == 1, "the first life got to step 3 and counts as the first of those in a row"


def test_one_worker_runs_in_this_process(tiny: dict[str, Any], tmp_path: Path) -> None:
    config = tiny_config(tiny, *STEPS)
    heard: list[tuple[int, int]] = []

    def hear(row: HistoryRow) -> None:
        heard.append((row.step, threading.get_ident()))

    record = launch(config, checkpoints=str(tmp_path), on_evaluation=hear)
    assert heard == [(4, threading.get_ident()), (8, threading.get_ident())]
    assert numbers(record) == numbers(run_cell(config))


def test_an_abandoned_run_writes_its_checkpoint_first(tiny: dict[str, Any], tmp_path: Path) -> None:
    config = tiny_config(tiny, "schedule.steps=10000000", "schedule.eval_every=4")
    evaluated: list[int] = []

    def hear(row: HistoryRow) -> None:
        evaluated.append(row.step)

    with pytest.raises(Interrupted, match=r"stopped by another process after step \d+; the same command") as stop:
        launch(config, checkpoints=str(tmp_path), on_evaluation=hear, abandoned=lambda: len(evaluated) > 0)
    step = CheckpointFiles(tmp_path, config.cell).newest_step()
    assert f"after step {step};" in str(stop.value)
    assert step >= evaluated[-1] >= 4


def test_what_is_noticed_stays_noticed_and_is_not_asked_again() -> None:
    looks = []
    twice = threading.Event()

    def draining() -> bool:
        return not looks

    def abandoned() -> bool:
        looks.append(True)
        if len(looks) == 2:
            twice.set()
        return len(looks) == 2

    with watching(draining, abandoned, pause=0.001) as control:
        assert twice.wait(60)
        time.sleep(0.02)  # some looks more, if there were any
    assert control == RunControl(draining=True, stop=True)
    assert len(looks) == 2


def test_a_draining_machine_is_saved_from_at_once_and_not_after_every_step(
    tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(tiny, "method=finetune", *STEPS)
    control, saved = RunControl(), []
    save = CheckpointFiles.save

    def recorded(self: CheckpointFiles, step: int, *arguments: Any) -> str:
        saved.append(step)
        return save(self, step, *arguments)

    def drain(row: HistoryRow) -> None:
        control.draining = True

    monkeypatch.setattr(CheckpointFiles, "save", recorded)
    record = run_cell(config, checkpoints=tmp_path, on_evaluation=drain, control=control)
    assert saved == [4]
    assert numbers(record) == numbers(run_cell(config))
