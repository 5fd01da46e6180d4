"""The exit code and printed summary of a sweep, and the status of a single run."""

from __future__ import annotations

import io
import time
from pathlib import Path

import pytest
from rich.console import Console

from aang_ray.config import RunConfig, parse_config
from aang_ray.store import CellRecord, Store
from aang_ray.sweep.command import SweepOutcome, outcome_of, report, train_once
from aang_ray.sweep.plan import PlannedCell, State
from aang_ray.sweep.status import SweepStatus, read_status
from aang_ray.train.record import OnEvaluation
from tests.sweep.conftest import done_record, fake_resolve, history_row


def cell(seed: int, state: State = "waiting") -> PlannedCell:
    config = fake_resolve(parse_config({"method": "finetune", "seed": seed}, "test"))
    return PlannedCell(config, config.cell, state)


def ends(**status: str) -> dict[str, dict[str, str]]:
    """Ends of the cells of seeds, as in `s0="done"`."""
    return {cell(int(name[1:])).cell: {"status": state, "error": "out of memory"} for name, state in status.items()}


def said(outcome: SweepOutcome, max_hours: float | None = None) -> str:
    console = Console(file=io.StringIO(), width=200)
    report(outcome, console, max_hours)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_all_done() -> None:
    outcome = outcome_of([cell(0, "done"), cell(1), cell(2)], ends(s1="done", s2="elsewhere"))
    assert (outcome.done, outcome.remaining, outcome.exit_code, said(outcome)) == (3, 0, 0, "")


def test_a_failed_cell_is_named_and_counts() -> None:
    outcome = outcome_of([cell(0), cell(1)], ends(s0="done", s1="failed"))
    assert (outcome.remaining, outcome.exit_code) == (0, 1)
    first, second = said(outcome).splitlines()
    assert first == "failed: movie · finetune · seed 1: out of memory"
    assert "`aang show CELL`" in second


def test_a_failed_row_that_was_kept_is_named_and_one_that_ran_again_is_not() -> None:
    outcome = outcome_of([cell(0, "failed"), cell(1, "failed")], ends(s1="done"))
    assert outcome.failed == {"movie · finetune · seed 0": "failed before (kept)"}
    assert outcome.exit_code == 1


def test_what_is_over_time_remains() -> None:
    outcome = outcome_of([cell(0), cell(1), cell(2)], ends(s0="done"))
    assert (outcome.remaining, outcome.exit_code) == (2, 1)
    assert said(outcome, 0.5) == "--max-hours 0.5 is over: 2 cells remain; run the same command again to continue\n"


def test_cut_short_on_purpose_is_no_failure_but_said() -> None:
    cells, ended = [cell(0), cell(1, "cut")], ends(s0="done", s1="cut")
    scheduled = outcome_of(cells, ended, scheduled=True)
    assert (scheduled.cut, scheduled.remaining, scheduled.exit_code) == (1, 0, 0)
    assert said(scheduled).startswith("1 cells were cut short by asha and have no test score")
    full = outcome_of(cells, ended)
    assert (full.cut, full.remaining, full.exit_code) == (0, 1, 1)


def test_a_cell_that_an_earlier_start_cut_and_that_had_no_turn_remains() -> None:
    outcome = outcome_of([cell(0), cell(1, "cut")], ends(s0="done"), scheduled=True)
    assert (outcome.cut, outcome.remaining, outcome.exit_code) == (0, 1, 1)


def test_configurations_that_were_not_asked_for_remain() -> None:
    outcome = outcome_of([cell(0)], ends(s0="done"), to_come=4)
    assert (outcome.cells, outcome.remaining, outcome.exit_code) == (5, 4, 1)


def test_a_single_run_has_a_status_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, config = Store(tmp_path), cell(0).config
    during: list[SweepStatus] = []

    def run_cell(config: RunConfig, *, on_evaluation: OnEvaluation, **_: object) -> CellRecord:
        on_evaluation(history_row(30), None)
        deadline = time.monotonic() + 20
        while not (during and during[-1].cells[0].progress.step) and time.monotonic() < deadline:
            during.append(read_status(store))
        return done_record(config)

    monkeypatch.setattr("aang_ray.sweep.progress.QUICKEST_SECONDS", 0.01)
    monkeypatch.setattr("aang_ray.train.plan.resolve", fake_resolve)
    monkeypatch.setattr("aang_ray.train.check.check_runs", lambda *_, **__: [])
    monkeypatch.setattr("aang_ray.train.run.run_cell", run_cell)
    train_once(config, store, Console(file=io.StringIO()))
    (running,) = during[-1].cells
    assert (during[-1].file.name, running.state, running.progress.step, running.progress.score) == (
        "train",
        "running",
        30,
        0.75,
    )
    after = read_status(store)
    assert ([one.state for one in after.cells], after.alive) == (["done"], False)
