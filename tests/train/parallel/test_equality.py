"""Any number of workers ends with the parameters of one. (semantics section 8)"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from aang_ray.train.parallel.workers import Workers
from aang_ray.train.precision import choose_compute
from aang_ray.train.setup import build
from aang_ray.train.step import Stepper
from tests.train.parallel.processes import together
from tests.train.running import parameters, tiny_config

STEPS = 20
PLAIN = ["encoder.head_dropout=0", "encoder.dropout=0", "method.head_refit_every=2", "method.aux_lr=10", "method.sopt_lr=10"]
CASES: dict[str, list[str]] = {
    "aang, cosine": PLAIN,
    "aang, cosine, n=1": [*PLAIN, "n=1"],
    "aang, cosine, accumulation": [*PLAIN, "batch.micro=5"],
}


def steps(workers: Workers, tiny: dict[str, Any], settings: list[str], dtype: torch.dtype) -> dict[str, Tensor]:
    config = tiny_config(tiny, *settings)
    setup = build(config, choose_compute(config), workers)
    setup.encoder.to(dtype)
    setup.heads.to(dtype)
    made = Stepper(setup)
    for step in range(STEPS):
        made.step(made.prepare(step))
    found = {"parameters": parameters(made)}
    state = setup.method.state_dict()
    found |= {name: value for name, value in state.items() if isinstance(value, Tensor)}
    return found


def all_cases(workers: Workers, tiny: dict[str, Any]) -> dict[str, Any]:
    return {name: steps(workers, tiny, settings, torch.float64) for name, settings in CASES.items()}


@pytest.mark.parametrize("size", [2])
def test_equal(size: int, tiny: dict[str, Any], tmp_path: Path) -> None:
    alone = all_cases(Workers.alone(), tiny)
    for found in together(size, tmp_path / "w", all_cases, tiny):
        assert not isinstance(found, Exception), found
        for case in CASES:
            for name, value in alone[case].items():
                d = (found[case][name]-value).norm()/value.norm().clamp_min(1e-30)
                print(case, name, float(d), float(value.norm()))
