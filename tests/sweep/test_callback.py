"""How the driver's callback handles the events of Tune's trials."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from aang_ray.config import parse_config
from aang_ray.store import Store
from aang_ray.sweep import tune as module
from aang_ray.sweep.plan import PlannedCell
from aang_ray.sweep.progress import SweepProgress
from aang_ray.sweep.tune import CRASHED, RETRIES, SweepCallback, describe_crash, describe_end
from tests.sweep.conftest import done_record, fake_resolve

DIED = "ray.exceptions.ActorDiedError: The actor died unexpectedly"


@dataclass
class Trial:
    """The attributes of a Tune trial that the callback uses."""

    trial_id: str
    config: dict[str, Any]
    error_file: str | None = None
    num_failures: int = 0
    results: list[dict[str, Any]] = field(default_factory=list)


class Sweep:
    """Plays Tune's part in a test."""

    def __init__(self, store: Path, methods: tuple[str, ...] = ("finetune",)) -> None:
        configs = [fake_resolve(parse_config({"method": method}, "test")) for method in methods]
        self.cells = [PlannedCell(config, config.cell, "waiting") for config in configs]
        self.store = Store(store)
        self.stream = io.StringIO()
        self._progress = SweepProgress(self.store.uri, "nightly", "key", Console(file=self.stream, width=300))
        self._progress.add(self.cells)
        self.callback = SweepCallback(self.store, self._progress)
        self.callback.cells = {cell.cell: cell for cell in self.cells}
        self.failed: list[str] = []
        self.callback.failed = self.failed.append

    def start(self, number: int = 0) -> Trial:
        trial = Trial(f"trial-{number}", {"trial": {"cell": self.cells[number].cell}})
        self.callback.on_trial_start(0, [], trial)
        self.result(trial, step=0, actor="0123", hostname="node-a", pid=7)
        return trial

    def result(self, trial: Trial, **result: Any) -> None:
        self.callback.on_trial_result(0, [], trial, result)

    def complete(self, trial: Trial) -> None:
        self.callback.on_trial_complete(0, [], trial)

    def die(self, trial: Trial) -> None:
        """Do what Tune does when a process died: try the trial again, or give it up."""
        trial.num_failures += 1
        file = Path(self.store.uri).parent / "error.txt"
        with file.open("a", encoding="utf-8") as stream:
            stream.write(f"Failure # {trial.num_failures} (occurred at noon)\n{DIED}\n")
        trial.error_file = str(file)
        if trial.num_failures <= RETRIES:
            self.callback.on_trial_recover(0, [], trial)
        else:
            self.callback.on_trial_error(0, [], trial)

    @property
    def ended(self) -> dict[str, str]:
        """Cell -> how its trial ended."""
        return {cell: end["status"] for cell, end in self.callback.ends.items()}

    @property
    def errors(self) -> dict[str, str]:
        """Failed cell -> its error."""
        return {cell: end["error"] for cell, end in self.callback.ends.items() if end["status"] == "failed"}

    @property
    def lines(self) -> list[str]:
        return self.stream.getvalue().splitlines()

    @property
    def progress(self) -> dict[str, Any]:
        """The progress file's entry of the first cell."""
        return vars(self._progress._cells[self.cells[0].cell])


@pytest.fixture(autouse=True)
def log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_last_lines", lambda actor: [f"last words of {actor}"])


DONE = {"status": "done", "dev": 0.75, "test": 0.5, "metric": "accuracy", "seconds": 3, "error": None, "step": 60}


def test_a_cell_that_is_done(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path)
    trial = sweep.start()
    assert sweep.callback.alive == {trial.trial_id}
    found = {"step": 30, "seconds": 2.0, "score": 0.7, "losses": {"end_task": 0.5}}
    sweep.result(trial, **found, end_task_weight=0.6, weights={"a": 0.75, "b": 0.25}, hostname="node-b", pid=8)
    assert sweep.progress["end_task_weights"] == (0.6,)
    assert sweep.progress["weights"] == {"a": 0.75, "b": 0.25}
    assert [sweep.progress[name] for name in ("state", "step", "score", "host", "pid")] == [
        "running",
        30,
        0.7,
        "node-b",
        8,
    ]
    sweep.result(trial, **DONE)
    sweep.complete(trial)
    assert sweep.callback.alive == set()
    assert sweep.ended == {sweep.cells[0].cell: "done"}
    assert sweep.lines == ["[1/1] movie · finetune · seed 0 · dev 75.00 · test 50.00 accuracy · 3 s"]
    assert sweep.progress["state"] == "ended"


def test_a_cell_that_continues_is_announced_with_its_step(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path)
    sweep.result(sweep.start(), resumed=True, step=20)
    assert sweep.lines == ["movie · finetune · seed 0 · continues from step 20"]


def test_a_failed_cell_is_no_lost_trial(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path)
    trial = sweep.start()
    sweep.result(trial, status="failed", error="loss is nan")
    sweep.complete(trial)
    assert sweep.errors == {sweep.cells[0].cell: "loss is nan"}
    assert sweep.callback.losses == 0


def test_a_lost_trial_is_tried_again_and_then_is_a_failed_row(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path / "store", ("finetune", "static"))
    trial = sweep.start()
    for time in range(RETRIES):
        sweep.die(trial)
        assert sweep.lines[-1].startswith(f"lost: movie · finetune · seed 0 · {CRASHED}")
        assert f"tried again, {time + 1} of {RETRIES} times" in sweep.lines[-1]
        assert (sweep.callback.alive, sweep.progress["state"]) == (set(), "waiting")
        sweep.callback.on_trial_start(0, [], trial)
    assert sweep.store.done() == {}
    sweep.die(trial)
    cell = sweep.cells[0].cell
    row = sweep.store.record(cell).result
    assert row.status == "failed"
    assert row.error is not None
    assert "out of memory?" in row.error
    assert "it was tried 4 times" in row.error
    assert row.log_tail == f"last words of 0123\nFailure # 4 (occurred at noon)\n{DIED}"
    assert sweep.errors == {cell: row.error}
    assert sweep.callback.losses == RETRIES + 1
    assert sweep.failed == [cell]


def test_a_trial_given_to_a_process_that_had_just_died_waits_for_another_start(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path / "store")
    trial = Trial("trial-0", {"trial": {"cell": sweep.cells[0].cell}}, num_failures=1)
    sweep.callback.on_trial_error(0, [], trial)
    assert (sweep.store.done(), sweep.ended, sweep.failed) == ({}, {}, [])
    assert (sweep.callback.losses, sweep.progress["state"]) == (1, "waiting")
    assert sweep.lines == [
        "lost: movie · finetune · seed 0 · the process that it was given had died · the same command runs it again"
    ]


def test_a_machine_whose_end_was_announced_does_not_count(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path)
    trial = sweep.start()
    sweep.callback.on_trial_recover(0, [], trial)
    assert sweep.lines[-1].endswith("tried again")


def test_a_trial_that_died_after_its_row_is_done(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path / "store")
    trial = sweep.start()
    sweep.store.write(done_record(sweep.cells[0].config))
    trial.num_failures = RETRIES
    sweep.die(trial)
    assert sweep.ended == {sweep.cells[0].cell: "elsewhere"}
    assert sweep.failed == []
    assert sweep.lines == ["[1/1] movie · finetune · seed 0 · done already, by another process"]


def test_a_trial_that_died_after_its_last_report_keeps_its_end(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path / "store")
    trial = sweep.start()
    sweep.result(trial, status="failed", error="loss is nan")
    trial.num_failures = RETRIES
    sweep.die(trial)
    assert sweep.ended == {sweep.cells[0].cell: "failed"}
    assert sweep.errors == {sweep.cells[0].cell: "loss is nan"}


def test_a_trial_that_was_ended_without_a_report_has_no_end(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path)
    sweep.complete(sweep.start())
    assert sweep.ended == {}


def test_a_stopped_cell_goes_on_another_time(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path)
    trial = sweep.start()
    sweep.result(trial, status="stopped")
    assert sweep.callback.alive, "its trial has not ended yet"
    sweep.complete(trial)
    assert (sweep.callback.alive, sweep.ended) == (set(), {})
    assert sweep.lines == ["movie · finetune · seed 0 · stopped, its checkpoint is written"]
    assert sweep.progress["state"] == "stopped"


def test_a_trial_that_came_too_late_to_start_is_not_mentioned(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path)
    trial = sweep.start()
    sweep.result(trial, status="not started")
    sweep.complete(trial)
    assert (sweep.lines, sweep.ended, sweep.progress["state"]) == ([], {}, "waiting")


def test_a_run_that_the_scheduler_ends_at_a_rung_was_cut_short(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path)
    trial = sweep.start()
    sweep.result(trial, rung=0.5, step=30, dev=0.6)
    assert sweep.ended == {}, "it may go on"
    sweep.complete(trial)
    assert sweep.ended == {sweep.cells[0].cell: "cut"}
    assert sweep.lines == ["[1/1] movie · finetune · seed 0 · cut short after step 30 · dev 60.00 so far"]


def test_ends_in_words() -> None:
    done = {"status": "done", "dev": 0.5, "test": 0.25, "metric": "macro_f1", "seconds": 61, "majority": True}
    assert describe_end(done) == "dev 50.00 · test 25.00 macro_f1 · 1 min 01 s · stayed at the majority class"
    assert describe_end({"status": "failed", "error": "out of memory"}) == "FAILED: out of memory"
    paused = {"status": "cut", "step": 40, "dev": 0.5}
    assert describe_end(paused) == "cut short after step 40 · dev 50.00 so far"
    assert describe_end({"status": "cut", "step": 4}) == "cut short after step 4 · no dev score yet"
    assert describe_end({"status": "elsewhere"}) == "done already, by another process"


def test_crashes_in_words() -> None:
    assert describe_crash("ray.exceptions.ActorDiedError: The actor died unexpectedly") == CRASHED
    assert (
        describe_crash("trace\nModuleNotFoundError: No module\n")
        == "the trial could not run: ModuleNotFoundError: No module"
    )
    assert describe_crash("") == "the trial could not run: Ray gave no reason"
