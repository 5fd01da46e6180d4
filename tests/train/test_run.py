"""Whole runs end, are deterministic, and fail with an error of one line."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from aang_ray.store.schema import CellRecord, HistoryRow
from aang_ray.train import evaluate, loop
from aang_ray.train.record import Heartbeat
from aang_ray.train.run import run_cell
from tests.train.running import tiny_config


def comparable(record: CellRecord) -> tuple[Any, ...]:
    """A record without its times."""
    history = [(row.step, row.dev, row.losses, row.examples, row.tokens) for row in record.history]
    return history, record.weights, record.result.test, record.result.best_step


@pytest.mark.parametrize("method", ["finetune", "static", "aang"])
def test_a_run_leaves_all_rows_and_is_deterministic(tiny: dict[str, Any], method: str) -> None:
    config = tiny_config(tiny, f"method={method}")
    seen: list[HistoryRow] = []
    record = run_cell(config, on_evaluation=lambda row, _: seen.append(row))
    row = record.result
    assert row.status == "done", row.error
    assert (row.cell, row.seed, row.steps, row.examples) == (config.cell, 0, 20, 20 * 16)
    assert [h.step for h in record.history] == [10, 20] == [h.step for h in seen]
    assert row.dev is not None
    assert row.test is not None
    assert row.test.examples == 40
    assert row.dev == record.history[[10, 20].index(row.best_step or 0)].dev
    assert (len(record.weights) > 0) == (method != "finetune")
    torch.randn(100)  # somebody else's draws do not matter
    assert comparable(run_cell(config)) == comparable(record)
    assert comparable(run_cell(tiny_config(tiny, f"method={method}", "seed=1"))) != comparable(record)


def test_signs_of_life_carry_step_and_loss(tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "BEAT_SECONDS", 0.0)
    beats: list[Heartbeat] = []
    record = run_cell(tiny_config(tiny, "method=finetune"), on_beat=beats.append)
    assert [beat.step for beat in beats] == list(range(1, 21))
    assert [beat.seconds for beat in beats] == sorted(beat.seconds for beat in beats)
    losses = [beat.loss for beat in beats if beat.loss is not None]
    first = record.history[0].losses
    assert sum(losses[:10]) / 10 == pytest.approx(next(iter(first.values())))


def test_learning_happens(tiny: dict[str, Any]) -> None:
    record = run_cell(tiny_config(tiny, "method=finetune", "schedule.steps=60"))
    assert record.result.test is not None
    assert record.result.test.accuracy >= 0.9
    assert record.result.majority is False


def test_test_is_scored_once_from_the_kept_checkpoint(tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    original = evaluate.SplitReader.predict

    def counted(self: evaluate.SplitReader, *args: Any) -> evaluate.Predictions:
        predictions = original(self, *args)
        calls.append(len(predictions.labels_E))
        return predictions

    monkeypatch.setattr(evaluate.SplitReader, "predict", counted)
    tiny = {**tiny, "schedule": {"steps": 40, "eval_every": 10}}
    record = run_cell(tiny_config(tiny, "method=finetune", "optim.body_lr=5e-3"))
    assert record.result.status == "done"
    assert len(calls) == 5  # four evaluations of dev, one of test


def test_early_stopping_keeps_the_first_of_ties(tiny: dict[str, Any]) -> None:
    # Rates so small that dev never changes: the first evaluation stays the best, two more without
    # improvement end the run.
    config = tiny_config(
        tiny,
        "method=finetune",
        "optim.body_lr=1e-12",
        "optim.head_lr=1e-12",
        "schedule.steps=100",
        "schedule.patience=2",
    )
    row = run_cell(config).result
    assert (row.best_step, row.steps) == (10, 30)


def test_a_run_at_the_majority_class_says_so(tiny: dict[str, Any]) -> None:
    config = tiny_config(tiny, "method=finetune", "optim.body_lr=1e-12", "optim.head_lr=1e-12")
    scores = run_cell(config).result
    assert scores.dev is not None
    assert scores.majority == (scores.dev.accuracy <= 0.5)


def test_a_loss_that_is_not_finite_is_a_failed_row(tiny: dict[str, Any]) -> None:
    row = run_cell(tiny_config(tiny, "method=static", "optim.body_lr=1e30")).result
    assert row.status == "failed"
    assert row.error is not None
    assert "step " in row.error
    assert "the loss of " in row.error
    assert "last finite loss was" in row.error
    assert "lower optim.body_lr" in row.error
    assert row.test is None


def test_memory_that_runs_out_with_a_stated_size_is_a_failed_row(
    tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from aang_ray.train import text

    def exhausted(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(text, "segment_losses", exhausted)
    row = run_cell(tiny_config(tiny, "method=finetune", "batch.micro=8")).result
    assert row.status == "failed"
    assert "lower batch.micro" in str(row.error)


@pytest.mark.parametrize(
    "switch",
    [
        "objectives.legality=published",
        "objectives.allocation=published",
        "objectives.visibility=published",
        "objectives.labels=published",
        "objectives.heads=per_objective",
        "optim.clipping=published",
        "method.dev_sample=published",
        "method.auxiliary_score=published",
        "method.dev_head=live",
        "method.score=dot",
        "method.jacobian=softmax",
        "method.head_refit_every=3",
        "method.meta_dev_fraction=0.5",
        "data.class_weights=balanced",
        "n=all",
        "space=td_ed",
        "precision=bf16",
        "encoder.pooling=first",
        "gradients.tied_in_scores=true",
        "gradients.engine=loop",
    ],
)
def test_every_switch_runs_and_changes_the_cell(tiny: dict[str, Any], switch: str) -> None:
    plain, config = tiny_config(tiny, "schedule.steps=4"), tiny_config(tiny, "schedule.steps=4", switch)
    assert config.cell != plain.cell
    record = run_cell(config)
    assert record.result.status == "done", record.result.error
    weights = record.weights[-1]
    if "allocation=published" not in switch:
        assert sum(weights.weights.values()) == pytest.approx(1.0)
    assert any(value != 0 for letter in weights.factors.values() for value in letter.values())
