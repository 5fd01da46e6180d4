"""The quality benchmark's grid: its rows are valid runs of this version, in the documented order."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def quality() -> ModuleType:
    spec = importlib.util.spec_from_file_location("quality", ROOT / "benchmarks" / "quality.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_rows_see_the_same_end_task_examples(quality: ModuleType, tiny_quality: dict[str, Any]) -> None:
    configs = {row: quality.configuration("movie", row, 2, Path("none"), 0) for row in quality.ROWS}
    assert len({config.cell for config in configs.values()}) == len(configs) == 12
    assert {(config.schedule.steps, config.batch.end_task) for config in configs.values()} == {(188, 32)}
    assert {config.optim for config in configs.values()} == {configs["finetune"].optim}
    # TAPT sees as many auxiliary texts in its stage as the others in their steps.
    assert configs["tapt"].method.pretraining_texts == 188 * configs["aang-td"].batch.auxiliary
    assert all(config.resources.threads == 1 for config in configs.values())


@pytest.fixture
def tiny_quality(monkeypatch: pytest.MonkeyPatch, quality: ModuleType, tmp_path: Path) -> dict[str, Any]:
    """A task and an encoder on disk, so that nothing is downloaded."""
    from tests.train.conftest import write_encoder, write_task

    task = write_task(tmp_path / "task", {"train": 8, "dev": 4, "test": 4})
    settings = {"name": str(write_encoder(tmp_path / "encoder"))}
    monkeypatch.setitem(quality.BASE, "encoder", settings)
    monkeypatch.setitem(quality.TASKS, "movie", {"task": str(task)})
    return settings


def test_whole_seeds_of_the_required_tasks_come_first(quality: ModuleType) -> None:
    cells = [cell for cell in quality.grid([0, 1, 2]) if cell[2] == quality.LAYERS]
    rows = len(quality.ROWS)
    assert len(cells) == len(set(cells)) == 4 * 3 * rows
    for seed in range(3):
        part = cells[2 * rows * seed : 2 * rows * (seed + 1)]
        assert {(task, number) for task, _, _, number in part} == {("movie", seed), ("citation_intent", seed)}
    assert {task for task, *_ in cells[6 * rows :]} == {"tweets", "sciie"}


def test_a_row_without_runs_is_shown_as_missing(quality: ModuleType) -> None:
    entry = quality.summary("sciie", "upgrad", 2, [])
    assert (entry["seeds"], entry["dev"], entry["test"], entry["test_sd"]) == ([], None, None, None)


def test_the_readme_shows_the_table_as_it_came_out(quality: ModuleType) -> None:
    entries = json.loads((ROOT / "benchmarks" / "results" / "quality.json").read_text(encoding="utf-8"))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = readme.partition("<!-- quality -->")[2].partition("<!-- /quality -->")[0]
    assert shown.strip() == quality.table(entries)


def test_a_cell_of_the_table(quality: ModuleType) -> None:
    entry = {"seeds": [0, 1, 2], "test": 0.81267, "test_sd": 0.00636}
    assert quality._cell(entry) == "81.27 ± 0.64 (3)"
    assert quality._cell({"seeds": [0], "test": 0.75, "test_sd": None}) == "75.00 (1)"
    assert quality._cell({"seeds": [], "test": None, "test_sd": None}) == "–"
