"""AANG and META-TARTAN: learned weights."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import NonNegativeFloat, PositiveInt

from aang_ray.config.methods.base import MethodSection
from aang_ray.config.section import HalfOpen, Semantics


class AangConfig(MethodSection):
    """AANG: factored weights and lambda learned by gradient agreement with the dev loss."""

    name: Literal["aang"] = "aang"
    auxiliary: ClassVar[bool] = True
    samples_dev: ClassVar[bool] = True
    aux_lr: NonNegativeFloat = 0.1
    """Learning rate of the factors of the objectives' weights."""
    sopt_lr: NonNegativeFloat = 0.1
    """Learning rate of (a_E, a_X), the logits of lambda."""
    score: Literal["cosine", "dot"] = "cosine"
    """Agreement of an objective's gradient with the dev gradient."""
    jacobian: Literal["identity", "softmax"] = "identity"
    """`softmax` is the derivation through w and lambda; `identity` what was published."""
    meta_every: PositiveInt = 3
    """Steps over which the meta-gradient is averaged before it is applied."""
    head_refit_every: PositiveInt = 1
    """Steps between fits of the dev head."""
    dev_head: Literal["refit", "live"] = "refit"
    """The dev loss goes through a freshly fitted head, or through the end-task head."""
    dev_sample: Semantics = "sound"
    """Where the dev head's examples come from: dev (`sound`) or train (`published`)."""
    auxiliary_score: Semantics = "sound"
    """Score of the joint auxiliary gradient: of sum w_k g_k, or of sum (active labels) g_k."""
    meta_dev_fraction: HalfOpen = 0.0
    """Part of dev set aside for the meta part alone; 0: all of dev serves both, as in the paper."""

    @property
    def uses_dev(self) -> bool:
        return self.aux_lr > 0 or self.sopt_lr > 0
