"""One loss and nothing else: fine-tuning, and the masked-LM stage of TAPT and DAPT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor

from aang_ray.gradients.engine import Request, StepGradients
from aang_ray.methods.base import Sampled


class Single:
    """L = L_s of one segment; the others, where there are any, weigh 0."""

    uses_dev = False
    whole_gradients = False

    def __init__(self, coefficients_S: Tensor) -> None:
        self._request = Request(coefficients_S=coefficients_S)

    @classmethod
    def end_task(cls, device: torch.device) -> Self:
        """L = L_E."""
        return cls(torch.tensor([0.0, 1.0], device=device))

    @classmethod
    def auxiliary(cls, device: torch.device) -> Self:
        """L = L_k of the step's one objective; the end task has no examples in this stage."""
        return cls(torch.tensor([0.0, 0.0, 1.0], device=device))

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
