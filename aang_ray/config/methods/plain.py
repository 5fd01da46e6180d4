"""Methods without settings: fine-tuning and static multitask."""

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
