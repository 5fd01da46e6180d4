"""Methods that weigh the losses by the losses themselves, or by chance, through TorchJD's scalarizations."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt

from aang_ray.config.methods.base import MethodSection


class RandomConfig(MethodSection):
    """Random loss weighting (Lin et al. 2022): the softmax of normal numbers, drawn anew at every step."""

    name: Literal["random"] = "random"
    auxiliary: ClassVar[bool] = True


class UncertaintyConfig(MethodSection):
    """Uncertainty weighting (Kendall et al. 2018): a learned log-variance for each loss."""

    name: Literal["uncertainty"] = "uncertainty"
    auxiliary: ClassVar[bool] = True
    lr: NonNegativeFloat = 0.1
    """Learning rate of the log-variances, plain SGD; 0 leaves all weights at 1/2."""


class DwaConfig(MethodSection):
    """Dynamic weight average (Liu et al. 2019): a loss that falls more slowly than the others weighs more."""

    name: Literal["dwa"] = "dwa"
    auxiliary: ClassVar[bool] = True
    temperature: PositiveFloat = 2.0
    """Larger is closer to equal weights."""
    epoch_steps: PositiveInt = 30
    """Steps whose losses are averaged before they are compared with the averages before."""


ScalarizationConfig = RandomConfig | UncertaintyConfig | DwaConfig
