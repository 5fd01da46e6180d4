"""Every method completes a whole run, and gives the same result after a stop and a resume."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from aang_ray.train.control import Interrupted
from aang_ray.train.run import run_cell
from tests.methods.cases import NAMES, case
from tests.train.running import tiny_config
from tests.train.test_checkpoint import METHODS, numbers


@pytest.mark.parametrize("name", ["alphavil", "attittud", "diw", "gradnorm", "tapt", "upgrad"])
def test_with_adapters(tiny: dict[str, Any], name: str, tmp_path: Path) -> None:
    method = json.dumps({"name": name, **case(name).settings})
    adapter = "encoder.adapter={rank: 2, targets: all-linear}"
    config = tiny_config(tiny, f"method={method}", "n=3", "schedule.steps=5", "schedule.eval_every=2", adapter)
    plain = run_cell(config)
    assert plain.result.status == "done", plain.result.error
    with pytest.raises(Interrupted):
        run_cell(config, checkpoints=tmp_path, on_evaluation=lambda *_: signal.raise_signal(signal.SIGTERM))
    assert numbers(run_cell(config, checkpoints=tmp_path)) == numbers(plain)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in METHODS and not case(name).runs_elsewhere])
def test_run_stop_and_resume(tiny: dict[str, Any], name: str, tmp_path: Path) -> None:
    method = json.dumps({"name": name, **case(name).settings})
    # Dropout on; the last step comes after an evaluation, so that the resumed run takes steps of its own.
    config = tiny_config(tiny, f"method={method}", "n=3", "schedule.steps=5", "schedule.eval_every=2")
    plain = run_cell(config)
    assert plain.result.status == "done"
    assert plain.result.row == f"{name}-td n=3"
    assert 0.0 <= plain.result.test.accuracy <= 1.0 if plain.result.test else False
    with pytest.raises(Interrupted):
        run_cell(config, checkpoints=tmp_path, on_evaluation=lambda *_: signal.raise_signal(signal.SIGTERM))
    assert numbers(run_cell(config, checkpoints=tmp_path)) == numbers(plain)
    for row in plain.weights:
        assert sum(row.weights.values()) == pytest.approx(1.0, abs=1e-5) or not any(row.weights.values())
