"""Static multitask: every weight stays where it starts. (Dery et al. 2023, section 7.3)"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from aang_ray.config.methods import CosineGatingConfig
from aang_ray.gradients.engine import Request, StepGradients
from aang_ray.gradients.products import products
from aang_ray.gradients.statistics import cosine
from aang_ray.methods.base import Sampled, Unlearned, Weighting, weight_row
from aang_ray.store.schema import WeightRow


class Static:
    """L = 1/2 L_E + 1/2 (1/n) sum over S of L_k."""

    uses_dev = False
    whole_gradients = False

    def __init__(self, weighting: Weighting) -> None:
        self.weighting = weighting

    def request(self, sampled: Sampled) -> Request:
        return Request(coefficients_S=self.weighting.coefficients(sampled))

    def direction(self, sampled: Sampled, gradients: StepGradients) -> None:
        return None

    def observe(self, sampled: Sampled, gradients: StepGradients) -> None:
        """Nothing is learned about weights."""

    def factors(self) -> Mapping[str, npt.NDArray[np.float64]]:
        return self.weighting.factors()

    def describe(self, sampled: Sampled) -> WeightRow:
        return self.weighting.row(sampled, {})

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """There is no state: the weights never move."""


# --- methods.single: One loss and nothing else: fine-tuning, and the masked-LM stage of TAPT and DAPT.


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


# --- methods.gating: Cosine gating: an auxiliary gradient counts where it agrees with the end task's. (Du et al. 2018)


class CosineGating(Unlearned):
    """d = lambda g_E + (1 - lambda) / n sum_k a(cos(g_E, g_k)) g_k, lambda = 1/2.

    `gate`: a(c) = 1 where c >= 0, else 0, the source's unweighted version; `weigh`: a(c) = max(0, c), the weighted one.
    Heads learn from every loss, with the coefficients of static multitask. Nothing waits for the device. Holds n + 2
    body-sized vectors.
    """

    whole_gradients = True

    def __init__(self, static: Weighting, config: CosineGatingConfig) -> None:
        super().__init__(static)
        self._mode = config.mode
        self._weights_m: Tensor | None = None
        """Weights of the last step, on the device."""

    def request(self, sampled: Sampled) -> Request:
        return Request(self.static.coefficients(sampled), separate=True)

    def direction(self, sampled: Sampled, gradients: StepGradients) -> Tensor:
        if gradients.separate_SP is None:
            raise ValueError("cosine gating needs the separate gradients")
        rows_mP = gradients.separate_SP[1:]
        gram_mm = products(rows_mP, rows_mP)
        cosines_m = cosine(gram_mm[0], gram_mm.diagonal())
        passes_m = cosines_m.clamp_min(0) if self._mode == "weigh" else (cosines_m >= 0).to(cosines_m.dtype)
        passes_m[0].fill_(1.0)
        self._weights_m = self.static.coefficients(sampled)[1:].to(passes_m.dtype) * passes_m
        return self._weights_m @ rows_mP

    def describe(self, sampled: Sampled) -> WeightRow | None:
        return None if self._weights_m is None else weight_row(sampled, self.names, self._weights_m)
