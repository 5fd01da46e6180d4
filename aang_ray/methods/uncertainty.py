"""Uncertainty weighting: a learned log-variance for each loss. (Kendall et al. 2018)"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torchjd import scalarization

from aang_ray.gradients.engine import StepGradients
from aang_ray.methods.base import Sampled
from aang_ray.methods.over_space import labelled, positions
from aang_ray.methods.scalarization import Scalarization, derivative
from aang_ray.methods.weighting import Weighting


class Uncertainty(Scalarization):
    """L = sum_i (1/2 exp(-s_i) L_i + 1/2 s_i), computed by TorchJD; s by plain SGD with rate `lr`.

    s starts at 0, so every weight at 1/2: weights do not sum to 1. What is not sampled, or has no labels, keeps its s.
    """

    def __init__(self, static: Weighting, lr: float) -> None:
        super().__init__(static)
        self._lr = lr
        self._log_variances_K = static.flat_F.new_zeros(1 + len(self.names))
        """Of the end task, then of every objective of the space."""

    def weights(self, sampled: Sampled) -> Tensor:
        scalarizer = self._scalarizer(sampled)
        return derivative(scalarizer, scalarizer.log_var)

    def observe(self, sampled: Sampled, gradients: StepGradients) -> None:
        scalarizer = self._scalarizer(sampled)
        with torch.enable_grad():
            loss = scalarizer(gradients.losses_S[1:].to(self._log_variances_K.dtype))
            (gradient_m,) = torch.autograd.grad(loss, scalarizer.log_var)
        gradient_m = torch.where(labelled(sampled, gradient_m), gradient_m, 0.0)
        self._log_variances_K.index_add_(0, positions(sampled, gradient_m), gradient_m, alpha=-self._lr)

    def state_dict(self) -> dict[str, Any]:
        return {"log_variances": self._log_variances_K.clone().cpu()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._log_variances_K.copy_(state["log_variances"])

    def _scalarizer(self, sampled: Sampled) -> scalarization.UW:
        """TorchJD's, over the losses of one step."""
        selected_m = self._log_variances_K[positions(sampled, self._log_variances_K)]
        scalarizer = scalarization.UW(len(selected_m)).to(selected_m)
        scalarizer.log_var.data.copy_(selected_m)
        return scalarizer
