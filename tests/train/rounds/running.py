"""Small runs of rounds."""

from __future__ import annotations

from typing import Any

import torch

from aang_ray.config.run import RunConfig
from aang_ray.train.device import choose_compute
from aang_ray.train.rounds import RoundStepper, make_stepper
from aang_ray.train.setup import build
from aang_ray.train.workers.group import Workers
from tests.train.running import tiny_config

PLAIN = ("encoder.dropout=0.0", "encoder.head_dropout=0.0")


def config_of(tiny: dict[str, Any], method: str, *settings: str) -> RunConfig:
    """Two objectives beside the end task; `method` as in `alphavil, round_steps: 2`."""
    return tiny_config(tiny, f"method={{name: {method}}}", "n=2", *settings)


def rounds(config: RunConfig, workers: Workers | None = None, dtype: torch.dtype = torch.float64) -> RoundStepper:
    """A stepper for a configuration of a method with rounds."""
    setup = build(config, choose_compute(config), workers)
    setup.encoder.to(dtype)
    setup.heads.to(dtype)
    made = make_stepper(setup)
    assert isinstance(made, RoundStepper)
    return made


def take(made: RoundStepper, steps: int, first: int = 0) -> None:
    for step in range(first, steps):
        made.step(made.prepare(step))
