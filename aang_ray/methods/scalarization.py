"""Weights of the losses by TorchJD's scalarizations.

A scalarization is a function of the losses L_i of the end task and the sampled objectives. The coefficient of L_i in
the update, of body and heads alike, is the derivative by L_i: one plain backward pass does, and nothing waits.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor
from torchjd import scalarization

from aang_ray.gradients.engine import Request
from aang_ray.methods.base import Sampled
from aang_ray.methods.described import weight_row
from aang_ray.methods.seeding import seeded
from aang_ray.methods.unlearned import Unlearned
from aang_ray.methods.weighting import Weighting
from aang_ray.store.rows import WeightRow


class Scalarization(Unlearned, ABC):
    """Base of the methods that are one: `weights` is what they differ in."""

    @abstractmethod
    def weights(self, sampled: Sampled) -> Tensor:
        """Coefficients of the end task and the sampled objectives, [m]."""

    def request(self, sampled: Sampled) -> Request:
        weights_m = self.weights(sampled)
        return Request(torch.cat((weights_m.new_zeros(1), weights_m)))

    def describe(self, sampled: Sampled) -> WeightRow:
        return weight_row(sampled, self.names, self.weights(sampled))


class RandomWeights(Scalarization):
    """Softmax of standard normal numbers, drawn anew at every step as a function of (seed, step).

    (Lin et al. 2022, Algorithm 2)
    """

    def __init__(self, static: Weighting, seed: int) -> None:
        super().__init__(static)
        self._seed = seed

    def weights(self, sampled: Sampled) -> Tensor:
        like = self.static.flat_F
        with seeded(self._seed, sampled.step, like.device):
            return derivative(scalarization.Random(), like.new_zeros(1 + len(sampled.objectives)))


def derivative(scalarizer: scalarization.Scalarizer, losses_m: Tensor) -> Tensor:
    """Derivative of a scalarizer by the losses, [m]."""
    with torch.enable_grad():
        leaf_m = losses_m.detach().clone().requires_grad_()
        weights_m: Tensor = torch.autograd.grad(scalarizer(leaf_m), leaf_m)[0]
    return weights_m
