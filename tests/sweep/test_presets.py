"""The paper's grids: as many configurations as its tables have, and every one of them a valid run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from aang_ray.cli import main
from aang_ray.config import RunConfig
from aang_ray.config.methods import AangConfig
from aang_ray.errors import UserError
from aang_ray.sweep.presets import ROWS, TRAIN_SIZES, preset, preset_names
from aang_ray.sweep.spec import SweepOverrides, expand, load_sweep
from aang_ray.train.plan import resolve
from aang_ray.train.run import run_cell
from tests.train.conftest import write_encoder, write_task
from tests.train.running import stepper


def runs_of(name: str, *settings: str) -> list[RunConfig]:
    overrides = SweepOverrides(settings=settings)
    return expand(load_sweep(Path(name), overrides, is_preset=True), overrides, name)


@pytest.mark.parametrize(
    ("row", "size"),
    [
        # Table 7: three values of sopt_lr by three rates.
        ("gpt", 9),
        ("xlnet", 9),
        ("bert", 9),
        ("meta-tartan", 9),
        # Table 5: aux_lr, sopt_lr, n and rate, two values each; X+Y+Z has no choice of n.
        ("aang-td", 16),
        ("xyz", 8),
        ("static-td", 4),
        # Table 6: three values of aux_lr by three of n.
        ("aang-td+ed", 9),
        ("roberta", 1),
        ("tapt", 1),
        ("dapt", 1),
        ("tapt+dapt", 1),
        ("mt-tartan", 1),
    ],
)
def test_as_many_configurations_as_the_tables_have(row: str, size: int) -> None:
    runs = runs_of(f"paper/citation_intent/{row}")
    assert len(runs) == len({run.cell for run in runs}) == size


def test_every_row_is_tested_above() -> None:
    assert set(ROWS) == {
        *("roberta", "tapt", "dapt", "tapt+dapt", "gpt", "xlnet", "bert", "meta-tartan", "mt-tartan"),
        *("static-td", "xyz", "aang-td", "aang-td+ed"),
    }
    assert len(preset_names()) == len(ROWS) * len(TRAIN_SIZES)


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_is_a_valid_sweep(name: str) -> None:
    for run in runs_of(name):
        assert run.data.task == name.split("/")[1]
        assert run.encoder.name == "roberta-base"


def test_values_of_the_tables() -> None:
    runs = runs_of("paper/sciie/aang-td+ed")
    assert {run.batch.auxiliary for run in runs} == {1024}
    assert {run.n for run in runs} == {6, 12, 24}
    assert {run.method.aux_lr for run in runs if run.method.name == "aang"} == {1.0, 0.5, 0.1}
    assert {run.method.sopt_lr for run in runs if run.method.name == "aang"} == {0.1}
    assert {(run.optim.body_lr, run.optim.head_lr) for run in runs} == {(1e-4, 1e-4)}
    assert all(run.row_name.startswith("aang-td_ed (published) n=") for run in runs)
    (tapt,) = runs_of("paper/sciie/tapt")
    # ceil(3219 / 16) = 202 steps an epoch, 10 epochs.
    assert (tapt.schedule.steps, tapt.schedule.eval_every, tapt.schedule.patience) == (2020, 202, 3)
    assert (tapt.optim.body_lr, tapt.batch.end_task, tapt.encoder.dropout) == (2e-5, 16, 0.1)


def test_shown_presets_are_sweep_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["preset", "show", "paper/chemprot/xyz"]) == 0
    shown = capsys.readouterr().out
    assert yaml.safe_load(shown) == preset("paper/chemprot/xyz")
    file = tmp_path / "xyz.yaml"
    file.write_text(shown)
    overrides = SweepOverrides()
    assert expand(load_sweep(file, overrides), overrides, "xyz") == runs_of("paper/chemprot/xyz")


def test_presets_share_nothing() -> None:
    changed: dict[str, Any] = preset("paper/sciie/bert")
    changed["methods"][0]["grid"]["optim.head_lr"].append(1.0)
    changed["methods"][0]["method"]["name"] = "static"
    assert preset("paper/sciie/gpt")["methods"][0]["grid"]["optim.head_lr"] == [1e-3, 1e-4, 5e-5]
    assert preset("paper/sciie/bert")["methods"][0]["method"]["name"] == "aang"


@pytest.mark.parametrize("name", ["paper/citation_intent/aang", "other/sciie/bert", "paper/movie/bert", "paper"])
def test_an_unknown_preset_is_one_clear_line(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=f"preset '{name}' is unknown"):
        preset(name)
    assert main(["sweep", "--preset", name]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_a_file_or_a_preset(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep"]) == 2
    assert main(["sweep", "some.yaml", "--preset", "paper/sciie/bert"]) == 2
    assert "either a sweep file or --preset" in capsys.readouterr().err


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Settings with which a preset's run takes about a second, with a small task and encoder."""
    root = tmp_path_factory.mktemp("presets")
    task = write_task(root / "citation_intent", {"train": 80, "dev": 40, "test": 40})
    encoder = write_encoder(root / "encoder")
    return [
        f"encoder.name={encoder}",
        f"data.in_domain={task / 'in_domain.txt'}",
        *("schedule.steps=3", "schedule.eval_every=2", "method.tapt_steps=2", "method.dapt_steps=2"),
        *("batch.end_task=16", "batch.auxiliary=32", "batch.dev=8", "batch.dev_head=8", "method.batch=8"),
        *("resources.device=cpu", "precision=fp32"),
        str(task),
    ]


def small_run(row: str, small: list[str]) -> RunConfig:
    """The last run of a preset's row, on the small task."""
    *settings, task = small
    overrides = SweepOverrides(tasks=(task,), settings=tuple(settings))
    name = f"paper/citation_intent/{row}"
    return resolve(expand(load_sweep(Path(name), overrides, is_preset=True), overrides, name)[-1])


@pytest.mark.parametrize("row", ROWS)
def test_every_row_runs(row: str, small: list[str]) -> None:
    result = run_cell(small_run(row, small)).result
    assert (result.status, result.error) == ("done", None)
    assert ("(published" in result.row) == ("space" in ROWS[row])
    if row == "mt-tartan":  # its weights are its own, and so is its allocation
        assert "(published: clipping, heads, labels, legality, visibility)" in result.row


def test_mt_tartan_weighs_the_end_task_and_both_objectives_alike(small: list[str]) -> None:
    """1 / (1 + #aux), the end task one of them, and no b / B: each objective reads half of the batch of 32."""
    made = stepper(small_run("mt-tartan", small))
    prepared = made.prepare(0)
    coefficients_S = made.setup.method.request(prepared.sampled).coefficients_S
    assert coefficients_S.tolist() == pytest.approx([0, 1 / 3, 1 / 3, 1 / 3])
    assert prepared.sampled.objectives == (0, 1)
    assert [len(segment.lengths_E) for segment in prepared.batch.segments[2:]] == [16, 16]


@pytest.mark.parametrize("task", TRAIN_SIZES)
def test_what_table_7_leaves_open_is_stated(task: str) -> None:
    """META-TARTAN learns two weights, with a rate that the preset sets itself."""
    assert preset(f"paper/{task}/meta-tartan")["methods"][0]["method"]["aux_lr"] == 0.1
    for run in runs_of(f"paper/{task}/meta-tartan"):
        assert isinstance(run.method, AangConfig)
        assert run.method.aux_lr == 0.1
