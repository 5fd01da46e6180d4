"""Methods that weigh objectives by how their gradients compare with the end task's."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import NonNegativeFloat

from aang_ray.config.methods.base import MethodSection


class CosineGatingConfig(MethodSection):
    """Cosine gating (Du et al. 2018): an auxiliary gradient counts only where it agrees with the end task's."""

    name: Literal["cosine_gating"] = "cosine_gating"
    auxiliary: ClassVar[bool] = True
    own_direction: ClassVar[bool] = True
    mode: Literal["gate", "weigh"] = "gate"
    """`gate`: all of it or nothing; `weigh`: times max(0, cosine)."""


class GradnormConfig(MethodSection):
    """GradNorm (Chen et al. 2018): weights that bring all gradients to a common scale."""

    name: Literal["gradnorm"] = "gradnorm"
    auxiliary: ClassVar[bool] = True
    alpha: NonNegativeFloat = 1.5
    """How strongly a loss that falls more slowly than the others is pulled up; 0: equal norms."""
    lr: NonNegativeFloat = 0.025
    """Learning rate of the weights, plain SGD; 0 leaves them equal."""


SimilarityConfig = CosineGatingConfig | GradnormConfig
