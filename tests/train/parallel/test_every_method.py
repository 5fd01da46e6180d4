"""Two workers take the steps of one, whatever the method."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from aang_ray.train.device import choose_compute
from aang_ray.train.run import run_cell
from aang_ray.train.setup import build
from aang_ray.train.step import Stepper
from aang_ray.train.workers.group import Workers
from tests.methods.cases import NAMES, case
from tests.train.parallel.processes import together
from tests.train.running import parameters, tiny_config

STEPS = 3
COVERED = ("finetune", "static", "aang")
"""In `test_equality.py`, in many settings."""
CHOSEN = tuple(name for name in NAMES if name not in COVERED and not case(name).runs_elsewhere)
TOLERANCE = {"cagrad": 1e-4, "nash_mtl": 1e-4}
"""Relative; their solvers stop at a tolerance of their own. All others: 1e-6."""


def end(workers: Workers, tiny: dict[str, Any], name: str) -> Tensor:
    """Parameters after some steps, in float64 and without dropout."""
    method = json.dumps({"name": name, **case(name).settings})
    config = tiny_config(tiny, f"method={method}", "n=3", "encoder.dropout=0.0", "encoder.head_dropout=0.0")
    setup = build(config, choose_compute(config), workers)
    setup.encoder.double()
    setup.heads.double()
    made = Stepper(setup)
    for step in range(STEPS):
        made.step(made.prepare(step))
    return parameters(made)


def staged(workers: Workers, tiny: dict[str, Any]) -> dict[str, float]:
    """Every loss of a whole run through all masked-LM stages, without dropout."""
    method = json.dumps({"name": "tapt_dapt", "dapt_steps": 2, "tapt_steps": 2, "batch": 8, "lr": 1e-3})
    settings = ("schedule.steps=3", "schedule.eval_every=1", "encoder.dropout=0.0", "encoder.head_dropout=0.0")
    in_domain = f"data.in_domain={tiny['data']['task']}/in_domain.txt"
    record = run_cell(tiny_config(tiny, f"method={method}", in_domain, *settings), workers=workers)
    losses = {f"dev after {row.step}": row.dev.loss for row in record.history if row.dev}
    return losses | {f"{name} before {row.step}": loss for row in record.history for name, loss in row.losses.items()}


def ends(workers: Workers, tiny: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, float]]:
    return {name: end(workers, tiny, name) for name in CHOSEN}, staged(workers, tiny)


def test_two_workers_are_as_good_as_one(tiny: dict[str, Any], tmp_path: Path) -> None:
    alone, losses = ends(Workers(), tiny)
    assert len(losses) > 6
    for found in together(2, tmp_path, ends, tiny):
        assert not isinstance(found, Exception), found
        for name in CHOSEN:
            difference = float((found[0][name] - alone[name]).norm() / alone[name].norm())
            assert difference == pytest.approx(0.0, abs=TOLERANCE.get(name, 1e-6)), name
        assert found[1] == pytest.approx(losses, rel=1e-4), "fp32"
    assert len({str(vector[:3].tolist()) for vector in alone.values()}) == len(CHOSEN), "the methods differ"
