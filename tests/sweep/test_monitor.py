"""What the driver makes of the events of Tune's trials."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from aang_ray.config import parse_config
from aang_ray.store import Store
from aang_ray.sweep import monitor as module
from aang_ray.sweep.feeder import Feeder
from aang_ray.sweep.jobs import End, Grid, Job
from aang_ray.sweep.monitor import Monitor
from aang_ray.sweep.plan import PlannedCell
from aang_ray.sweep.progress import SweepProgress
from aang_ray.sweep.queue import RETRIES, Queue
from tests.sweep.conftest import done_record, fake_resolve

DIED = "ray.exceptions.ActorDiedError: The actor died unexpectedly"


class Told(Grid):
    """A grid that keeps how its jobs ended."""

    def __init__(self, cells: list[PlannedCell]) -> None:
        super().__init__(cells)
        self.ends: list[End] = []

    def ended(self, job: Job, end: End) -> None:
        self.ends.append(end)


@dataclass
class Trial:
    """As much of one as a monitor sees."""

    trial_id: str
    error_file: str | None = None
    temporary_state: Any = field(
        default_factory=lambda: SimpleNamespace(
            ray_actor=SimpleNamespace(_actor_id=SimpleNamespace(hex=lambda: "0123"))
        )
    )


class Sweep:
    """Tune's part, played by a test."""

    def __init__(self, store: Path, methods: tuple[str, ...] = ("finetune",)) -> None:
        configs = [fake_resolve(parse_config({"method": method}, "test")) for method in methods]
        self.cells = [PlannedCell(config, config.cell, "waiting") for config in configs]
        self.store = Store(store)
        self.grid = Told(self.cells)
        self.queue = Queue(self.grid, lambda need: 9)
        self.feeder = Feeder(self.queue, lambda job: {"cell": job.cell.cell})
        self.stream = io.StringIO()
        progress = SweepProgress(self.cells, Console(file=self.stream, width=300))
        self.monitor = Monitor(self.queue, self.feeder.jobs, self.store, progress)
        self._started = 0

    def start(self) -> Trial:
        self._started += 1
        trial = Trial(f"trial-{self._started}")
        assert isinstance(self.feeder.suggest(trial.trial_id), dict)
        self.monitor.on_trial_start(0, [], trial)
        return trial

    def result(self, trial: Trial, **result: Any) -> None:
        self.monitor.on_trial_result(0, [], trial, result)

    def complete(self, trial: Trial) -> None:
        self.monitor.on_trial_complete(0, [], trial)

    def die(self, trial: Trial) -> None:
        file = Path(self.store.uri).parent / "error.txt"
        file.write_text(DIED, encoding="utf-8")
        trial.error_file = str(file)
        self.monitor.on_trial_error(0, [], trial)

    @property
    def lines(self) -> list[str]:
        return self.stream.getvalue().splitlines()


@pytest.fixture(autouse=True)
def log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "last_lines", lambda actor: [f"last words of {actor}"])


DONE = {"status": "done", "dev": 0.75, "test": 0.5, "metric": "accuracy", "seconds": 3, "error": None}


def test_a_cell_that_is_done(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path)
    trial = sweep.start()
    sweep.result(trial, step=30, steps=60)
    sweep.result(trial, **DONE)
    sweep.result(trial, **DONE)  # Tune repeats it
    assert sweep.grid.ends == [], "its place is free when its trial has ended"
    sweep.complete(trial)
    assert sweep.grid.ends == [End("done", 0.75)]
    assert sweep.queue.finished
    assert sweep.monitor.ended == {sweep.cells[0].cell: "done"}
    assert sweep.lines == ["[1/1] movie · finetune · seed 0 · dev 75.00 · test 50.00 accuracy · 3 s"]
    assert sweep.feeder.suggest("trial-9") == Feeder.FINISHED


def test_a_cell_that_goes_on_says_from_where(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path)
    sweep.result(sweep.start(), resumed=20, step=20, steps=60)
    assert sweep.lines == ["movie · finetune · seed 0 · goes on from step 20"]


def test_a_failed_cell_is_no_lost_trial(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path)
    trial = sweep.start()
    sweep.result(trial, status="failed", error="loss is nan")
    sweep.complete(trial)
    assert sweep.queue.finished
    assert sweep.monitor.errors == {sweep.cells[0].cell: "loss is nan"}


def test_a_lost_trial_is_tried_again_and_then_is_a_failed_row(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, ("finetune", "static"))
    for time in range(RETRIES):
        sweep.die(sweep.start())
        assert f"tried again, {time + 1} of {RETRIES} times" in sweep.lines[-1]
    assert sweep.store.done() == {}
    sweep.die(sweep.start())
    cell = sweep.cells[0].cell
    row = sweep.store.record(cell).result
    assert row.status == "failed"
    assert row.error is not None
    assert "out of memory?" in row.error
    assert "it was tried 4 times" in row.error
    assert row.log_tail == f"{DIED}\nlast words of 0123"
    assert sweep.monitor.errors == {cell: row.error}
    other = sweep.start()
    assert sweep.feeder.jobs[other.trial_id].cell == sweep.cells[1], "the sweep goes on"


def test_a_trial_that_died_after_its_row_is_done(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path)
    trial = sweep.start()
    sweep.store.write(done_record(sweep.cells[0].config))
    sweep.die(trial)
    assert sweep.queue.finished
    assert sweep.grid.ends == [End("elsewhere", 0.75)]
    assert sweep.lines == ["[1/1] movie · finetune · seed 0 · done already, by another process"]


def test_a_trial_that_died_after_its_last_word_is_not_tried_again(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path)
    trial = sweep.start()
    sweep.result(trial, status="failed", error="loss is nan")
    sweep.die(trial)
    assert sweep.queue.finished
    assert sweep.grid.ends == [End("failed", None)]


def test_a_trial_that_was_ended_without_a_word_is_nothing(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path)
    sweep.complete(sweep.start())
    assert sweep.monitor.ended == {}
    assert sweep.grid.ends == []


def test_a_stopped_cell_goes_on_another_time(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path)
    trial = sweep.start()
    sweep.queue.close()
    sweep.result(trial, status="stopped")
    assert (sweep.queue.finished, sweep.monitor.alive) == (False, 1), "its trial has not ended yet"
    sweep.complete(trial)
    assert sweep.monitor.alive == 0
    assert sweep.queue.finished
    assert (sweep.monitor.ended, sweep.grid.ends) == ({}, [])
    assert sweep.lines == ["movie · finetune · seed 0 · stopped, its checkpoint is written"]


def test_a_paused_cell_is_told_and_has_not_ended(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path)
    trial = sweep.start()
    sweep.result(trial, status="cut", step=30, dev=0.6)
    sweep.complete(trial)
    assert sweep.grid.ends == [End("cut", 0.6)]
    assert sweep.lines == ["movie · finetune · seed 0 · paused after step 30 · dev 60.00 so far"]
