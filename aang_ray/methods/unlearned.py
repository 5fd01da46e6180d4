"""What methods without a state of their own have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from aang_ray.gradients.engine import StepGradients
from aang_ray.methods.base import Sampled
from aang_ray.methods.weighting import Weighting


class Unlearned:
    """A step's weights depend on that step alone. `static` holds the coefficients of static multitask."""

    uses_dev = False
    whole_gradients = False

    def __init__(self, static: Weighting) -> None:
        self.static = static

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the space's objectives."""
        return self.static.index.names["A"]

    def direction(self, sampled: Sampled, gradients: StepGradients) -> Tensor | None:
        return None

    def observe(self, sampled: Sampled, gradients: StepGradients) -> None:
        """Nothing is learned about weights."""

    def factors(self) -> Mapping[str, npt.NDArray[np.float64]]:
        return self.static.factors()

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """There is no state."""
