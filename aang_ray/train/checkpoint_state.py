"""Everything that an optimiser step changes, as plain values, and back.

Random streams are not part of it: batches are a function of (seed, step), and dropout is seeded at every step
(semantics section 2.1).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from aang_ray.train.step import Stepper


def stepper_state(stepper: Stepper) -> dict[str, Any]:
    """Body, heads, optimiser, schedule, method, phi* and the size of a forward pass."""
    setup = stepper.setup
    return {
        "body": dict(setup.encoder.state_dict()),
        "heads": dict(setup.heads.state_dict()),
        "optimizer": stepper.optimizer.state_dict(),
        "schedule": stepper.schedule.state_dict(),
        "method": setup.method.state_dict(),
        "dev_head": None if stepper.dev_head is None else dict(stepper.dev_head.state_dict()),
        "micro": stepper.micro.texts,
        "round": stepper.round_state(),
    }


def restore_stepper(stepper: Stepper, state: Mapping[str, Any]) -> None:
    """Take back what `stepper_state` gave.

    A stated `batch.micro` stays as it is: it changes rounding alone.

    Raises:
        KeyError, RuntimeError, ValueError: for a state of another model.
    """
    setup = stepper.setup
    setup.encoder.load_state_dict(state["body"])
    setup.heads.load_state_dict(state["heads"])
    stepper.optimizer.load_state_dict(state["optimizer"])
    stepper.schedule.load_state_dict(state["schedule"])
    setup.method.load_state_dict(state["method"])
    stepper.dev_head = None if state["dev_head"] is None else _dev_head(state["dev_head"], setup.compute.device)
    if not stepper.micro.fixed:
        stepper.micro.texts = int(state["micro"])
    stepper.restore_round(state["round"])


def _dev_head(parameters: Mapping[str, Tensor], device: torch.device) -> nn.Module:
    """phi* (Linear, Tanh, Linear) with these parameters: between two fits it outlives the step that fitted it."""
    classes, hidden = parameters["2.weight"].shape
    dtype = parameters["2.weight"].dtype
    first = nn.Linear(hidden, hidden, device=device, dtype=dtype)
    head = nn.Sequential(first, nn.Tanh(), nn.Linear(hidden, classes, device=device, dtype=dtype))
    head.load_state_dict(parameters)
    return head.requires_grad_(False)
