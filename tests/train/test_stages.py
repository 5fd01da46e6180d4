"""Runs of several stages: masked-LM pretraining before, fine-tuning at the end."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM

from aang_ray.config.run import RunConfig
from aang_ray.errors import UserError
from aang_ray.store import HistoryRow, Store
from aang_ray.train.checkpoint import CheckpointFiles
from aang_ray.train.device import choose_compute
from aang_ray.train.loop import Trainer
from aang_ray.train.plan import resolve
from aang_ray.train.run import run_cell
from aang_ray.train.setup import build, setup_of_stage, stages_of
from tests.train.conftest import write_task
from tests.train.running import run_steps, stepper, tiny_config
from tests.train.test_checkpoint import assert_identical, last_state, numbers, snapshots  # noqa: F401

TAPT = ["method.name=tapt", "method.tapt_steps=4", "method.batch=8", "schedule.steps=5", "schedule.eval_every=2"]
BOTH = ["method.name=tapt_dapt", "method.dapt_steps=2", "method.tapt_steps=3", "method.batch=8", *TAPT[3:]]
FINAL = ["method=static", "schedule.steps=4", "schedule.eval_every=2", "final_finetune.steps=3"]
# A stage that only harms: its first step takes the model far away.
KEEPING = [*FINAL, "final_finetune.body_lr=0.5", "final_finetune.head_lr=0.5", "final_finetune.keep_start=true"]
CONVERGED = ["method=static", "schedule.steps=9", "schedule.eval_every=1", "schedule.until=converged"]
CONVERGED += ["schedule.patience=2", "optim.head_warmup_steps=3"]


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


@pytest.mark.parametrize(
    "settings", [BOTH, FINAL, KEEPING, CONVERGED], ids=["tapt_dapt", "final", "keep_start", "converged"]
)
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
    for step in range(1, plain.result.steps + 1):
        folder = snapshots / str(step)
        seen: list[HistoryRow] = []
        assert CheckpointFiles(folder, config.cell).load() is not None
        resumed = run_cell(config, checkpoints=folder, on_evaluation=lambda row, _, seen=seen: seen.append(row))
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
    folder = write_task(tmp_path / "bare", {"train": 8, "dev": 4, "test": 4})
    (folder / "in_domain.txt").unlink()
    for settings in (["method.name=dapt"], ["method.name=dapt", "method.dapt_steps=2"]):
        with pytest.raises(UserError, match=r"method dapt: no in-domain text is given; set data\.in_domain"):
            run_cell(tiny_config(tiny, *settings, f"data.task={folder}"))


def test_the_model_that_the_last_stage_starts_from_competes(tiny: dict[str, Any]) -> None:
    """With huge rates the stage ends worse than it began. Then model, scores and step are the start's."""
    harmed, kept = run_cell(tiny_config(tiny, *KEEPING[:-1])).result, run_cell(tiny_config(tiny, *KEEPING)).result
    assert harmed.dev is not None
    assert harmed.dev_before is not None
    assert harmed.dev.accuracy <= harmed.dev_before.accuracy
    assert harmed.dev != harmed.dev_before
    assert (kept.dev, kept.test, kept.test_clean) == (kept.dev_before, kept.test_before, kept.test_clean_before)
    assert kept.best_step in (2, 4)
    assert kept.steps == harmed.steps == 7
    assert kept.cell != harmed.cell


def test_a_last_stage_that_helps_is_kept(tiny: dict[str, Any]) -> None:
    settings = [*FINAL[:2], "schedule.eval_every=5", "final_finetune={steps: 40, body_lr: 1e-2, keep_start: true}"]
    result = run_cell(tiny_config(tiny, *settings)).result
    assert result.dev is not None
    assert result.dev_before is not None
    assert result.dev.accuracy > result.dev_before.accuracy
    assert result.best_step is not None
    assert result.best_step > 4


def test_a_run_until_convergence_stops_after_patience_evaluations(tiny: dict[str, Any]) -> None:
    """Rates of 1e-12 never improve dev. The warm-up of heads lasts 3 steps, so evaluations count from step 4 on."""
    still = ["optim.body_lr=1e-12", "optim.head_lr=1e-12"]
    result = run_cell(tiny_config(tiny, *CONVERGED, *still)).result
    assert (result.steps, result.best_step) == (5, 1)
    capped = run_cell(tiny_config(tiny, *CONVERGED, *still, "schedule.patience=20")).result
    assert capped.steps == 9
    early = run_cell(tiny_config(tiny, *CONVERGED, *still, "optim.head_warmup_steps=0")).result
    assert early.steps == 3, "the warm-up of the rate is round(0.06 * 9) = 1 step"


def test_new_heads_are_trained_alone_first(tiny: dict[str, Any]) -> None:
    """The tiny checkpoint has no masked-LM head, so that all heads are new."""
    settings = ["method=static", "optim.head_warmup_steps=2"]
    made = run_steps(tiny_config(tiny, *settings), 2)
    start = stepper(tiny_config(tiny, *settings))
    for name, value in made.setup.encoder.state_dict().items():
        assert value.equal(start.setup.encoder.state_dict()[name]), name
    for name, head in made.setup.head_of.items():
        first = start.setup.head_of[name].state_dict()
        assert any(not value.equal(first[key]) for key, value in head.state_dict().items()), name
    made.step(made.prepare(2))
    assert any(not v.equal(start.setup.encoder.state_dict()[k]) for k, v in made.setup.encoder.state_dict().items())


def test_a_head_from_the_checkpoint_waits_with_the_body(tiny: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "with-head"
    shutil.copytree(tiny["encoder"]["name"], folder)
    BertForMaskedLM(BertConfig.from_pretrained(folder)).save_pretrained(folder)
    settings = ["method=static", "optim.head_warmup_steps=2", f"encoder.name={folder}"]
    made, start = run_steps(tiny_config(tiny, *settings), 2), stepper(tiny_config(tiny, *settings))
    for name, waits in {"denoise": True, "end-task": False, "label": False}.items():
        before = start.setup.head_of[name].state_dict()
        same = all(value.equal(before[key]) for key, value in made.setup.head_of[name].state_dict().items())
        assert same == waits, name


def test_rounds_have_no_warm_up_of_heads(tiny: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="head_warmup_steps does not go with alphavil, which trains in rounds"):
        tiny_config(tiny, "method=alphavil", "optim.head_warmup_steps=2")


def test_fine_tuning_with_tied_compute_sees_the_examples_of_a_multitask_run(tiny: dict[str, Any]) -> None:
    """16 + 24 examples a step in 4 steps are 160 examples: 10 steps of 16."""
    settings = ["method={name: finetune, tied_compute: true}", "schedule.steps=4", "schedule.eval_every=5"]
    config = tiny_config(tiny, *settings)
    assert (config.total_steps, config.schedule.steps) == (10, 4)
    record = run_cell(config)
    assert (record.result.steps, record.result.examples, record.result.row) == (10, 160, "finetune-tied")
    assert [row.step for row in record.history] == [5, 10]
    plain = run_cell(tiny_config(tiny, "method=finetune", "schedule.steps=10", "schedule.eval_every=5"))
    assert record.result.test == plain.result.test, "it is fine-tuning with more steps"
    assert tiny_config(tiny, *settings, "batch.auxiliary=8").cell != config.cell
    assert tiny_config(tiny, "method=finetune", "batch.auxiliary=8").cell == tiny_config(tiny, "method=finetune").cell
    assert tiny_config(tiny, *settings, "final_finetune.steps=3").total_steps == 13
    assert resolve(config).cell == config.cell


def test_other_labelled_sets_first(tiny: dict[str, Any], tmp_path: Path) -> None:
    near, far = (write_task(tmp_path / name, {"train": 40, "dev": 4, "test": 4}, seed=7) for name in ("near", "far"))
    more = [f"data.external=[{near}, {far}]", "schedule.steps=2", "schedule.eval_every=1"]
    config = tiny_config(tiny, "method={name: pooled, batch: 16, epochs: 2, head_lr: 1e-2, lr: 1e-3}", *more)
    assert config.method.pretraining_steps == 10  # 2 epochs of 80 texts, 16 at a time
    assert [(s.name, s.config.optim.head_lr) for s in stages_of(config)] == [("pooled", 1e-2), ("train", 1e-2)]
    trainer = Trainer(build(config, choose_compute(config)))
    prepared = trainer.stepper.prepare(0)
    assert [segment.examples for segment in prepared.batch.segments] == [0, 0, 8, 8]
    request = trainer.setup.method.request(prepared.sampled)
    assert request.coefficients_S.tolist() == [0.0, 0.0, 0.5, 0.5]
    record = run_cell(config)
    assert [(row.stage, row.dev is None, row.examples) for row in record.history] == [
        *[("pooled", True, 0)] * 10,
        ("train", False, 16),
        ("train", False, 32),
    ]
    names = {"external:near/no-op/bidirectional/supervised", "external:far/no-op/bidirectional/supervised"}
    assert set(record.history[0].losses) == names
    assert record.history[9].losses[min(names)] < record.history[0].losses[min(names)]
    assert (record.result.row, record.result.space) == ("pooled", None)
    with pytest.raises(UserError, match=r"method pooled: data.external lists 0 other labelled sets"):
        tiny_config(tiny, "method=pooled")
    with pytest.raises(UserError, match=r"lists 2 other labelled sets; list at least one, and at most method.batch, 1"):
        tiny_config(tiny, "method={name: pooled, batch: 1}", more[0])


@pytest.mark.parametrize("method", ["alphavil", "{name: pooled, pooled_steps: 2, batch: 8}", "attittud"])
def test_every_kind_of_method_has_a_last_stage(tiny: dict[str, Any], tmp_path: Path, method: str) -> None:
    near = write_task(tmp_path / "near", {"train": 40, "dev": 4, "test": 4}, seed=7)
    more = ["n=2", "schedule.steps=6", "schedule.eval_every=2", "final_finetune={steps: 2, keep_start: true}"]
    record = run_cell(tiny_config(tiny, f"method={method}", f"data.external=[{near}]", *more))
    assert record.result.status == "done"
    assert record.history[-1].stage == "finetune"
    assert record.result.dev is not None
    assert record.result.dev_before is not None
    assert record.result.dev.accuracy >= record.result.dev_before.accuracy
