"""The configuration of a run: validated, immutable and hashable."""

from aang_ray.config.load import load_config, parse_config
from aang_ray.config.run import RunConfig
from aang_ray.config.sections import DataConfig, EncoderConfig

__all__ = ["DataConfig", "EncoderConfig", "RunConfig", "load_config", "parse_config"]
