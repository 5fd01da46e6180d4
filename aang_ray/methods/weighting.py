"""From logits to the coefficients of a step, for every method with factored weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from aang_ray.methods.base import Sampled, beside, named_weights
from aang_ray.methods.factors import FactorIndex, logits
from aang_ray.store.rows import WeightRow


@dataclass
class Weighting:
    """Factors and (a_E, a_X) on the device, and the weights they stand for.

    In `published` allocation an objective's coefficient is (b / B) * softmax_S(A_k + O_o), neither
    renormalised nor bound to sum to one (semantics section 2.3).
    """

    index: FactorIndex
    flat_F: Tensor
    lambda_logits_2: Tensor
    published: bool

    @classmethod
    def zeros(cls, index: FactorIndex, device: torch.device, published: bool) -> Weighting:
        """Everything starts at 0: w = 1/n, lambda = 1/2."""
        moved = FactorIndex(index.names, index.entries_K5.to(device))
        return cls(moved, torch.zeros(index.size, device=device), torch.zeros(2, device=device), published)

    def with_lambda(self, weight: float) -> Weighting:
        """The same with another weight of the end task, in (0, 1)."""
        logits_2 = self.lambda_logits_2.new_tensor([0.0, math.log(1 / weight - 1)])
        return replace(self, lambda_logits_2=logits_2)

    @property
    def lambda_(self) -> Tensor:
        """Weight of the end task."""
        return torch.softmax(self.lambda_logits_2, dim=0)[0]

    def entries(self, sampled: Sampled) -> Tensor:
        """Flat factor positions of the sampled objectives, [n, 5]."""
        return self.index.entries_K5.index_select(0, beside(sampled.objectives, self.index.entries_K5))

    def weights(self, sampled: Sampled) -> Tensor:
        """w of the sampled objectives, [n]."""
        entries_n5 = self.entries(sampled)
        if not self.published:
            return torch.softmax(logits(self.flat_F, entries_n5), dim=0)
        shares_n = beside(sampled.shares, self.flat_F)
        return shares_n * torch.softmax(logits(self.flat_F, entries_n5[:, ::4]), dim=0)

    def coefficients(self, sampled: Sampled) -> Tensor:
        """(0, lambda, (1 - lambda) w_1, ..., (1 - lambda) w_n). (Algorithm 1 of Dery et al. 2023)"""
        lambda_ = self.lambda_.reshape(1)
        return torch.cat((torch.zeros_like(lambda_), lambda_, (1 - lambda_) * self.weights(sampled)))

    def factors(self) -> Mapping[str, npt.NDArray[np.float64]]:
        """Factor tensors in host memory by letter."""
        return self.index.split(self.flat_F.double().cpu().numpy())

    def row(self, sampled: Sampled, health: Mapping[str, float]) -> WeightRow:
        """The weights at this step for the store."""
        factors = {
            letter: dict(zip(self.index.names[letter], (float(v) for v in values), strict=True))
            for letter, values in self.factors().items()
        }
        weights = self.weights(sampled).tolist()
        return WeightRow(
            step=sampled.step + 1,
            end_task_weight=float(self.lambda_),
            weights=named_weights(sampled, self.index.names["A"], weights),
            factors=factors,
            health=dict(health),
        )
