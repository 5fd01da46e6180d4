"""A run that is killed at random moments and started again gives the same numbers as an undisturbed one."""

from __future__ import annotations

import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from aang_ray.config import parse_config
from aang_ray.store import Store
from aang_ray.store.schema import CellRecord
from aang_ray.train.checkpoint import checkpoint_folder
from aang_ray.train.plan import resolve
from aang_ray.train.run import run_cell
from tests.integration.conftest import Start, Started
from tests.train.conftest import write_encoder, write_task

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]

STEPS = 160
METHODS: list[dict[str, Any]] = [
    {"name": "finetune"},
    {"name": "static"},
    {"name": "aang", "head_refit_every": 4, "meta_every": 3},
]

# Runs those of the cells that have no row, with a checkpoint after every step.
RUN = """
import json, sys
from aang_ray.config import parse_config
from aang_ray.store import Store
from aang_ray.train.checkpoint import checkpoint_folder, discard
from aang_ray.train.plan import resolve
from aang_ray.train.run import run_cell

store = Store(sys.argv[1])
checkpoints = checkpoint_folder(store.uri)
for value in json.loads(sys.argv[2]):
    config = resolve(parse_config(value, "test"))
    if config.cell not in store.done():
        print("cell", config.cell, flush=True)
        store.write(run_cell(config, checkpoints=checkpoints))
        discard(checkpoints, config.cell)
"""


def cells(folder: Path) -> list[dict[str, Any]]:
    """One run of the tiny task with each method."""
    task = write_task(folder / "task", {"train": 80, "dev": 40, "test": 40})
    encoder = write_encoder(folder / "encoder")
    base = {
        "data": {"task": str(task)},
        "encoder": {"name": str(encoder)},
        "batch": {"end_task": 16, "auxiliary": 24, "dev": 8, "dev_head": 8},
        "schedule": {"steps": STEPS, "eval_every": 7},
        "precision": "fp32",
        "resources": {"device": "cpu", "threads": 1, "checkpoint_minutes": 0},
    }
    return [{**base, "method": method} for method in METHODS]


def numbers(record: CellRecord) -> dict[str, Any]:
    """A record without its times."""
    result = {key: value for key, value in vars(record.result).items() if key not in ("seconds", "finished_at")}
    history = [{**vars(row), "seconds": 0.0} for row in record.history]
    return {"result": result, "history": history, "weights": record.weights}


def records(store: Path) -> dict[str, dict[str, Any]]:
    """Records of the store, by method."""
    opened = Store(store)
    return {record.result.method: numbers(record) for record in map(opened.record, opened.done())}


def wait_for_step(running: Started, store: Path, cell: str, step: int) -> None:
    """Wait until the cell has a checkpoint of this step or a later one."""

    def there() -> bool:
        names = [path.name for path in (Path(checkpoint_folder(store)) / cell).glob("last-*")]
        return any(int(name.split("-")[1]) >= step for name in names)

    running.wait_for(there, 90, pause=0.002)


def test_killed_at_random_moments(
    start: Start, environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AANG_CACHE", environment["AANG_CACHE"])
    values, store, chance = cells(tmp_path), tmp_path / "store", random.Random()
    configs = [resolve(parse_config(value, "test")) for value in values]
    expected = {config.method.name: numbers(run_cell(config)) for config in configs}
    command = [sys.executable, "-c", RUN, str(store), json.dumps(values)]
    moments = {config.method.name: chance.randint(1, STEPS // 8) for config in configs}
    for config in configs:
        running = start(command, environment)
        wait_for_step(running, store, config.cell, moments[config.method.name])
        time.sleep(chance.uniform(0.0, 0.05))
        running.kill()
        assert config.method.name not in records(store), "the row came too early to kill its run"
    last = start(command, environment)
    assert last.wait(120) == 0, last.output
    ran = [line for line in last.output.splitlines() if line.startswith("cell ")]
    assert ran == [f"cell {configs[-1].cell}"], "finished cells did not run again"
    assert records(store) == expected, moments
    assert not list(Path(checkpoint_folder(store)).iterdir()), "the checkpoints of finished cells are removed"
