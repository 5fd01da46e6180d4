"""Methods whose body update is an aggregation of the separate gradients, computed by TorchJD."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt

from aang_ray.config.methods.base import MethodSection
from aang_ray.config.section import Fraction

Preference = Literal["uniform", "static"]
"""Weights to start from: `uniform`, 1/m for each of the m gradients; `static`, 1/2 for the end task's."""


class AggregationSection(MethodSection):
    """An aggregation of g_E and of the sampled objectives' gradients."""

    auxiliary: ClassVar[bool] = True
    own_direction: ClassVar[bool] = True


class GramSection(AggregationSection):
    """One whose weights depend on inner products of the gradients alone."""


class PcgradConfig(GramSection):
    """PCGrad (Yu et al. 2020): each gradient loses what conflicts with the others, then all are added."""

    name: Literal["pcgrad"] = "pcgrad"


class MgdaConfig(GramSection):
    """MGDA (Désidéri 2012; Sener and Koltun 2018): the shortest convex combination."""

    name: Literal["mgda"] = "mgda"
    epsilon: PositiveFloat = 1e-3
    """Step of the Frank-Wolfe solver below which it stops."""
    max_iters: PositiveInt = 100
    """Most steps of the Frank-Wolfe solver."""


class CagradConfig(GramSection):
    """CAGrad (Liu et al. 2021): the best worst case within a ball around the mean."""

    name: Literal["cagrad"] = "cagrad"
    c: NonNegativeFloat = 0.5
    """Radius of the ball over the norm of the mean gradient; 0 is the mean."""


class NashMtlConfig(GramSection):
    """Nash-MTL (Navon et al. 2022): the bargaining solution."""

    name: Literal["nash_mtl"] = "nash_mtl"
    max_norm: NonNegativeFloat = 1.0
    """Longest update; 0: no limit."""
    optim_niter: PositiveInt = 20
    """Most rounds of the convex-concave procedure."""


class ImtlGConfig(GramSection):
    """IMTL-G (Liu et al. 2021): equal projections on all gradients."""

    name: Literal["imtl_g"] = "imtl_g"


class AlignedMtlConfig(GramSection):
    """Aligned-MTL (Senushkin et al. 2023): gradients made orthogonal and of one length, then averaged."""

    name: Literal["aligned_mtl"] = "aligned_mtl"
    scale_mode: Literal["min", "median", "rmse"] = "min"
    """That length: of the smallest singular value (`min`, the paper), the median, or their mean square (its code)."""
    preference: Preference = "uniform"


class UpgradConfig(GramSection):
    """UPGrad (Quinton and Rey 2024): each gradient is projected onto what harms nobody, then they are averaged."""

    name: Literal["upgrad"] = "upgrad"
    preference: Preference = "uniform"


class DualProjConfig(GramSection):
    """DualProj (Lopez-Paz and Ranzato 2017): the mean, projected onto what harms nobody."""

    name: Literal["dualproj"] = "dualproj"
    preference: Preference = "uniform"


class GraddropConfig(AggregationSection):
    """GradDrop (Chen et al. 2020): in every coordinate one sign, drawn by its share, survives."""

    name: Literal["graddrop"] = "graddrop"
    end_task_leak: Fraction = 0.0
    """Share of the end task's gradient that always passes."""


AggregationConfig = (
    PcgradConfig
    | MgdaConfig
    | CagradConfig
    | NashMtlConfig
    | ImtlGConfig
    | AlignedMtlConfig
    | UpgradConfig
    | DualProjConfig
    | GraddropConfig
)
