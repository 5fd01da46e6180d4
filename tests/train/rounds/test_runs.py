"""Whole runs of methods with rounds: when dev is scored, what is counted, and resuming after a stop."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from aang_ray.errors import UserError
from aang_ray.gradients import engine as memory
from aang_ray.store.schema import HistoryRow
from aang_ray.train.checkpoint import CheckpointFiles
from aang_ray.train.run import run_cell
from tests.train.rounds.running import config_of, rounds, take
from tests.train.running import tiny_config
from tests.train.test_checkpoint import assert_identical, last_state, numbers

METHODS = {"alphavil": "alphavil, round_steps: 2, alpha_lr: 0.5", "diw": "diw, round_steps: 2, tries: 2"}


@pytest.mark.parametrize("method", METHODS)
def test_stopped_after_any_step_it_ends_with_the_same_numbers(
    tiny: dict[str, Any], method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With dropout; stops within a task, between tasks, at the end of a round, within a try."""
    config = config_of(tiny, METHODS[method], "schedule.steps=17", "resources.checkpoint_minutes=0")
    taken, save = tmp_path / "snapshots", CheckpointFiles.save

    def recorded(self: CheckpointFiles, step: int, *arguments: Any) -> str:
        path = save(self, step, *arguments)
        copy = taken / str(step) / Path(path).parent.name
        if not copy.exists():
            shutil.copytree(Path(path).parent, copy)
        return path

    monkeypatch.setattr(CheckpointFiles, "save", recorded)
    plain = run_cell(config)
    whole = run_cell(config, checkpoints=tmp_path / "whole")
    assert numbers(whole) == numbers(plain)
    steps = plain.result.steps
    expected = last_state(tmp_path / "whole", config)
    for step in (1, 5, 7, 13, steps):
        folder = taken / str(step)
        if step < steps:  # the state after a last step holds what is of no more use
            assert numbers(run_cell(config, checkpoints=folder)) == numbers(plain), step
            found = last_state(folder, config)
            for part in ("body", "heads", "method"):
                assert_identical(found["stepper"][part], expected["stepper"][part], part)
        else:
            assert numbers(run_cell(config, checkpoints=folder)) == numbers(plain)


def test_dev_is_scored_at_the_ends_of_whole_rounds_and_all_is_counted(tiny: dict[str, Any]) -> None:
    """Three tasks of two steps: rounds of six, of which 20 steps hold three; 2 x 16 end-task examples a round."""
    seen: list[HistoryRow] = []
    record = run_cell(
        config_of(tiny, METHODS["alphavil"], "schedule.steps=20"), on_evaluation=lambda row, _: seen.append(row)
    )
    assert [(row.step, row.examples) for row in seen] == [(6, 32), (12, 64), (18, 96)]
    assert (record.result.steps, record.result.examples) == (18, 96)
    assert all(len(row.losses) == 3 for row in seen)
    assert [row.step for row in record.weights] == [6, 12, 18]
    best = max(seen, key=lambda row: row.dev.accuracy if row.dev else 0.0)
    assert (record.result.best_step, record.result.dev) == (best.step, best.dev)
    assert record.result.row == "alphavil-td n=2"


def test_a_round_is_an_epoch_of_every_task(tiny: dict[str, Any]) -> None:
    """80 train texts in batches of 16 and of 24, alone: 5 and ceil(80 / 24) = 4 steps; a quarter: 2 and 1."""
    whole, quarter = config_of(tiny, "alphavil"), config_of(tiny, "diw, round_fraction: 0.25")
    assert rounds(whole).task_steps == (5, 4, 4)
    assert (rounds(quarter).task_steps, rounds(quarter).try_steps) == ((2, 1, 1), 2)
    short = rounds(config_of(tiny, "alphavil", "schedule.steps=8"))
    assert (short.task_steps, short.round_steps) == ((3, 2, 2), 7)


def test_a_task_alone_reads_every_text_once_an_epoch(tiny: dict[str, Any]) -> None:
    """80 texts: five batches of 16 of the end task; of an objective ten batches of 24 are three epochs."""
    made = rounds(config_of(tiny, "alphavil"))
    schedule = made.setup.domain.source.schedule  # type: ignore[attr-defined]
    end_task = [int(i) for number in range(10) for i in schedule.end_task(number)]
    assert sorted(end_task[:80]) == sorted(end_task[80:]) == [*range(80)]
    assert end_task[:80] != end_task[80:]
    read = [int(i) for number in range(10) for i in schedule.shares_of(number, made.objectives[:1])[0].examples]
    assert [sorted(read[start : start + 80]) for start in (0, 80, 160)] == [[*range(80)]] * 3
    source = made.setup.domain.source
    segments = [source.batch_of(0, not own, own).segments for own in ((), made.objectives[:1])]
    assert [[segment.examples for segment in of_task] for of_task in segments] == [[0, 16], [0, 0, 24]]


def test_updates_that_do_not_fit_are_one_line(tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    made = rounds(config_of(tiny, METHODS["alphavil"]))
    monkeypatch.setattr(memory, "free_memory", lambda _: 10)
    take(made, 1)
    with pytest.raises(UserError, match=r"6 gradients of \d+ parameters need \d+ bytes.*lower n or encoder.layers"):
        take(made, 2, first=1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("schedule.steps=2",), "schedule.steps: 2 is less than one step for each of the 3 parts of a round"),
        (("objectives.allocation=published",), "published does not go with alphavil; use equal"),
        (("resources.optimizer_state=sharded",), "sharded does not go with alphavil; use replicated"),
    ],
)
def test_what_does_not_go_is_one_line(tiny: dict[str, Any], settings: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run_cell(config_of(tiny, METHODS["alphavil"], *settings))


@pytest.mark.parametrize(
    "method", ["{name: alphavil, round_steps: 3, alpha_lr: 0.005}", "{name: diw, round_steps: 3}", "attittud"]
)
def test_images_too(method: str) -> None:
    """Superimposed digits under SGD, as in the paper's table."""
    settings = {
        "data": {"task": "digits-left"},
        "encoder": {"name": "lenet"},
        "space": "digits",
        "n": "all",
        "batch": {"end_task": 32, "auxiliary": 32},
        "schedule": {"steps": 30, "eval_every": 10},
        "optim": {"algorithm": "sgd", "body_lr": 0.05, "head_lr": 0.05},
    }
    record = run_cell(tiny_config(settings, f"method={method}"))
    assert record.result.status == "done", record.result.error
    assert record.history[-1].losses["end-task"] < 2.4
    assert record.weights
