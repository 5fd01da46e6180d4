"""Models that a sweep keeps: which ones, and that their export needs no training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aang_ray.cli import main
from aang_ray.config import RunConfig
from aang_ray.errors import UserError
from aang_ray.report.logged import best_cells, best_run
from aang_ray.store import Store
from aang_ray.store.files import open_location
from aang_ray.sweep.command import check_keeps
from aang_ray.sweep.trial import run_and_store
from aang_ray.train.export import load_classifier
from aang_ray.train.keep import FOLDER, keep_only, kept_models, unpack_model
from tests.train.running import tiny_config

STEPS = ("schedule.steps=6", "schedule.eval_every=3")


@pytest.fixture(scope="module")
def swept(tiny: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, list[RunConfig]]:
    """A store with two learning rates of fine-tuning and one run of static, two seeds each, run as trials that keep."""
    store = Store(tmp_path_factory.mktemp("kept"))
    rates = [("method=finetune", "optim.body_lr=1e-3"), ("method=finetune", "optim.body_lr=1e-4"), ("method=static",)]
    configs = [tiny_config(tiny, *rate, *STEPS, f"seed={seed}") for rate in rates for seed in (0, 1)]
    for config in configs:
        reports: list[dict[str, Any]] = []
        run_and_store(config, store, reports.append, keep=True)
        assert reports[-1]["status"] == "done", "its row was written before its model, and is its own"
    return store, configs


def kept(store: Store) -> set[str]:
    return kept_models(open_location(store.uri))


def test_the_best_seed_of_each_configuration_then_the_best_run_of_each_row(
    swept: tuple[Store, list[RunConfig]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store, configs = swept
    dev = {config.cell: store.record(config.cell).result.dev for config in configs}
    best = [max(configs[at : at + 2], key=lambda one: dev[one.cell].accuracy).cell for at in (0, 2, 4)]  # type: ignore[union-attr]
    assert kept(store) == set(best)
    (task,) = {config.task_name for config in configs}
    _, winner = best_run(store, task)
    assert keep_only(store, best_cells(store)) == 2
    assert winner in kept(store)
    assert len(kept(store) & {config.cell for config in configs[:4]}) == 1, "one of the two learning rates"

    def never(*_: object, **__: object) -> None:
        raise AssertionError("it was trained again")

    monkeypatch.setattr("aang_ray.train.run.run_cell", never)
    folder = tmp_path / "model"
    assert main(["export", "--best", task, "-o", str(folder), "--store", store.uri]) == 0
    assert f"The model is in {folder}" in capsys.readouterr().out.replace("\n", " ")
    assert json.loads((folder / "run.json").read_text())["result"]["cell"] == winner
    assert "The same configuration with the seeds 0, 1" in (folder / "README.md").read_text()
    rows = store.predictions({winner}).to_pylist(maps_as_pydicts="strict")
    classifier = load_classifier(folder)
    lines = (Path(configs[0].data.task) / "test.jsonl").read_text().splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    _, probabilities = classifier.predict(texts)
    stored = [[row["probabilities"][label] for label in classifier.labels] for row in rows if row["split"] == "test"]
    np.testing.assert_array_equal(probabilities, np.array(stored, dtype=np.float32))


def test_a_run_without_a_kept_model_and_a_damaged_one(swept: tuple[Store, list[RunConfig]], tmp_path: Path) -> None:
    store, _ = swept
    assert not unpack_model(store, "0" * 16, tmp_path / "model")
    cell = sorted(kept(store))[0]
    archive = Path(store.uri) / FOLDER / f"{cell}.tar"
    whole = archive.read_bytes()
    archive.write_bytes(b"no archive")
    try:
        with pytest.raises(UserError, match="is damaged"):
            unpack_model(store, cell, tmp_path / "model")
        assert not (tmp_path / "model").exists()
    finally:
        archive.write_bytes(whole)


def test_a_row_whose_best_model_was_never_kept_loses_none(tmp_path: Path) -> None:
    store = Store(tmp_path)
    (tmp_path / FOLDER).mkdir()
    for cell in ("a", "b", "c", "d"):
        (tmp_path / FOLDER / f"{cell}.tar").touch()
    assert keep_only(store, [("a", ["a", "b"]), ("x", ["x", "c"])]) == 3
    assert kept(store) == {"a", "c", "d"}


def test_only_texts(tmp_path: Path) -> None:
    digits = RunConfig.model_validate({"data": {"task": "digits-left"}, "encoder": {"name": "lenet"}})
    with pytest.raises(UserError, match="only classifiers of text are kept; digits-left is a task of"):
        check_keeps([RunConfig(), digits])
