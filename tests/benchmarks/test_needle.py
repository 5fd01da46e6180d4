"""The benchmark with a planted truth: its cells are valid runs, its figures are right, and a cell runs."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from aang_ray.data import tasks
from aang_ray.data.modalities import MODALITIES
from aang_ray.objectives import DOMAINS as TAXONOMIES
from aang_ray.store import Store
from aang_ray.train.domain import DOMAINS

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def needle() -> Iterator[ModuleType]:
    """The benchmark, which registers a domain of its own: the tables are put back for other tests."""
    tables = (tasks._CARDS, MODALITIES, TAXONOMIES, DOMAINS)
    before = [dict(table) for table in tables]
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        yield importlib.import_module("needle")
    finally:
        sys.path.pop(0)
        for table, old in zip(tables, before, strict=True):
            table.clear()
            table.update(old)


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AANG_CACHE", str(tmp_path / "cache"))


def test_every_row_is_a_run_of_its_own(needle: ModuleType) -> None:
    cells = [
        needle.configuration(needle.Cell("digits", space, row, n, 0)).cell
        for space in needle.SPACES
        for row in needle.ROWS
        for n in ("all", "3")
    ]
    assert len(set(cells)) == len(cells)


def test_planted_labels_are_wrong_as_often_as_their_name_says(needle: ModuleType) -> None:
    classes_N = np.arange(20_000) % 10
    for noise, share in (("00", 0.0), ("25", 0.25), ("50", 0.5), ("99", 1.0)):
        labels_N = needle.needle_digits.planted_labels(f"labels-{noise}-0", classes_N, seed=1)
        assert np.mean(labels_N != classes_N) == pytest.approx(0.9 * share, abs=0.02)  # a random class may be right
    one, other = (needle.needle_digits.planted_labels(f"labels-99-{i}", classes_N, seed=1) for i in (0, 1))
    assert np.mean(one == other) == pytest.approx(0.1, abs=0.02)


def test_text_sets_share_no_text_and_have_the_noise_that_is_planted(
    needle: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    texts = {source: [(f"{source} {i}", "positive") for i in range(4000)] for source in ("movie", "amazon")}
    monkeypatch.setattr("needle_text.labelled_texts", lambda source: texts[source])
    names = needle.write_text_sets(tmp_path, needle.SPACES["one"], 3)
    rows = [
        [json.loads(line) for line in (tmp_path / name / "train.jsonl").read_text(encoding="utf-8").splitlines()]
        for name in names
    ]
    assert [len(of) for of in rows] == [1998, *[998] * 11]
    assert all(row["label"] == "positive" for row in rows[0])
    assert {row["text"] for row in rows[0]}.isdisjoint(row["text"] for of in rows[1:] for row in of)
    assert np.mean([row["label"] == "positive" for of in rows[1:] for row in of]) == pytest.approx(0.5, abs=0.02)
    graded = needle.write_text_sets(tmp_path / "graded", needle.SPACES["graded"], 3)
    share = [
        np.mean(
            [json.loads(line)["label"] == "positive" for line in (tmp_path / "graded" / name / "train.jsonl").open()]
        )
        for name in graded
    ]
    assert share == pytest.approx([*[1.0] * 4, *[0.75] * 4, *[0.5] * 4], abs=0.07)


def test_a_small_grid_runs_and_is_not_run_again(
    needle: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(needle.STEPS, "digits", 50)
    monkeypatch.setitem(needle.BASE["digits"], "batch", {"end_task": 4, "auxiliary": 12, "dev": 4, "dev_head": 4})
    cells = [needle.Cell("digits", "one", row, "all", seed) for row in ("evidence", "static") for seed in (0, 1)]
    store = Store(tmp_path / "store")
    for cell in cells:
        needle.run(cell, store.uri, float("inf"))
    needle.run_missing(cells, store, 1, 0.0)  # with no time left: nothing is missing
    found = needle.records(cells, store)
    assert set(found) == set(cells)
    entries = [needle.figures({c: r for c, r in found.items() if c.row == row}) for row in ("evidence", "static")]
    needle.compare(entries)
    learned, static = entries
    assert static["share_end"] == pytest.approx([1 / 12, 1 / 12], abs=1e-3)
    assert (static["rank_truth"], static["over_static"]) == (0.0, 0.0)
    assert learned["over_static"] == pytest.approx(learned["test"] - static["test"], abs=0.02)
    assert learned["pairs"] == 2
    assert "| digits | one | all | evidence | 2 |" in needle.table(entries)
    needle.draw(found, "digits", tmp_path / "figure.svg")
    assert (tmp_path / "figure.svg").read_text(encoding="utf-8").startswith("<?xml")


def test_weights_of_sampled_steps_are_averaged(needle: ModuleType) -> None:
    class Logged:
        def __init__(self, step: int, weights: dict[str, float]) -> None:
            self.step, self.weights, self.factors = step, weights, {}

    class Record:
        result = SimpleNamespace(method="aang")
        weights = (Logged(25, {"a": 1.0}), Logged(75, {"a": 0.5, "b": 0.5}), Logged(100, {"a": 0.25, "c": 0.75}))

    found: Any = needle.weights_at(Record(), ["a", "b", "c"], 100)
    assert found.tolist() == pytest.approx([0.375 / 1.625, 0.5 / 1.625, 0.75 / 1.625])
    Record.result = SimpleNamespace(method="halving")  # what it kept in the end counts, not what was in the last rungs
    found = needle.weights_at(Record(), ["a", "c"], 100)
    assert found.tolist() == pytest.approx([0.25, 0.75])


def test_p_values_are_corrected_within_a_space(needle: ModuleType) -> None:
    place = {"domain": "digits", "space": "one", "n": "all", "seeds": [0, 1, 2]}
    entries = [
        {**place, "row": "static", "tests": [50.0, 51.0, 52.0]},
        {**place, "row": "evidence", "tests": [60.0, 61.1, 61.9]},
        {**place, "row": "random", "tests": [50.5, 50.9, 52.2]},
    ]
    needle.compare(entries)
    assert entries[1]["over_static"] == 10.0
    assert entries[1]["p_holm"] == pytest.approx(2 * entries[1]["p"], rel=0.05)
    assert entries[2]["p_holm"] == pytest.approx(entries[2]["p"], rel=0.05)
