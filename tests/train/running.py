"""Build and step small runs by hand."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from aang_ray.config import parse_config
from aang_ray.config.load import override
from aang_ray.config.run import RunConfig
from aang_ray.train.device import choose_compute
from aang_ray.train.plan import resolve
from aang_ray.train.setup import build
from aang_ray.train.step import Stepper

PAPER = {
    "name": "aang",
    "aux_lr": 0.1,
    "update": "sgd",
    "dev_head": "refit",
    "dev_calibration": False,
    "dev_memory": 0.0,
}
"""The search of the paper."""


def tiny_config(tiny: dict[str, Any], *settings: str) -> RunConfig:
    """The small run with settings changed, resolved. AANG searches as in the paper, unless a setting says otherwise."""
    mapping = override(copy.deepcopy(tiny), settings)
    method = mapping.get("method", {})
    method = {"name": method} if isinstance(method, str) else method
    if method.get("name", "aang") == "aang":
        mapping["method"] = PAPER | method
    return resolve(parse_config(mapping, "test"))


def stepper(config: RunConfig, dtype: torch.dtype = torch.float32) -> Stepper:
    """A stepper on the CPU, in a dtype of choice."""
    setup = build(config, choose_compute(config))
    setup.encoder.to(dtype)
    setup.heads.to(dtype)
    return Stepper(setup)


def run_steps(config: RunConfig, steps: int, dtype: torch.dtype = torch.float32) -> Stepper:
    """Run the first steps."""
    made = stepper(config, dtype)
    for step in range(steps):
        made.step(made.prepare(step))
    return made


def parameters(made: Stepper) -> Tensor:
    """All parameters of body and heads as one vector."""
    setup = made.setup
    return torch.cat([p.detach().flatten() for m in (setup.encoder, setup.heads) for p in m.parameters()])
