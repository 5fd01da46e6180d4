"""Runs on images: the same loop, engines, methods, checkpoints, store and tables as on text."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from aang_ray.config.run import RunConfig
from aang_ray.errors import UserError
from aang_ray.report import build_table, render
from aang_ray.store import HistoryRow, Store
from aang_ray.train.control import Interrupted
from aang_ray.train.device import choose_compute
from aang_ray.train.run import run_cell
from aang_ray.train.setup import build
from aang_ray.train.step import Stepper
from aang_ray.train.workers.group import Workers
from tests.methods.cases import NAMES, case
from tests.train.parallel.processes import together
from tests.train.running import parameters, run_steps, tiny_config
from tests.train.test_checkpoint import numbers

DIGITS: dict[str, Any] = {
    "data": {"task": "digits-left", "train_size": 400},
    "encoder": {"name": "lenet", "head_dropout": 0.0},
    "space": "digits",
    "n": "all",
    "batch": {"end_task": 16, "auxiliary": 24, "dev": 8, "dev_head": 8},
    "schedule": {"steps": 20, "eval_every": 10},
    "optim": {"body_lr": 1e-3, "head_lr": 1e-2},
    "precision": "fp32",
    "resources": {"device": "cpu", "threads": 1},
}


def digits(*settings: str) -> RunConfig:
    return tiny_config(DIGITS, *settings)


@pytest.mark.parametrize("method", ["static", "aang", "upgrad"])
@pytest.mark.parametrize("changed", ["gradients.engine=loop", "batch.micro=7"])
def test_engines_and_accumulation_take_the_same_way(method: str, changed: str) -> None:
    settings = (f"method={method}", "n=3")
    one = run_steps(digits(*settings), 8, torch.float64)
    other = run_steps(digits(*settings, changed), 8, torch.float64)
    torch.testing.assert_close(parameters(one), parameters(other), rtol=1e-6, atol=1e-9)
    if method == "aang":
        torch.testing.assert_close(
            one.setup.method.state_dict()["flat"], other.setup.method.state_dict()["flat"], rtol=1e-5, atol=1e-7
        )


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith(("tapt", "dapt", "pooled"))])
def test_every_method_runs(name: str) -> None:
    method = json.dumps({"name": name, **case(name).settings})
    record = run_cell(digits(f"method={method}", "schedule.steps=8", "schedule.eval_every=4"))
    assert record.result.status == "done", record.result.error
    assert record.result.test is not None
    assert record.result.test.examples == 2048


@pytest.mark.parametrize("method", ["finetune", "aang"])
def test_a_run_is_deterministic_and_seeded(method: str) -> None:
    first, again, other = (run_cell(digits(f"method={method}", f"seed={seed}")) for seed in (0, 0, 1))
    assert first.result.dev == again.result.dev
    assert first.weights == again.weights
    assert first.result.dev != other.result.dev
    assert first.result.test_clean == first.result.test, "no digit of test is in train or dev"


def test_learning_happens() -> None:
    sgd = ("optim.algorithm=sgd", "optim.body_lr=0.1", "optim.head_lr=0.1", "optim.clip=1000")
    batch = ("data.train_size=null", "batch.end_task=128", "schedule.steps=160", "schedule.eval_every=80")
    result = run_cell(digits("method=finetune", *sgd, *batch)).result
    assert result.test is not None
    assert result.test.accuracy > 0.5, "chance is 0.1"
    assert result.examples == 160 * 128


@pytest.mark.parametrize("method", ["aang", "alphavil"])
def test_a_stopped_run_goes_on_with_the_same_numbers(method: str, tmp_path: Path) -> None:
    # A round of alphaVIL is two steps for each of two tasks here.
    settings = ("space=digits_pair", "data.train_size=20", "schedule.steps=12", "schedule.eval_every=4")
    config = digits(f"method={method}", *settings)
    plain = run_cell(config)
    with pytest.raises(Interrupted):
        run_cell(config, checkpoints=tmp_path, on_evaluation=lambda *_: signal.raise_signal(signal.SIGTERM))
    seen: list[HistoryRow] = []
    resumed = run_cell(config, checkpoints=tmp_path, on_evaluation=lambda row, _: seen.append(row))
    assert 0 < len(seen) < len(plain.history), "it went on, not anew"
    assert numbers(resumed) == numbers(plain)


def test_class_weights_and_heads_of_their_own() -> None:
    settings = ("data.class_weights=balanced", "objectives.heads=per_objective", "objectives.allocation=published")
    made = run_steps(digits(*settings), 3)
    assert len(made.setup.head_of) == 1 + 4
    batch = made.prepare(4).batch
    weights = made.setup.task.class_weights
    assert weights is not None
    assert batch.segments[1].normaliser == pytest.approx(float(weights[batch.segments[1].labels].sum()))
    assert batch.segments[2].normaliser == batch.segments[2].examples, "the other digit's classes are not the target's"


def test_rows_and_tables(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    for method in ("finetune", "static"):
        for seed in (0, 1):
            store.write(run_cell(digits(f"method={method}", f"seed={seed}", "schedule.steps=4")))
    page = render(build_table(store), "markdown")
    assert "digits-left" in page
    assert "static-digits" in page
    row = store.record(digits("method=static", "seed=0", "schedule.steps=4").cell)
    assert row.result.tokens == 4 * (16 + 24), "a row of the body is an image"
    assert row.weights[-1].factors["O"].keys() == {"other-digit", "rotation", "denoise"}
    predicted = store.predictions({row.result.cell}).to_pandas(maps_as_pydicts="strict")
    for split, scores in (("dev", row.result.dev), ("test", row.result.test)):
        part = predicted[predicted["split"] == split]
        assert scores is not None
        assert len(part) == scores.examples
        assert part["label"].value_counts().to_dict() == dict(scores.per_class)
        right = [max(p, key=p.get) == label for p, label in zip(part["probabilities"], part["label"], strict=True)]
        assert sum(right) / len(right) == pytest.approx(scores.accuracy)
        assert all(sum(p.values()) == pytest.approx(1.0, abs=1e-5) for p in part["probabilities"])


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (["encoder.name=roberta-base"], "its encoder is lenet"),
        (["space=td"], "space: td holds objectives on text; for digits-left use digits"),
        (["n=6"], "n: 6 exceeds the 4 objectives of space digits"),
        (["data.max_tokens=32"], "data.max_tokens: means nothing for digits-left"),
        (["encoder.pooling=mean"], "encoder.pooling: means nothing for digits-left"),
        (["objectives.mask_rate=0.3"], "objectives.mask_rate: means nothing for digits-left"),
        (["gradients.checkpointing=true"], "gradients.checkpointing: means nothing"),
        (["method=tapt"], "tapt pretrains on text"),
        (["data.task=movie"], "encoder.name: lenet reads images; movie is a task of text"),
    ],
)
def test_one_line_for_what_means_nothing(settings: list[str], line: str) -> None:
    def attempt() -> None:
        config = digits(*settings)
        build(config, choose_compute(config))

    with pytest.raises(UserError, match=line):
        attempt()


def end(workers: Workers, method: str) -> Tensor:
    """Parameters after some steps in float64."""
    config = digits(f"method={method}")
    setup = build(config, choose_compute(config), workers)
    setup.encoder.double()
    setup.heads.double()
    made = Stepper(setup)
    for step in range(4):
        made.step(made.prepare(step))
    return parameters(made)


def ends(workers: Workers) -> list[Tensor]:
    return [end(workers, method) for method in ("static", "aang", "upgrad")]


def test_two_workers_end_as_one(tmp_path: Path) -> None:
    for found in together(2, tmp_path / "two", ends):
        torch.testing.assert_close(found, ends(Workers()), rtol=1e-6, atol=1e-9)


def test_no_classifier_of_images_is_exported(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="only classifiers of text are exported"):
        run_cell(digits("method=finetune"), export=tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_names_do_not_matter_to_the_cell_and_the_side_does() -> None:
    assert digits("data.task=digits").cell == digits().cell
    assert digits("data.task=digits-right").cell != digits().cell


def test_images_without_labels_serve_as_in_domain() -> None:
    """Their objectives read other images than the end task; standardised by the labelled ones."""
    config = digits("space=digits_unlabelled", "method=static", "data.train_size=100", "batch.auxiliary=60")
    setup = build(config, choose_compute(config))
    assert setup.space is not None
    batch = Stepper(setup).prepare(0).batch
    names = {segment.name: segment for segment in batch.segments[2:]}
    assert len(names) == 6
    turned = names["in-domain/rotate/whole/rotation"]
    assert turned.examples == 10
    labelled = {image.tobytes() for image in setup.domain.source.train.pixels_NHW}  # type: ignore[attr-defined]
    clean = names["in-domain/noise/whole/denoise"].labels
    assert not labelled & {image.tobytes() for image in clean}
    assert labelled >= {image.tobytes() for image in names["end-task/noise/whole/denoise"].labels}
    record = run_cell(digits("space=digits_unlabelled", "method=static", "schedule.steps=4", "schedule.eval_every=2"))
    assert record.result.status == "done"


def test_without_unlabelled_images_a_space_on_them_is_refused() -> None:
    config = digits("space=digits_unlabelled", "data.train_size=null")
    with pytest.raises(UserError, match="space digits_unlabelled: all images have labels, none is left as in-domain"):
        build(config, choose_compute(config))


def test_images_have_a_last_stage() -> None:
    settings = ("method=static", "schedule.steps=4", "schedule.eval_every=2")
    result = run_cell(digits(*settings, "final_finetune={steps: 2, keep_start: true}")).result
    assert (result.status, result.steps) == ("done", 6)
    assert result.dev is not None
    assert result.dev_before is not None
    assert result.dev.accuracy >= result.dev_before.accuracy
