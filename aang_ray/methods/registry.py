"""From a method's configuration to the method: one line each."""

from __future__ import annotations

import torch

from aang_ray.config.methods import AangConfig, FinetuneConfig, StaticConfig
from aang_ray.config.run import RunConfig
from aang_ray.errors import UserError
from aang_ray.methods.aang import Aang
from aang_ray.methods.base import Method
from aang_ray.methods.factors import FactorIndex
from aang_ray.methods.finetune import Finetune
from aang_ray.methods.static import Static
from aang_ray.methods.weighting import Weighting
from aang_ray.objectives.space import Space


def make_method(config: RunConfig, space: Space | None, device: torch.device) -> Method:
    """The method that a configuration names, with its state at the start."""
    if isinstance(config.method, FinetuneConfig):
        return Finetune(device)
    if space is None:
        raise UserError(f"method.name: {config.method.name} needs a space of auxiliary objectives")
    index = FactorIndex.of(space.factors(), [objective.stages for objective in space.objectives])
    weighting = Weighting.zeros(index, device, config.objectives.allocation == "published")
    match config.method:
        case StaticConfig():
            return Static(weighting)
        case AangConfig() as method:
            return Aang(weighting, method)
