"""Creates the method of a configuration. `MethodConfig` in config/methods.py lists all methods."""

from __future__ import annotations

from importlib import import_module

import torch

from aang_ray.config.run import RunConfig
from aang_ray.methods.base import Method
from aang_ray.objectives.space import Space


def make_method(config: RunConfig, space: Space | None, device: torch.device) -> Method:
    """Return the method of a configuration in its initial state; only its own module is imported."""
    module, _, name = config.method.implementation.partition(":")
    kind: type[Method] = getattr(import_module(f"aang_ray.methods.{module}"), name)
    return kind.build(config, space, device)
