"""From a method's configuration to the method: one line each."""

from __future__ import annotations

import torch

from aang_ray.config.methods import (
    AangConfig,
    AggregationSection,
    AlphavilConfig,
    AttittudConfig,
    CosineGatingConfig,
    DiwConfig,
    DwaConfig,
    FinetuneConfig,
    GradnormConfig,
    MtTartanConfig,
    PretrainSection,
    RandomConfig,
    StaticConfig,
    UncertaintyConfig,
)
from aang_ray.config.run import RunConfig
from aang_ray.errors import UserError
from aang_ray.methods.aang import Aang
from aang_ray.methods.attittud import Attittud
from aang_ray.methods.base import FactorIndex, Method, Weighting
from aang_ray.methods.gradnorm import GradNorm
from aang_ray.methods.plain import CosineGating, Single, Static
from aang_ray.methods.rounds import Alphavil, Diw
from aang_ray.objectives.space import Space


def make_method(config: RunConfig, space: Space | None, device: torch.device) -> Method:
    """The method that a configuration names, with its state at the start."""
    if isinstance(config.method, FinetuneConfig):
        return Single.end_task(device)
    if isinstance(config.method, PretrainSection):
        return Single.auxiliary(device)
    if space is None:
        raise UserError(f"method.name: {config.method.name} needs a space of auxiliary objectives")
    index = FactorIndex.of(space.factors(), [objective.stages for objective in space.objectives])
    weighting = Weighting.zeros(index, device, config.objectives.allocation == "published")
    match config.method:
        case StaticConfig():
            return Static(weighting)
        case AangConfig() as method:
            return Aang(weighting, method)
        case MtTartanConfig():
            return Static(weighting.with_lambda(1 / (1 + (len(space) if config.n == "all" else config.n))))
        case AggregationSection() | RandomConfig() | UncertaintyConfig() | DwaConfig() as method:
            from aang_ray.methods.torchjd import make_torchjd_method  # here: it takes seconds to import

            return make_torchjd_method(method, weighting, config.seed)
        case CosineGatingConfig() as method:
            return CosineGating(weighting, method)
        case GradnormConfig() as method:
            return GradNorm(weighting, method)
        case AttittudConfig() as method:
            return Attittud(weighting, method, config.seed)
        case AlphavilConfig() as method:
            return Alphavil(index.names["A"], device, method)
        case DiwConfig() as method:
            return Diw(index.names["A"], device, method)
