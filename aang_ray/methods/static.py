"""Static multitask: every weight stays where it starts. (Dery et al. 2023, section 7.3)"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from aang_ray.gradients.engine import Request, StepGradients
from aang_ray.methods.base import Sampled
from aang_ray.methods.weighting import Weighting
from aang_ray.store.rows import WeightRow


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
