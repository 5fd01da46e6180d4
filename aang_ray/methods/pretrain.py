"""The masked-LM stage of TAPT and DAPT: one auxiliary objective and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from aang_ray.gradients.engine import Request, StepGradients
from aang_ray.methods.base import Sampled


class Pretrain:
    """L = L_k of the step's one objective; the end task, without examples in this stage, weighs 0."""

    uses_dev = False
    whole_gradients = False

    def __init__(self, device: torch.device) -> None:
        self._request = Request(coefficients_S=torch.tensor([0.0, 0.0, 1.0], device=device))

    def request(self, sampled: Sampled) -> Request:
        return self._request

    def direction(self, sampled: Sampled, gradients: StepGradients) -> None:
        return None

    def observe(self, sampled: Sampled, gradients: StepGradients) -> None:
        """Nothing is learned about weights."""

    def factors(self) -> None:
        return None

    def describe(self, sampled: Sampled) -> None:
        return None

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """There is no state."""
