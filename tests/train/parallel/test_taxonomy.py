"""Two workers end with the parameters of one, also with noise, deletions and tokens that the model samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aang_ray.train.device import choose_compute
from aang_ray.train.setup import build
from aang_ray.train.step import Stepper
from aang_ray.train.workers.group import Workers
from tests.train.parallel.processes import together
from tests.train.running import parameters, tiny_config
from tests.train.test_taxonomy import NO_DROPOUT, SPACE, space

STEPS = 5


def run(workers: Workers, settings: dict[str, Any]) -> dict[str, Tensor]:
    """Parameters and the method's state after some steps."""
    config = tiny_config(settings, *NO_DROPOUT, "method.aux_lr=1.0")
    setup = build(config, choose_compute(config), workers)
    setup.encoder.double()
    setup.heads.double()
    made = Stepper(setup)
    for step in range(STEPS):
        made.step(made.prepare(step))
    state = {key: value for key, value in setup.method.state_dict().items() if isinstance(value, Tensor)}
    return {"parameters": parameters(made), **state}


def test_two_workers_end_as_one(tiny: dict[str, Any], tmp_path: Path) -> None:
    settings = {**tiny, "space": space(tmp_path, SPACE), "n": 8, "batch": {**tiny["batch"], "auxiliary": 40}}
    expected = run(Workers(), settings)
    for found in together(2, tmp_path / "two", run, settings):
        assert isinstance(found, dict), found
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-9)
