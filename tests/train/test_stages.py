"""Runs of several stages: masked-LM pretraining before, fine-tuning at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from aang_ray.config.run import RunConfig
from aang_ray.errors import UserError
from aang_ray.store import HistoryRow, Store
from aang_ray.train.checkpoint import CheckpointFiles
from aang_ray.train.device import choose_compute
from aang_ray.train.loop import Trainer
from aang_ray.train.run import run_cell
from aang_ray.train.setup import build, setup_of_stage, stages_of
from tests.train.running import tiny_config
from tests.train.test_checkpoint import assert_identical, last_state, numbers, snapshots  # noqa: F401

TAPT = ["method.name=tapt", "method.tapt_steps=4", "method.batch=8", "schedule.steps=5", "schedule.eval_every=2"]
BOTH = ["method.name=tapt_dapt", "method.dapt_steps=2", "method.tapt_steps=3", "method.batch=8", *TAPT[3:]]
FINAL = ["method=static", "schedule.steps=4", "schedule.eval_every=2", "final_finetune.steps=3"]


def test_the_masked_lm_stage_sees_no_label(tiny: dict[str, Any]) -> None:
    """The stage changes the body and the masked-LM head, but not the end-task head."""
    config = tiny_config(tiny, *TAPT)
    trainer = Trainer(build(config, choose_compute(config)))
    setup = trainer.setup
    before = {name: value.clone() for name, value in setup.heads.state_dict().items()}
    body = {name: value.clone() for name, value in setup.encoder.state_dict().items()}
    prepared = trainer.stepper.prepare(0)
    assert [segment.examples for segment in prepared.batch.segments] == [0, 0, 8]
    trainer.stepper.step(prepared)
    moved = {name.split(".")[0] for name, value in setup.heads.state_dict().items() if not value.equal(before[name])}
    named = dict(zip(setup.head_of, "0123456789", strict=False))
    assert moved == {named["denoise"]}
    assert any(not value.equal(body[name]) for name, value in setup.encoder.state_dict().items())


def test_stages_and_their_rates(tiny: dict[str, Any]) -> None:
    config = tiny_config(tiny, *BOTH, "method.lr=3e-4", "method.mask_rate=0.3", "optim.body_lr=2e-5")
    stages = stages_of(config)
    assert [(s.name, s.config.schedule.steps, s.decides) for s in stages] == [
        ("dapt", 2, False),
        ("tapt", 3, False),
        ("train", 5, True),
    ]
    assert [s.config.optim.body_lr for s in stages] == [3e-4, 3e-4, 2e-5]
    assert [s.config.optim.head_lr for s in stages] == [3e-4, 3e-4, config.optim.head_lr]
    assert stages[0].config.objectives.mask_rate == 0.3
    assert config.total_steps == 10
    setup = build(config, choose_compute(config))
    spaces = [setup_of_stage(setup, stage.config).space for stage in stages]
    assert [None if s is None else [k.data for k in s.objectives] for s in spaces] == [
        ["in-domain"],
        ["end-task"],
        None,
    ]


def test_rows_of_a_run_with_pretraining(tiny: dict[str, Any]) -> None:
    record = run_cell(tiny_config(tiny, *BOTH))
    rows = [(row.step, row.stage, row.dev is None, row.examples) for row in record.history]
    assert rows == [
        (2, "dapt", True, 0),
        (4, "tapt", True, 0),
        (5, "tapt", True, 0),
        (7, "train", False, 2 * 16),
        (9, "train", False, 4 * 16),
        (10, "train", False, 5 * 16),
    ]
    assert all(list(row.losses) != ["end-task"] and len(row.losses) == 1 for row in record.history[:3])
    assert all(list(row.losses) == ["end-task"] for row in record.history[3:])
    result = record.result
    assert (result.row, result.steps, result.examples, result.space) == ("tapt_dapt", 10, 80, None)
    assert result.tokens == record.history[-1].tokens > record.history[2].tokens > 0
    assert result.dev_before is None


def test_pretraining_learns_its_objective(tiny: dict[str, Any]) -> None:
    settings = ["method.name=tapt", "method.tapt_steps=60", "method.lr=1e-2", "method.batch=64", "schedule.steps=1"]
    history = run_cell(tiny_config(tiny, *settings, "schedule.eval_every=15")).history
    losses = [next(iter(row.losses.values())) for row in history[:4]]
    # Words of random sentences are hard to guess: from the unigram loss, about 3.03, to about 2.9.
    assert losses[3] < losses[0] - 0.05


def test_fine_tuning_after_it_equals_fine_tuning_from_that_body(tiny: dict[str, Any]) -> None:
    """Only the body and the end-task head are carried over to the next stage."""
    config = tiny_config(tiny, *TAPT)
    trainer = Trainer(build(config, choose_compute(config)))
    trainer._train_stage()
    body = {name: value.clone() for name, value in trainer.setup.encoder.state_dict().items()}
    trainer._next_stage()
    trainer._train_stage()
    plain = tiny_config(tiny, "method=finetune", *TAPT[3:])
    other = Trainer(build(plain, choose_compute(plain)))
    other.setup.encoder.load_state_dict(body)
    other._train_stage()
    for (name, value), (_, expected) in zip(
        trainer.setup.encoder.state_dict().items(), other.setup.encoder.state_dict().items(), strict=True
    ):
        assert torch.equal(value, expected), name


@pytest.mark.parametrize("settings", [BOTH, FINAL], ids=["tapt_dapt", "final"])
def test_resumed_after_any_step_of_any_stage_it_ends_with_the_same_numbers(
    tiny: dict[str, Any],
    settings: list[str],
    tmp_path: Path,
    snapshots: Path,  # noqa: F811
) -> None:
    config = tiny_config(tiny, *settings, "resources.checkpoint_minutes=0")
    plain = run_cell(config)
    whole = run_cell(config, checkpoints=tmp_path / "whole")
    assert numbers(whole) == numbers(plain)
    expected = last_state(tmp_path / "whole", config)
    assert expected["progress"]["stage"] == len(stages_of(config)) - 1
    for step in range(1, config.total_steps + 1):
        folder = snapshots / str(step)
        seen: list[HistoryRow] = []
        assert CheckpointFiles(folder, config.cell).load() is not None
        resumed = run_cell(config, checkpoints=folder, on_evaluation=seen.append)
        assert numbers(resumed) == numbers(plain)
        assert [row.step for row in seen] == [row.step for row in plain.history if row.step > step]
        assert_identical(last_state(folder, config), expected)


def test_a_final_stage_starts_from_the_kept_model_and_reports_both(tiny: dict[str, Any], tmp_path: Path) -> None:
    plain = run_cell(tiny_config(tiny, *FINAL[:-1])).result
    record = run_cell(tiny_config(tiny, *FINAL, "final_finetune.body_lr=1e-2"))
    result = record.result
    assert (result.dev_before, result.test_before, result.test_clean_before) == (
        plain.dev,
        plain.test,
        plain.test_clean,
    )
    assert [row.stage for row in record.history] == ["train", "train", "finetune", "finetune"]
    assert result.best_step is not None
    assert result.best_step > 4, "the last stage keeps the best of its own models"
    assert (result.steps, result.examples) == (7, 7 * 16)
    assert result.row == "static-td+finetune n=6"
    store = Store(tmp_path)
    store.write(record)
    assert store.record(result.cell) == record


def test_a_final_stage_with_next_to_no_rate_changes_nothing(tiny: dict[str, Any]) -> None:
    still = ["final_finetune.body_lr=1e-12", "final_finetune.head_lr=1e-12"]
    result = run_cell(tiny_config(tiny, *FINAL, *still)).result
    assert result.dev is not None
    assert result.dev_before is not None
    assert result.dev.accuracy == result.dev_before.accuracy
    assert result.dev.loss == pytest.approx(result.dev_before.loss, abs=1e-6)


def test_steps_follow_from_epochs(tiny: dict[str, Any]) -> None:
    config: RunConfig = tiny_config(tiny, "method.name=tapt_dapt", "method.epochs=3", "method.batch=32")
    # 80 task texts and 60 in-domain texts, thrice, 32 at a time.
    assert config.method.pretraining_steps == 8 + 6
    assert config.method.pretraining_texts == 14 * 32


def test_pretraining_on_a_domain_without_text_is_one_clear_line(tiny: dict[str, Any], tmp_path: Path) -> None:
    from tests.train.conftest import write_task

    folder = write_task(tmp_path / "bare", {"train": 8, "dev": 4, "test": 4})
    (folder / "in_domain.txt").unlink()
    for settings in (["method.name=dapt"], ["method.name=dapt", "method.dapt_steps=2"]):
        with pytest.raises(UserError, match=r"method dapt: no in-domain text is given; set data\.in_domain"):
            run_cell(tiny_config(tiny, *settings, f"data.task={folder}"))
