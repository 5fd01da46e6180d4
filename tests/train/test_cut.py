"""A run that is cut at a step has a row with status `cut`, and can be continued as if it had not been cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from aang_ray.train.control import RunControl
from aang_ray.train.run import run_cell
from tests.train.running import tiny_config
from tests.train.test_checkpoint import numbers


@pytest.mark.parametrize("method", ["finetune", "aang"])
def test_cut_twice_then_to_the_end(tiny: dict[str, Any], tmp_path: Path, method: str) -> None:
    config = tiny_config(tiny, f"method={method}", "schedule.steps=9", "schedule.eval_every=3")
    whole = numbers(run_cell(config))
    for step in (3, 6):
        record = run_cell(config, checkpoints=tmp_path, control=RunControl(until=step))
        again = run_cell(config, checkpoints=tmp_path, control=RunControl(until=step))
        assert numbers(again) == numbers(record), "told once more, it is where it was told to be"
        row = record.result
        assert (row.status, row.steps, row.test, row.test_clean, row.error) == ("cut", step, None, None, None)
        assert [entry.step for entry in record.history] == list(range(3, step + 1, 3))
        assert row.dev is not None
        best = max(entry.dev.accuracy for entry in record.history if entry.dev is not None)
        assert row.dev.accuracy == best
    assert numbers(run_cell(config, checkpoints=tmp_path)) == whole
