"""Methods without settings: fine-tuning and fixed weights."""

from __future__ import annotations

from typing import ClassVar, Literal

from aang_ray.config.methods.base import MethodSection


class FinetuneConfig(MethodSection):
    """The end task alone."""

    name: Literal["finetune"] = "finetune"
    auxiliary: ClassVar[bool] = False


class StaticConfig(MethodSection):
    """Static multitask: lambda = 1/2, every sampled objective weighs 1/n."""

    name: Literal["static"] = "static"
    auxiliary: ClassVar[bool] = True


class MtTartanConfig(MethodSection):
    """MT-TARTAN (Dery et al. 2022): the end task and every sampled objective weigh 1/(1 + n)."""

    name: Literal["mt_tartan"] = "mt_tartan"
    auxiliary: ClassVar[bool] = True
