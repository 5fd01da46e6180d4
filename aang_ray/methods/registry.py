"""From a run's configuration to its method. `MethodConfig` in config/methods.py lists the methods."""

from __future__ import annotations

from importlib import import_module

import torch

from aang_ray.config.run import RunConfig
from aang_ray.methods.base import Method
from aang_ray.objectives.space import Space


def make_method(config: RunConfig, space: Space | None, device: torch.device) -> Method:
    """The method that a configuration names, in its initial state.

    Only the module of that method is imported: TorchJD's solvers take seconds to import.

    Raises:
        UserError: if the method needs a space of objectives and there is none.
    """
    module, _, name = config.method.implementation.partition(":")
    kind: type[Method] = getattr(import_module(f"aang_ray.methods.{module}"), name)
    return kind.build(config, space, device)
