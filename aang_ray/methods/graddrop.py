"""GradDrop: in every coordinate of the body one sign survives. (Chen et al. 2020, Algorithm 1)"""

from __future__ import annotations

from torch import Tensor
from torchjd import aggregation

from aang_ray.config.methods.aggregations import GraddropConfig
from aang_ray.gradients.engine import Request, StepGradients
from aang_ray.methods.base import Sampled
from aang_ray.methods.seeding import seeded
from aang_ray.methods.unlearned import Unlearned
from aang_ray.methods.weighting import Weighting


class GradDrop(Unlearned):
    """d_p = the sum of the gradients that have in coordinate p the sign that was drawn for p.

    Positive with probability 1/2 (1 + sum_i g_ip / sum_i |g_ip|). TorchJD computes it on the separate gradients,
    without waiting for the device; the draw is a function of (seed, step). The share `end_task_leak` of g_E always
    passes. Heads get the coefficients of static multitask. Holds n + 2 body-sized vectors.
    """

    whole_gradients = True

    def __init__(self, static: Weighting, config: GraddropConfig, seed: int) -> None:
        super().__init__(static)
        self._end_task_leak, self._seed = config.end_task_leak, seed

    def request(self, sampled: Sampled) -> Request:
        return Request(self.static.coefficients(sampled), separate=True)

    def direction(self, sampled: Sampled, gradients: StepGradients) -> Tensor:
        if gradients.separate_SP is None:
            raise ValueError("GradDrop needs the separate gradients")
        rows_mP = gradients.separate_SP[1:]
        leak_m = rows_mP.new_zeros(len(rows_mP))
        leak_m[0] = self._end_task_leak
        with seeded(self._seed, sampled.step, rows_mP.device):
            direction_P: Tensor = aggregation.GradDrop(leak=leak_m)(rows_mP)
        return direction_P

    def describe(self, sampled: Sampled) -> None:
        """No gradient has one weight."""
