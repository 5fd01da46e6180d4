"""`aang try`: the runs, the answer in words, and the model."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from aang_ray.cli import main
from aang_ray.config import RunConfig
from aang_ray.errors import UserError
from aang_ray.store import CellRecord, Scores, Store, WeightRow
from aang_ray.sweep import recipe
from aang_ray.sweep.spec import SweepOverrides
from tests.sweep.conftest import done_record, fake_resolve


def scores(value: float) -> Scores:
    return Scores(value, value, 40, {"neg": 20, "pos": 20}, 0.5)


@pytest.fixture
def tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Stands for training: scores by method and seed, and what was exported."""
    world: dict[str, Any] = {"dev": {"finetune": 0.6, "static": 0.7, "aang": 0.8}, "exported": [], "files": []}

    def sweep_file(path: Path, overrides: SweepOverrides, store: Store, console: Console, **more: Any) -> Any:
        world["files"].append(path.read_text())
        spec = recipe.load_sweep(path, overrides)
        cells = recipe.plan(recipe.expand(spec, overrides, "try"), spec.seeds, {}, fake_resolve)
        for cell in cells:
            method, seed = cell.config.method.name, cell.config.seed
            score = world["dev"][method] + 0.01 * seed
            made = done_record(cell.config, dev=scores(score), test=scores(score - 0.1 - 0.02 * seed))
            weights = [WeightRow(30, 0.5, {"a": 0.6, "b": 0.3, "c": 0.1}, {}, {})] if method == "aang" else []
            store.write(CellRecord(made.result, made.history, tuple(weights)))
        return recipe.SweepOutcome(len(cells), len(cells), 0, {})

    def train_once(config: RunConfig, store: Store, console: Console, export: Path) -> None:
        world["exported"].append((config.method.name, config.seed, export))

    monkeypatch.setattr(recipe, "sweep_file", sweep_file)
    monkeypatch.setattr(recipe, "train_once", train_once)
    monkeypatch.setattr(recipe, "seconds_a_step", lambda config, threads: 0.1)
    monkeypatch.setattr("aang_ray.train.plan.resolve", fake_resolve)
    (tmp_path / "own.csv").write_text("text,label\na,x\n")
    world["task"] = str(tmp_path / "own.csv")
    return world


def run(world: dict[str, Any], store: Path, *seeds: int) -> str:
    stream = io.StringIO()
    recipe.try_task(world["task"], SweepOverrides(seeds=seeds), Store(store), Console(file=stream, width=300))
    return stream.getvalue()


def test_the_answer_the_objectives_and_the_model(tried: dict[str, Any], tmp_path: Path) -> None:
    said = run(tried, tmp_path / "store")
    assert said.startswith(
        "9 runs (finetune, static-td n=6, aang-td n=6), 9 to do\ntiming three steps of finetune\n"
        "timing three steps of static-td n=6\ntiming three steps of aang-td n=6\ntime: at most about "
    )
    assert "by dev, aang-td n=6 is worth it: its accuracy on test is 69.00 %, that of plain fine-tuning 49.00 %" in said
    assert "(+20.00, better in 3 of 3 seeds)" in said
    assert "favoured a (0.600), b (0.300), c (0.100); least weight had c (0.100), b (0.300), a (0.600)." in said
    model = tmp_path / "store" / "models" / "own"
    assert tried["exported"] == [("aang", 2, model)]  # the seed with the best dev score
    assert f'aang_ray.load_classifier("{model}").predict(' in said


def test_where_fine_tuning_is_best_it_is_the_model(tried: dict[str, Any], tmp_path: Path) -> None:
    tried["dev"]["finetune"] = 0.9
    said = run(tried, tmp_path / "store", 0, 1)
    assert "by dev, aang-td n=6 is not worth it: " in said
    assert "better in 0 of 2 seeds" in said
    assert tried["exported"][0][:2] == ("finetune", 1)


def test_in_domain_text_is_used(tried: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("train.csv", "dev.csv", "test.csv", "domain.txt"):
        (folder / name).touch()
    tried["task"] = str(folder)
    run(tried, tmp_path / "store")
    assert "space: td_ed" in tried["files"][0]


def test_images_are_refused(tried: dict[str, Any], tmp_path: Path) -> None:
    tried["task"] = "digits-left"
    with pytest.raises(UserError, match="is a task of images; use"):
        run(tried, tmp_path / "store")


def test_a_task_that_is_not_there(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["try", str(tmp_path / "nothing"), "--store", str(tmp_path / "store")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: data.task: there is no file or folder")
    assert not (tmp_path / "store").exists()
