"""Stand-ins for training, because a sweep's logic does not depend on what a cell computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from aang_ray.config import RunConfig
from aang_ray.store import CellRecord, HistoryRow, ResultRow, Scores

SCORES = Scores(0.75, 0.7, 40, {"neg": 20, "pos": 20}, 0.5)


def fake_resolve(config: RunConfig) -> RunConfig:
    """Resolve a run to 32 and 48 examples a step and 60 steps, without reading data."""
    batch = config.batch.model_copy(update={"end_task": config.batch.end_task or 32, "auxiliary": 48, "dev_head": 32})
    data = config.data.model_copy(update={"metric": config.data.metric or "accuracy"})
    schedule = config.schedule.model_copy(update={"steps": config.schedule.steps or 60})
    return config.model_copy(update={"batch": batch, "data": data, "schedule": schedule})


def done_record(config: RunConfig, **changes: Any) -> CellRecord:
    """The record of a successful run of `config`."""
    values: dict[str, Any] = {
        "cell": config.cell,
        "group": config.group,
        "row": config.row_name,
        "task": config.data.task,
        "method": config.method.name,
        "space": config.space if config.method.auxiliary else None,
        "n": str(config.n) if config.method.auxiliary else None,
        "seed": config.seed,
        "config": config.model_dump(mode="json"),
        "metric": config.data.metric or "accuracy",
        "status": "done",
        "error": None,
        "log_tail": None,
        "dev": SCORES,
        "test": SCORES,
        "test_clean": SCORES,
        "majority": False,
        "best_step": 30,
        "steps": config.schedule.steps or 60,
        "examples": 1920,
        "tokens": 20_000,
        "seconds": 12.0,
        "device": "cpu",
        "precision": "fp32",
        "versions": {"torch": "2"},
        "finished_at": "2026-01-02T03:04:05+00:00",
    }
    return CellRecord(ResultRow(**{**values, **changes}))


def history_row(step: int) -> HistoryRow:
    """A history row of one evaluation."""
    return HistoryRow(step, SCORES, {"end_task": 0.5}, 0.1 * step, 32 * step, 400 * step)


@pytest.fixture
def sweep_file(tmp_path: Path) -> Callable[[str], Path]:
    """Writes a sweep file."""

    def write(text: str) -> Path:
        path = tmp_path / "sweep.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write
