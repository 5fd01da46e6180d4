"""The methods by name, one file for each family, and what each can be told."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from aang_ray.config.methods.aang import AangConfig
from aang_ray.config.methods.base import MethodSection
from aang_ray.config.methods.plain import FinetuneConfig, StaticConfig

MethodConfig = Annotated[FinetuneConfig | StaticConfig | AangConfig, Field(discriminator="name")]

__all__ = ["AangConfig", "FinetuneConfig", "MethodConfig", "MethodSection", "StaticConfig"]
