"""Search, then train: static multitask with weights that are given, or that earlier runs found."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from aang_ray.config import parse_config
from aang_ray.config.run import RunConfig
from aang_ray.errors import UserError
from aang_ray.store import CellRecord, Store
from aang_ray.store.schema import Scores, WeightRow
from aang_ray.train.plan import resolve
from aang_ray.train.record import Progress, SplitScores, cell_record
from aang_ray.train.run import run_cell
from tests.train.running import parameters, run_steps, stepper, tiny_config

A, B, C = (f"end-task/{name}/bidirectional/denoise" for name in ("mask", "replace", "bert-op"))


def logged(step: int, end_task: float, **weights: float) -> WeightRow:
    names = {"a": A, "b": B, "c": C}
    return WeightRow(step, end_task, {names[key]: value for key, value in weights.items()}, {}, {})


def found(config: RunConfig, dev: float, *rows: WeightRow) -> CellRecord:
    """The record of a run that logged these weights."""
    scores = Scores(dev, dev, 40, {"bad": 20, "good": 20}, 0.5)
    made = cell_record(
        config,
        Progress(steps=20),
        "done",
        device="cpu",
        precision="fp32",
        seconds=1.0,
        scores=SplitScores(scores, scores, scores),
    )
    return replace(made, weights=rows)


@pytest.fixture
def search(tiny: dict[str, Any], tmp_path: Path) -> str:
    """A store with two seeds of a search, and one of a better configuration that is not complete.

    Seed 0: of the steps 10, 20, 30 and 40 the last half is 30 and 40. a: (.8 + .6)/2 = .7, b: .2, c: .1 (sampled once).
    Seed 1: one row, a .5, b .5. Means: a .6, b .35, c .1; normalised: .571429, .333333, .095238.
    End task: ((.3 + .5)/2 + .2)/2 = .3.
    """
    store = Store(tmp_path / "search")
    config = tiny_config(tiny, "method=aang")
    store.write(
        found(
            config,
            0.8,
            logged(10, 0.9, b=1.0),
            logged(20, 0.9, b=1.0),
            logged(30, 0.3, a=0.8, b=0.2),
            logged(40, 0.5, a=0.6, b=0.2, c=0.1),
        )
    )
    store.write(found(config.model_copy(update={"seed": 1}), 0.8, logged(8, 0.2, a=0.5, b=0.5)))
    store.write(found(tiny_config(tiny, "method=aang", "method.aux_lr=1"), 0.9, logged(8, 0.2, c=1.0)))
    store.write(found(tiny_config(tiny, "method=finetune"), 0.9))
    return store.uri


def of(store: str, row: str = "aang-td", more: str = "") -> str:
    return f"method={{name: static, weights: {{from: {store}, row: '{row}'{more}}}}}"


@pytest.mark.parametrize("row", ["aang-td", "aang-td n=6"])
def test_weights_are_averaged_over_seeds_and_the_last_half(tiny: dict[str, Any], search: str, row: str) -> None:
    config = tiny_config(tiny, of(search, row))
    assert config.method.name == "static"
    assert config.method.weights is not None
    assert config.method.weights.end_task == 0.3
    assert config.method.weights.objectives == {A: 0.571429, B: 0.333333, C: 0.095238}
    assert config.n == 3
    assert config.row_name == "static-td+weights n=3"


def test_small_shares_are_dropped_and_the_rest_sums_to_one(tiny: dict[str, Any], search: str) -> None:
    weights = tiny_config(tiny, of(search, more=", drop_below: 0.1"), "n=all").method.weights  # type: ignore[union-attr]
    assert weights is not None
    assert weights.objectives == {A: 0.631579, B: 0.368421}


def test_the_numbers_are_the_name(tiny: dict[str, Any], search: str) -> None:
    """Where they were found does not matter, and a stored configuration is resolved without the store."""
    config = tiny_config(tiny, of(search), "n=all")
    by_hand = f"method.weights={{end_task: 0.3, objectives: {{{A}: 0.571429, {B}: 0.333333, {C}: 0.095238}}}}"
    assert tiny_config(tiny, "method=static", "n=all", by_hand).cell == config.cell
    stored = config.model_dump(mode="json")
    stored["method"]["weights"]["store"] = "gone"
    again = resolve(parse_config(yaml.safe_load(yaml.safe_dump(stored)), "stored"))
    assert again.cell == config.cell
    other = by_hand.replace("0.571429", "0.571428")
    assert tiny_config(tiny, "method=static", "n=all", other).cell != config.cell
    assert tiny_config(tiny, "method=static").identity()["method"] == {"name": "static"}


def test_a_step_uses_them(tiny: dict[str, Any]) -> None:
    given = f"method.weights={{end_task: 0.25, objectives: {{{A}: 6, {C}: 2}}}}"
    made = stepper(tiny_config(tiny, "method=static", "n=all", given))
    prepared = made.prepare(0)
    assert [segment.name for segment in prepared.batch.segments[2:]] == [C, A]  # in the order of the space
    coefficients_S = made.setup.method.request(prepared.sampled).coefficients_S
    assert coefficients_S.tolist() == pytest.approx([0, 0.25, 0.75 * 0.25, 0.75 * 0.75])
    row = made.setup.method.describe(prepared.sampled)
    assert row is not None
    assert row.weights == pytest.approx({A: 0.75, C: 0.25})


def test_equal_weights_are_static_multitask(tiny: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "two.yaml").write_text(
        "blocks: [{data: [end-task], transform: [mask, bert-op], representation: [bidirectional], output: [denoise]}]\n"
    )
    space = f"space={tmp_path}/two.yaml"
    plain = run_steps(tiny_config(tiny, "method=static", "n=all", space), 3, torch.float64)
    given = f"method.weights.objectives={{{A}: 3, {C}: 3}}"
    same = run_steps(tiny_config(tiny, "method=static", "n=all", space, given), 3, torch.float64)
    torch.testing.assert_close(parameters(same), parameters(plain), rtol=1e-9, atol=1e-12)


def test_a_search_and_the_run_after_it(tiny: dict[str, Any], tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    store.write(run_cell(tiny_config(tiny, "method={name: aang, aux_lr: 1.0}", "n=all")))
    record = run_cell(tiny_config(tiny, of(store.uri, more=", drop_below: 0.043"), "n=all"))
    assert record.result.status == "done"
    kept = record.result.config["method"]["weights"]["objectives"]
    assert 0 < len(kept) < 23
    assert record.weights[-1].weights == pytest.approx(kept, abs=1e-5)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (of("{store}/none"), "method.weights.from: there is no store at .*/none; run the search first"),
        (of("{store}", "gpt"), r"has no finished run of gpt on task with the same data; finished rows: aang-td n=6 on"),
        (of("{store}", "finetune"), "method.weights.row: the runs of finetune in .* logged no weights of objectives"),
        (
            of("{store}", more=", drop_below: 0.9"),
            "drop_below: 0.9 drops all objectives; the largest share is 0.571, of",
        ),
        ("method={name: static, weights: {row: aang-td}}", "give from .a store. and row, or objectives"),
        ("method={name: static, weights: {objectives: {a/b: 1}}}", "method.weights: a/b is not in space td: unknown"),
        (
            "method={name: static, weights: {objectives: {end-task/no-op/bidirectional/denoise: 1}}}",
            "denoise is not in space td: .*copying",
        ),
        ("method={name: static, weights: {objectives: {a/b: -1}}}", "weights.objectives.a/b: must be greater than 0"),
        ("method={name: static, weights: {frm: x}}", "unknown key method.*weights.frm"),
    ],
)
def test_errors_are_one_line(tiny: dict[str, Any], search: str, setting: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        tiny_config(tiny, setting.replace("{store}", search))
    assert "\n" not in str(error.value)


def test_other_data_do_not_count(tiny: dict[str, Any], search: str) -> None:
    with pytest.raises(UserError, match="no finished run of aang-td on task with the same data"):
        tiny_config(tiny, of(search), "data.train_size=40")
