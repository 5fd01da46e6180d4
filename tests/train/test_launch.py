"""Starting the workers of a run: lost workers and bugs, retries, evaluations and reasons to stop."""

from __future__ import annotations

import pickle
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ray import train
from ray.exceptions import ActorDiedError, RayTaskError
from ray.train.v2._internal.exceptions import (  # what Ray Train reports of workers that are gone
    WorkerGroupStartupFailedError,
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
    WorkerHealthCheckTimeoutError,
)

from aang_ray.config import RunConfig
from aang_ray.errors import RunFailure, UserError
from aang_ray.store.schema import CellRecord, HistoryRow
from aang_ray.train.checkpoint import CheckpointFiles
from aang_ray.train.control import Interrupted, RunControl
from aang_ray.train.record import OnEvaluation
from aang_ray.train.run import run_cell
from aang_ray.train.workers import launch as launching
from aang_ray.train.workers.group import WorkerLost, Workers
from aang_ray.train.workers.launch import (
    ATTEMPTS,
    PLACEMENT_SECONDS,
    Channel,
    Event,
    Job,
    SendEvaluations,
    WorkerError,
    describe_loss,
    error_of_run,
    launch,
    watching,
)
from tests.sweep.conftest import history_row
from tests.train.running import tiny_config
from tests.train.test_checkpoint import numbers

DEAD = WorkerHealthCheckFailedError("worker 1", ActorDiedError())
STEPS = ("schedule.steps=8", "schedule.eval_every=4")


def job_of(config: RunConfig, folder: Path) -> Job:
    return Job(config, str(folder), export=None, on_done=None, until=None, abandoned=lambda: False)


def group(*failures: Exception) -> Exception:
    return train.WorkerGroupError("workers failed", dict(enumerate(failures)))


@pytest.mark.parametrize(
    "error",
    [
        group(DEAD),
        group(DEAD, WorkerLost("worker 1 ended")),
        group(WorkerLost("gone"), WorkerLost("gone")),
        group(WorkerHealthCheckTimeoutError("worker 1")),
        train.ControllerError(ActorDiedError()),  # a worker died while the group started
        ActorDiedError(),
    ],
)
def test_lost_workers_are_no_error_of_the_run(tiny: dict[str, Any], error: Exception) -> None:
    assert error_of_run(error, tiny_config(tiny)) is None


def test_a_loss_is_described_by_the_kinds_of_its_errors() -> None:
    assert describe_loss(group(WorkerLost("gone"), DEAD, WorkerLost("gone"))) == "ActorDiedError, WorkerLost"
    assert describe_loss(train.ControllerError(ActorDiedError())) == "ActorDiedError"
    assert describe_loss(ActorDiedError()) == "ActorDiedError"


def test_a_loss_without_a_dead_process_says_what_happened() -> None:
    """What the controller cannot unpickle counts as a loss of the worker: its name alone would explain nothing."""
    cannot = "Can't get attribute 'HistoryRow' on <module 'aang_ray.store.schema'>"
    sent = RayTaskError("poll_status", "Traceback", AttributeError(cannot))
    for failure in (sent, sent.as_instanceof_cause(), AttributeError(cannot)):
        error = group(DEAD, WorkerHealthCheckFailedError("worker 1", failure))
        assert describe_loss(error) == f"ActorDiedError, AttributeError: {cannot}"


@pytest.mark.parametrize("bug", [WorkerError("ZeroDivisionError: by nothing"), UserError("data: no such file")])
def test_an_exception_of_one_worker_is_the_cause_whatever_it_took_with_it(tiny: dict[str, Any], bug: Exception) -> None:
    assert error_of_run(group(WorkerLost("gone"), DEAD, bug), tiny_config(tiny)) is bug


@pytest.mark.parametrize(
    ("failure", "text"),
    [
        (WorkerGroupStartupTimeoutError(2), "The worker group startup timed out"),
        (WorkerGroupStartupFailedError("a node died"), "a node died"),
        (ValueError("no such strategy"), "no such strategy"),
    ],
)
def test_workers_that_could_not_be_started(tiny: dict[str, Any], failure: Exception, text: str) -> None:
    config = tiny_config(tiny, "resources.workers=2", "resources.gpus_per_worker=0.5")
    error = error_of_run(train.ControllerError(failure), config)
    assert isinstance(error, RunFailure)
    start = "Ray Train could not start or keep 2 workers of 1 CPU and 0.5 GPU each: "
    assert str(error).startswith(f"{start}{type(failure).__name__}: {text}")


def test_ray_train_waits_for_resources_and_retries_a_failed_start_but_no_other_failure(
    tiny: dict[str, Any], tmp_path: Path
) -> None:
    config = tiny_config(tiny, "resources.workers=2")
    trainer = launching._trainer(job_of(config, tmp_path), SendEvaluations(None), str(tmp_path))  # type: ignore[arg-type] # not called here
    failures = trainer.run_config.failure_config
    assert (failures.max_failures, failures.max_preemption_failures) == (0, 0)
    assert failures.controller_failure_limit == ATTEMPTS - 1
    assert launching.SETTINGS["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] == str(PLACEMENT_SECONDS)


def test_a_workers_error_travels_with_its_note() -> None:
    error = WorkerError("ZeroDivisionError: by nothing")
    error.add_note("in worker 1: Traceback")
    back = pickle.loads(pickle.dumps(error))
    assert (str(back), back.__notes__) == (str(error), error.__notes__)


class Rank:
    """Stands for Ray Train's context and functions in worker 1 of 2, and records what is reported."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self.reported: list[dict[str, Any]] = []

    def get_context(self) -> Rank:
        return self

    def get_world_rank(self) -> int:
        return self._rank

    def get_world_size(self) -> int:
        return 2

    def report(self, metrics: dict[str, Any]) -> None:
        self.reported.append(metrics)


def worker(monkeypatch: pytest.MonkeyPatch, rank: int, run_cell: Callable[..., CellRecord]) -> Rank:
    """Run `_train_loop` in this process as if it were one of two workers."""
    context = Rank(rank)
    monkeypatch.setattr(launching, "train", context)
    monkeypatch.setattr(launching, "run_cell", run_cell)
    monkeypatch.setattr(launching.Workers, "connect", lambda rank, size, device: Workers(rank, size))
    return context


def test_a_bug_in_one_of_several_workers_is_raised_with_its_traceback(
    tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_cell(*_: object, **__: object) -> CellRecord:
        raise ZeroDivisionError("by nothing")

    worker(monkeypatch, 1, run_cell)
    with pytest.raises(WorkerError, match="ZeroDivisionError: by nothing") as told:
        launching._train_loop({"job": job_of(tiny_config(tiny), tmp_path)})
    (note,) = told.value.__notes__
    assert note.startswith("in worker 1:\nTraceback")
    assert note.endswith("ZeroDivisionError: by nothing\n")


@pytest.mark.parametrize("rank", [0, 1])
def test_every_worker_reports_each_evaluation_and_the_first_one_says_what_it_was(
    tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    def run_cell(*_: object, on_evaluation: OnEvaluation, workers: Workers, **__: object) -> CellRecord:
        assert (workers.rank, workers.size) == (rank, 2)
        on_evaluation(history_row(30), None)
        raise Interrupted("stopped after step 30")

    context = worker(monkeypatch, rank, run_cell)
    assert launching._train_loop({"job": job_of(tiny_config(tiny), tmp_path)}) == "stopped after step 30"
    assert context.reported == ([{"evaluation": (history_row(30), None)}] if rank == 0 else [{}])


class Sent(Channel):
    """A channel that records what is sent."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def send(self, event: Event) -> None:
        self.events.append(event)


def test_the_first_workers_evaluation_goes_over_the_channel() -> None:
    channel = Sent()
    SendEvaluations(channel).after_report(None, [{"evaluation": (history_row(30), None)}, {}], None)
    assert channel.events == [(history_row(30), None)]


class Batches:
    """Stands for a Ray queue that holds rows."""

    def __init__(self, *rows: Event) -> None:
        self.rows = list(rows)

    def size(self) -> int:
        return len(self.rows)

    def get_nowait_batch(self, count: int) -> list[Event]:
        taken, self.rows = self.rows[:count], self.rows[count:]
        return taken


def test_a_channel_yields_what_was_sent_before_the_work_ended() -> None:
    queue = Batches(history_row(10))
    states = iter([False, True])

    def finished() -> bool:
        queue.rows += [history_row(20)]
        return next(states)

    assert list(Channel(queue).receive(finished, pause=0.0)) == [history_row(step) for step in (10, 20, 20)]


class Lives:
    """Simulates successive worker groups: each reaches a step, then is lost or ends with a record."""

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
    monkeypatch.setattr(launching, "_train_group", lives)
    assert launch(config, checkpoints=str(tmp_path), on_evaluation=print) is record
    assert lives.left == 0


def test_a_run_that_does_not_get_on_is_given_up(
    tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(tiny, "resources.workers=2")
    lives = Lives(tmp_path, config.cell, 3, *[3] * ATTEMPTS)
    monkeypatch.setattr(launching, "_train_group", lives)
    with pytest.raises(RunFailure, match=f"workers were lost {ATTEMPTS} times in a row without a newer checkpoint"):
        launch(config, checkpoints=str(tmp_path), on_evaluation=print)
    assert lives.left == 1, "the first life got to step 3 and counts as the first of those in a row"


def test_one_worker_runs_in_this_process(tiny: dict[str, Any], tmp_path: Path) -> None:
    config = tiny_config(tiny, *STEPS)
    heard: list[tuple[int, int]] = []

    def hear(row: HistoryRow, _: object) -> None:
        heard.append((row.step, threading.get_ident()))

    record = launch(config, checkpoints=str(tmp_path), on_evaluation=hear)
    assert heard == [(4, threading.get_ident()), (8, threading.get_ident())]
    assert numbers(record) == numbers(run_cell(config))


def test_an_abandoned_run_writes_its_checkpoint_first(tiny: dict[str, Any], tmp_path: Path) -> None:
    config = tiny_config(tiny, "schedule.steps=10000000", "schedule.eval_every=4")
    evaluated: list[int] = []

    def hear(row: HistoryRow, _: object) -> None:
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

    def drain(row: HistoryRow, _: object) -> None:
        control.draining = True

    monkeypatch.setattr(CheckpointFiles, "save", recorded)
    record = run_cell(config, checkpoints=tmp_path, on_evaluation=drain, control=control)
    assert saved == [4]
    assert numbers(record) == numbers(run_cell(config))
