"""GradNorm: weights that bring the gradients of all losses to a common scale. (Chen et al. 2018, Algorithm 1)"""

from __future__ import annotations

import torch
from torch import Tensor

from aang_ray.config.methods import GradnormConfig
from aang_ray.gradients.engine import Request, StepGradients
from aang_ray.methods.base import Sampled, labelled, positions, weight_row
from aang_ray.methods.plain import Static
from aang_ray.store.schema import WeightRow

SMALLEST = 1e-6
"""Lower bound of the weights, so that they stay positive."""


class GradNorm(Static):
    """Coefficients c_i = w_i / sum w over the end task and the sampled objectives, w learned from gradient norms.

    Let v_i be w_i divided by the mean of the step's w, G_i = v_i ||g_i||, r_i = (L_i / L_i(0)) / mean_j (L_j / L_j(0)),
    and t_i = mean(G) r_i^alpha the target. A step of gradient descent on sum_i |G_i - t_i|, divided by mean(G), is

        v_i <- v_i - lr sign(G_i - t_i) ||g_i|| / mean(G),

    and keeps the sum of the step's w. g_i is the gradient of the whole body. L_i(0) is the first observed loss. Losses
    without labels keep their w. docs/methods/loss-weights.md tells the differences from the paper.
    """

    config: GradnormConfig

    def initial_state(self) -> dict[str, Tensor]:
        # w, and L(0), which is 0 until the loss has been seen.
        like = self.weighting.flat_F
        return {"weights": like.new_ones(self.losses), "first_losses": like.new_zeros(self.losses)}

    def request(self, sampled: Sampled) -> Request:
        weights_m = self._coefficients(sampled)
        return Request(torch.cat((weights_m.new_zeros(1), weights_m)), scores=self.config.lr > 0)

    def observe(self, sampled: Sampled, gradients: StepGradients) -> None:
        if self.config.lr == 0:
            return
        assert gradients.norms2_S is not None
        weights_K, first_K = self.state["weights"], self.state["first_losses"]
        dtype, where_m = weights_K.dtype, positions(sampled, weights_K)
        norms_m = gradients.norms2_S[1:].clamp_min(0).sqrt().to(dtype)
        losses_m = gradients.losses_S[1:].to(dtype)
        counted_m = labelled(sampled, norms_m)
        first_m = first_K[where_m]
        first_m = torch.where((first_m == 0) & counted_m, losses_m, first_m)
        first_K[where_m] = first_m
        before_m = weights_K[where_m]
        total = torch.where(counted_m, before_m, 0.0).sum()
        relative_m = before_m * (counted_m.sum() / torch.where(total > 0, total, 1.0))
        step_m = relative_gradient(relative_m, norms_m, losses_m, first_m, counted_m, self.config.alpha)
        after_m = torch.where(counted_m, (relative_m - self.config.lr * step_m).clamp_min(SMALLEST), 0.0)
        weights_K[where_m] = torch.where(counted_m, after_m * (total / after_m.sum()), before_m)

    def describe(self, sampled: Sampled) -> WeightRow:
        return weight_row(sampled, self.names, self._coefficients(sampled))

    def _coefficients(self, sampled: Sampled) -> Tensor:
        weights_K = self.state["weights"]
        weights_m = weights_K[positions(sampled, weights_K)]
        return weights_m / weights_m.sum()


def relative_gradient(
    relative_m: Tensor, norms_m: Tensor, losses_m: Tensor, first_m: Tensor, counted_m: Tensor, alpha: float
) -> Tensor:
    """Return sign(G_i - t_i) ||g_i|| / mean(G) at weights v of mean 1, [m]; 0 for losses that do not count.

    `first_m` are the L_i(0); `counted_m` tells which losses have labels at this step.
    """
    count = counted_m.sum()
    ratios_m = torch.where(counted_m & (first_m > 0), losses_m / torch.where(first_m > 0, first_m, 1.0), 0.0)
    mean_ratio = ratios_m.sum() / count
    rates_m = torch.where(mean_ratio > 0, ratios_m / torch.where(mean_ratio > 0, mean_ratio, 1.0), 1.0)
    scaled_m = relative_m * norms_m
    mean = torch.where(counted_m, scaled_m, 0.0).sum() / count
    gradient_m = torch.sign(scaled_m - mean * rates_m.pow(alpha)) * norms_m / torch.where(mean > 0, mean, 1.0)
    return torch.where(counted_m, gradient_m, 0.0)
