"""The methods by name, and what each can be told."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, NonNegativeFloat, PositiveInt

from aang_ray.config.section import HalfOpen, Section, Semantics


class FinetuneConfig(Section):
    """The end task alone."""

    name: Literal["finetune"] = "finetune"
    auxiliary: ClassVar[bool] = False


class StaticConfig(Section):
    """Static multitask: lambda = 1/2, every sampled objective weighs 1/n."""

    name: Literal["static"] = "static"
    auxiliary: ClassVar[bool] = True


class AangConfig(Section):
    """AANG: factored weights and lambda learned by gradient agreement with the dev loss."""

    name: Literal["aang"] = "aang"
    auxiliary: ClassVar[bool] = True
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


MethodConfig = Annotated[FinetuneConfig | StaticConfig | AangConfig, Field(discriminator="name")]
