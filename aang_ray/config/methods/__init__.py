"""The methods by name, one file for each family, and what each can be told."""

from __future__ import annotations

from typing import Annotated, get_args

from pydantic import Field

from aang_ray.config.methods.aang import AangConfig
from aang_ray.config.methods.aggregations import AggregationConfig, AggregationSection
from aang_ray.config.methods.attittud import AttittudConfig
from aang_ray.config.methods.base import MethodSection
from aang_ray.config.methods.plain import FinetuneConfig, MtTartanConfig, StaticConfig
from aang_ray.config.methods.rounds import AlphavilConfig, DiwConfig, RoundsSection
from aang_ray.config.methods.scalarizations import ScalarizationConfig
from aang_ray.config.methods.similarity import SimilarityConfig
from aang_ray.config.methods.tapt import DaptConfig, PretrainSection, TaptConfig, TaptDaptConfig

MethodConfig = Annotated[
    FinetuneConfig
    | StaticConfig
    | AangConfig
    | TaptConfig
    | DaptConfig
    | TaptDaptConfig
    | MtTartanConfig
    | AggregationConfig
    | ScalarizationConfig
    | SimilarityConfig
    | AttittudConfig
    | AlphavilConfig
    | DiwConfig,
    Field(discriminator="name"),
]


def method_sections() -> dict[str, type[MethodSection]]:
    """Each method's section by the method's name."""
    union, _ = get_args(MethodConfig)
    return {str(section.model_fields["name"].default): section for section in get_args(union)}


__all__ = [
    "AangConfig",
    "AggregationConfig",
    "AggregationSection",
    "AlphavilConfig",
    "AttittudConfig",
    "DaptConfig",
    "DiwConfig",
    "FinetuneConfig",
    "MethodConfig",
    "MethodSection",
    "MtTartanConfig",
    "PretrainSection",
    "RoundsSection",
    "ScalarizationConfig",
    "SimilarityConfig",
    "StaticConfig",
    "TaptConfig",
    "TaptDaptConfig",
    "method_sections",
]
