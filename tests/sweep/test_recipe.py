"""`aang try`: the runs, the answer in words, and the model."""

from __future__ import annotations

import io
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from rich.console import Console

from aang_ray.cli import main
from aang_ray.config import RunConfig
from aang_ray.errors import UserError
from aang_ray.store import CellRecord, Scores, Store, WeightRow
from aang_ray.sweep import recipe
from aang_ray.sweep.spec import SweepOverrides
from aang_ray.train.plan import resolve
from tests.sweep.conftest import done_record, fake_resolve


def scores(value: float) -> Scores:
    return Scores(value, value, 40, {"neg": 20, "pos": 20}, 0.5)


@pytest.fixture
def tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Stands for training: scores by method and seed, and what was exported."""
    world: dict[str, Any] = {
        "dev": {"finetune": 0.6, "static": 0.7, "aang": 0.8},
        "exported": [],
        "files": [],
        "spaces": [],
    }

    def sweep_file(path: Path, overrides: SweepOverrides, store: Store, console: Console, **more: Any) -> Any:
        world["files"].append(path.read_text())
        assert more["keep_models"]
        world["spaces"] += [file.read_text() for file in path.parent.glob("other_labels.yaml")]
        spec = recipe.load_sweep(path, overrides)
        cells = recipe.plan(recipe.expand(spec, overrides, "try"), spec.seeds, {}, fake_resolve)
        done = store.done()
        for cell in cells:
            if cell.cell in done:
                continue
            method, seed = cell.config.method.name, cell.config.seed
            score = world["dev"][method] + 0.01 * seed
            made = done_record(cell.config, dev=scores(score), test=scores(score - 0.1 - 0.02 * seed))
            chosen = {"external:tweets/no-op": 0.5, "external:maybe/no-op": 0.5 if seed == 1 else 0.0}
            learned = {"aang": {"a": 0.6, "b": 0.3, "c": 0.1}, "halving": chosen}
            weights = [WeightRow(30, 0.5, learned[method], {}, {})] if method in learned else []
            store.write(CellRecord(made.result, made.history, tuple(weights)))
        return recipe.SweepOutcome(len(cells), len(cells), 0, {})

    def export_run(cell: str, store: Store, console: Console, export: Path) -> None:
        result = store.record(cell).result
        world["exported"].append((result.method, result.seed, export))

    monkeypatch.setattr(recipe, "sweep_file", sweep_file)
    monkeypatch.setattr(recipe, "export_run", export_run)

    def measure(configs: Sequence[RunConfig], at_once: int, threads: int) -> Generator[recipe.Pace]:
        for config in configs:
            world["measured"].append((config.method.name, config.encoder.layers))
            yield recipe.Pace(2.0, world["step"] * (config.encoder.layers or 1), 3.0)

    world |= {"step": 0.01, "measured": [], "longest": 256}
    monkeypatch.setattr(recipe, "measure", measure)
    monkeypatch.setattr(recipe, "_cores", lambda: 2)
    monkeypatch.setattr(recipe, "_lengths", lambda config: np.array([world["longest"]]))
    monkeypatch.setattr("aang_ray.train.plan.resolve", fake_resolve)
    monkeypatch.setattr("aang_ray.train.check.check_runs", lambda runs, here: ["own: texts", "warning: odd"])
    (tmp_path / "own.csv").write_text("text,label\na,x\n")
    world["task"] = str(tmp_path / "own.csv")
    return world


def run(world: dict[str, Any], store: Path, *seeds: int, settings: tuple[str, ...] = (), **more: Any) -> str:
    stream = io.StringIO()
    changes = SweepOverrides(seeds=seeds, settings=settings)
    recipe.try_task(world["task"], changes, Store(store), Console(file=stream, width=300), **more)
    return stream.getvalue()


def test_the_answer_the_objectives_and_the_model(tried: dict[str, Any], tmp_path: Path) -> None:
    said = run(tried, tmp_path / "store")
    assert said.startswith(
        "own: texts\nwarning: odd\n9 runs (finetune, static-td n=6, aang-td n=6; seeds 0, 1, 2), 9 to do\n"
        "timing up to three steps of finetune with 3 layers, 2 runs at once\n"
        "timing up to three steps of static-td n=6 with 3 layers, 2 runs at once\n"
        "timing up to three steps of aang-td n=6 with 3 layers, 2 runs at once\n"
        # 20 s for Ray, and 9 runs of 2 + 150 * 0.03 + 3 s on two cores
        "time: at most about 1 min 03 s on 2 cores\n"
    )
    assert "cut" not in said
    assert "by dev, aang-td n=6 is worth it: its accuracy on test is 69.00 %, that of plain fine-tuning 49.00 %" in said
    assert "(+20.00, better in 3 of 3 seeds)" in said
    assert "favoured a (0.600), b (0.300), c (0.100); least weight had c (0.100), b (0.300), a (0.600)." in said
    model = tmp_path / "store" / "models" / "own"
    assert tried["exported"] == [("aang", 2, model)]  # the seed with the best dev score
    assert f"The best model is that of aang-td n=6, seed 2.\n`aang predict {model} --input FILE`" in said


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


def test_runs_are_made_smaller_until_they_end_in_time(tried: dict[str, Any], tmp_path: Path) -> None:
    tried["step"] = 1.2  # 3.6 s with 3 layers. 2 layers, 50 steps: 20 + 4.5 * (5 + 50 * 3/4 * 3.6) = 650 s; 75: 954 s
    said = run(tried, tmp_path / "store", minutes=12)
    assert "cut to answer in time: 50 of 150 steps, 2 of 3 layers (all of it takes about 41 min 12 s)" in said
    assert "time: at most about 10 min 50 s on 2 cores" in said
    assert "smallest" not in said
    assert "The runs were cut (50 of 150 steps, 2 of 3 layers): the whole recipe, --whole, may give" in said
    assert tried["measured"] == [(name, 3) for name in ("finetune", "static", "aang")]
    assert "steps: 50" in tried["files"][0]


def test_a_size_is_kept_for_the_same_command(tried: dict[str, Any], tmp_path: Path) -> None:
    tried["step"] = 1.2
    run(tried, tmp_path / "store", 0, minutes=4)
    tried["step"] = 0.01
    said = run(tried, tmp_path / "store", 0, 1, minutes=4)  # more seeds
    assert "cut to answer in time: 50 of 150 steps, 2 of 3 layers (chosen by an earlier call)" in said
    assert "cut" not in run(tried, tmp_path / "store", 0, minutes=8)
    assert "cut" not in run(tried, tmp_path / "store", 0, whole=True)


def test_a_smaller_size_that_is_done_already_fits(tried: dict[str, Any], tmp_path: Path) -> None:
    tried["step"] = 1.2
    run(tried, tmp_path / "store", 0, minutes=6)
    said = run(tried, tmp_path / "store", 0, minutes=5)
    assert "time: at most about 0 s on" in said


def test_a_damaged_choice_is_named(tried: dict[str, Any], tmp_path: Path) -> None:
    run(tried, tmp_path / "store", 0)
    (file,) = (tmp_path / "store" / ".progress" / "try").iterdir()
    file.write_text('{"layers": 3')
    with pytest.raises(UserError, match=f"{file} is damaged; delete it"):
        run(tried, tmp_path / "store", 0)


def test_the_whole_recipe_and_the_smallest(tried: dict[str, Any], tmp_path: Path) -> None:
    tried["step"] = 1000.0
    said = run(tried, tmp_path / "store", 0, whole=True)
    assert "cut" not in said
    said = run(tried, tmp_path / "other", 0)  # nothing fits
    assert "50 of 150 steps, 2 of 3 layers, texts cut at 128 tokens (all of it takes about " in said
    # 20 s, two runs and the one that writes the model; half of the tokens: 5 + 50 * 3/4 * 1/2 * 3,000 s each
    assert "also the smallest size takes longer than the 30 min" in said
    tried["longest"] = 128
    assert "50 of 150 steps, 2 of 3 layers (all" in run(tried, tmp_path / "third", 0)


def test_what_the_user_sets_is_not_cut(tried: dict[str, Any], tmp_path: Path) -> None:
    tried["step"] = 1.2
    said = run(tried, tmp_path / "store", 0, settings=("encoder.layers=3", "schedule.steps=150"), minutes=5)
    assert "cut to answer in time: texts cut at 128 tokens (" in said


@pytest.mark.parametrize("given", [{"minutes": 0.0}, {"minutes": float("nan")}, {"minutes": 5.0, "whole": True}])
def test_limits_that_are_none(tried: dict[str, Any], tmp_path: Path, given: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="minutes"):
        run(tried, tmp_path / "store", **given)


def test_a_dry_run_keeps_nothing(tried: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe, "sweep_file", lambda *given, **more: None)
    assert "time: at most about" in run(tried, tmp_path / "store", dry_run=True)
    assert not (tmp_path / "store").exists()


def test_the_pace_of_a_real_run(tmp_path: Path) -> None:
    for split in ("train", "dev", "test"):
        (tmp_path / f"{split}.csv").write_text("text,label\n" + "good film,pos\nbad film,neg\n" * 10)
    config = RunConfig.model_validate(
        {
            "method": "static",
            "n": 2,
            "data": {"task": str(tmp_path)},
            "encoder": {"name": "random:1x32"},
            "batch": {"end_task": 4, "auxiliary": 4},
            "schedule": {"steps": 20, "eval_every": 10},
        }
    )
    pace = recipe.pace_of(resolve(config), 1)
    assert min(pace.start, pace.step) > 0
    # Two evaluations of 20 dev texts and 20 test texts, each a third of one of the 8 texts of a step.
    assert pace.score == pytest.approx(pace.step * 60 / 8 / 3)
    assert pace.seconds(resolve(config)) == pytest.approx(pace.start + 20 * pace.step + pace.score)


def test_other_labelled_sets_are_the_objectives(tried: dict[str, Any], tmp_path: Path) -> None:
    """Fine-tuning may see as many texts as the others; the answer says which sets the short trials kept."""
    (tmp_path / "maybe.csv").write_text("text,label\na,x\n")
    tried["dev"] |= {"pooled": 0.65, "halving": 0.75}
    said = run(tried, tmp_path / "store", sets=["tweets", str(tmp_path / "maybe.csv")])
    rows = "finetune-tied, pooled, static-other_labels n=all, halving-other_labels n=all"
    assert f"12 runs ({rows}; seeds 0, 1, 2), 12 to do" in said
    assert "by dev, halving-other_labels n=all is worth it: its accuracy on test is 64.00 %, that of plain" in said
    assert "In 3 searches by short trials, these sets helped: tweets in 3, maybe in 1." in said
    (space,) = tried["spaces"]
    assert yaml.safe_load(space)["blocks"][0]["data"] == ["external:tweets", "external:maybe"]
    sweep = yaml.safe_load(tried["files"][0])
    assert sweep["base"]["data"] == {"external": ["tweets", str(tmp_path / "maybe.csv")]}
    assert sweep["methods"][1]["method"]["pooled_steps"] == sweep["base"]["schedule"]["steps"]


def test_a_set_that_is_not_there(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["try", "movie", "--with", str(tmp_path / "no.csv"), "--store", str(tmp_path / "store")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: data.external: ")
    assert "no.csv" in line
    assert not (tmp_path / "store").exists()
