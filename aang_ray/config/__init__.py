"""The configuration of a run: validated, immutable and hashable."""

from aang_ray.config.load import load_config, parse_config
from aang_ray.config.methods import AangConfig, FinetuneConfig, MethodConfig, StaticConfig
from aang_ray.config.run import RunConfig
from aang_ray.config.sections import (
    BatchConfig,
    DataConfig,
    EncoderConfig,
    Fingerprints,
    GradientsConfig,
    ObjectivesConfig,
    OptimConfig,
    ResourcesConfig,
    ScheduleConfig,
)

__all__ = [
    "AangConfig",
    "BatchConfig",
    "DataConfig",
    "EncoderConfig",
    "FinetuneConfig",
    "Fingerprints",
    "GradientsConfig",
    "MethodConfig",
    "ObjectivesConfig",
    "OptimConfig",
    "ResourcesConfig",
    "RunConfig",
    "ScheduleConfig",
    "StaticConfig",
    "load_config",
    "parse_config",
]
