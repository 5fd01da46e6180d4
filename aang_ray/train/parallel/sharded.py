"""ZeRO-1: each worker keeps the optimiser's state of its share of the parameters alone (Rajbhandari et al. 2020)."""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.optim import Optimizer

from aang_ray.train.parallel.workers import Workers, losing


class Sharded(ZeroRedundancyOptimizer):
    """PyTorch's optimiser of shards; after its step every worker sends the parameters that it updated."""

    def __init__(self, plain: Optimizer, workers: Workers) -> None:
        """Takes groups, rates and settings of an optimiser that has not made a step."""
        known = signature(type(plain)).parameters  # some defaults are no settings
        defaults = {name: value for name, value in plain.defaults.items() if name in known}
        super().__init__(
            [dict(group) for group in plain.param_groups], type(plain), process_group=workers.tensors, **defaults
        )
        self._workers = workers
        self.bytes = sum(p.nbytes for group in self.param_groups for p in group["params"])
        """What the workers send each other in a step: every parameter once."""

    def step(self, closure: Any = None, **settings: Any) -> Any:
        with losing():
            return super().step(closure, **settings)

    def state_dict(self) -> dict[str, Any]:
        """As an optimiser that is not sharded has it, on the first worker; called by all. Nothing on the others."""
        with losing():
            self.consolidate_state_dict(to=0)
        if not self._workers.first:
            return {}
        state: dict[str, Any] = super().state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take this worker's share of a state, sharded or not when it was saved."""
        # The original forgets what is not its own in the dictionary that it is given.
        super().load_state_dict({**state_dict, "state": dict(state_dict["state"])})
        for parameter, state in self.optim.state.items():
            step = state.get("step")
            if isinstance(step, torch.Tensor) and self.optim.defaults.get("fused"):
                state["step"] = step.to(parameter.device)
