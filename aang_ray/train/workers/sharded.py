"""The optimiser of several workers.

A module of its own because PyTorch's sharded optimiser takes seconds to import, and runs on one worker do not use it.
"""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.optim import Optimizer

from aang_ray.train.workers.group import Workers, raising_worker_lost


class Sharded(ZeroRedundancyOptimizer):
    """ZeRO-1: each worker keeps the optimiser's state of its share of the parameters (Rajbhandari et al. 2020).

    After a step every worker sends the others the parameters that it updated. `plain` is an optimiser that has not made
    a step; its parameter groups and settings are used.
    """

    def __init__(self, plain: Optimizer, workers: Workers) -> None:
        known = signature(type(plain)).parameters  # `defaults` also has entries that are not arguments
        defaults = {name: value for name, value in plain.defaults.items() if name in known}
        super().__init__(
            [dict(group) for group in plain.param_groups], type(plain), process_group=workers.tensors, **defaults
        )
        self._workers = workers
        self.bytes = sum(p.nbytes for group in self.param_groups for p in group["params"])
        """Number of bytes that all workers together send in a step: every parameter once."""

    def step(self, closure: Any = None, **settings: Any) -> Any:
        with raising_worker_lost():
            return super().step(closure, **settings)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of an unsharded optimiser on the first worker, {} on the others. All must call this."""
        with raising_worker_lost():
            self.consolidate_state_dict(to=0)
        if not self._workers.first:
            return {}
        state: dict[str, Any] = super().state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load this worker's share of a state that a sharded or an unsharded optimiser has saved."""
        # Pass a copy, because PyTorch deletes the other workers' part from the dictionary.
        super().load_state_dict({**state_dict, "state": dict(state_dict["state"])})
        for parameter, state in self.optim.state.items():
            step = state.get("step")
            if isinstance(step, torch.Tensor) and self.optim.defaults.get("fused"):
                state["step"] = step.to(parameter.device)
