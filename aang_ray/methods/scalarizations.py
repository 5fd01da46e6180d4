"""Functions of the losses that TorchJD computes: scalarizations. (docs/methods/loss-weights.md)

The coefficient of a loss in the update is the derivative of the scalarization by that loss. If it depends on the step's
losses, the separate gradients are combined (`LossAggregation`). Else one plain backward pass is enough.

The state has entries for the end task and the whole space, [1 + K]. Entries of losses that are not sampled or have no
labels do not change.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torchjd import scalarization

from aang_ray.config import methods as settings
from aang_ray.gradients.engine import Request, StepGradients
from aang_ray.methods.base import Sampled, labelled, positions, seeded, weight_row
from aang_ray.methods.plain import Static
from aang_ray.methods.torchjd import Aggregation, places, preference
from aang_ray.store.schema import WeightRow


def derivative(scalarizer: Any, losses_m: Tensor) -> Tensor:
    """Return the derivatives of a scalarizer by the losses, [m]."""
    with torch.enable_grad():
        leaf_m = losses_m.detach().clone().requires_grad_()
        weights_m: Tensor = torch.autograd.grad(scalarizer(leaf_m), leaf_m)[0]
    return weights_m


# 1. Weights that are known before the step. Nothing waits for the device.


class Scalarization(Static, ABC):
    """The coefficient of L_i, in body and heads alike, is the derivative of a scalarization by L_i."""

    @abstractmethod
    def weights(self, sampled: Sampled) -> Tensor:
        """Return the coefficients of the end task and the sampled objectives, [m]."""

    def request(self, sampled: Sampled) -> Request:
        weights_m = self.weights(sampled)
        return Request(torch.cat((weights_m.new_zeros(1), weights_m)))

    def describe(self, sampled: Sampled) -> WeightRow:
        return weight_row(sampled, self.names, self.weights(sampled))


class RandomWeights(Scalarization):
    """Softmax of standard normal numbers, drawn anew at every step from (seed, step). (Lin et al. 2022, Algorithm 2)"""

    def weights(self, sampled: Sampled) -> Tensor:
        like = self.weighting.flat_F
        with seeded(self.seed, sampled.step, like.device):
            return derivative(scalarization.Random(), like.new_zeros(1 + len(sampled.objectives)))


KINDS: Mapping[str, tuple[Any, str]] = {
    "uncertainty": (scalarization.UW, "log_variances"),
    "imtl_l": (scalarization.IMTLL, "log_scales"),
}
"""TorchJD's class, and the name of s in checkpoints."""


class LearnedScales(Scalarization):
    """A number s_i for every loss, learned with plain SGD (rate `lr`, initial value 0).

    `uncertainty`: L = sum_i (1/2 exp(-s_i) L_i + 1/2 s_i), so every weight starts at 1/2 (Kendall et al. 2018).
    `imtl_l`: L = sum_i (exp(s_i) L_i - s_i), so every weight starts at 1 (Liu et al. 2021).
    """

    config: settings.UncertaintyConfig | settings.ImtlLConfig

    def initial_state(self) -> dict[str, Tensor]:
        self._kind, self._key = KINDS[self.config.name]
        return {self._key: self.weighting.flat_F.new_zeros(self.losses)}

    def weights(self, sampled: Sampled) -> Tensor:
        scalarizer, scales_m = self._scalarizer(sampled)
        return derivative(scalarizer, scales_m)  # the scalarizer is linear in the losses: any will do

    def observe(self, sampled: Sampled, gradients: StepGradients) -> None:
        scalarizer, scales_m = self._scalarizer(sampled)
        with torch.enable_grad():
            loss = scalarizer(gradients.losses_S[1:].to(self.state[self._key].dtype))
            (gradient_m,) = torch.autograd.grad(loss, scales_m)
        gradient_m = torch.where(labelled(sampled, gradient_m), gradient_m, 0.0)
        self.state[self._key].index_add_(0, positions(sampled, gradient_m), gradient_m, alpha=-self.config.lr)

    def _scalarizer(self, sampled: Sampled) -> tuple[Any, Tensor]:
        """Return TorchJD's scalarizer of the step's losses, and its parameter s, [m]."""
        selected_m = self.state[self._key][positions(sampled, self.state[self._key])]
        scalarizer = self._kind(len(selected_m)).to(selected_m)
        (scales_m,) = scalarizer.parameters()
        scales_m.data.copy_(selected_m)
        return scalarizer, scales_m


class DynamicWeightAverage(Scalarization):
    """w = softmax(r / T), r_i = (mean L_i of the last epoch) / (of the epoch before). (Liu, Johns and Davison 2019)

    An epoch is `epoch_steps` steps. An objective counts in the epochs in which it was sampled; until there are two of
    them r_i = 1.
    """

    config: settings.DwaConfig

    def initial_state(self) -> dict[str, Tensor]:
        self._steps = 0
        like = self.weighting.flat_F
        return {
            "sums": like.new_zeros(2, self.losses),  # sum and number of the losses of this epoch
            # Mean losses of the two latest epochs, the older one first, and how many epochs there were.
            "epochs": like.new_zeros(3, self.losses),
        }

    def weights(self, sampled: Sampled) -> Tensor:
        older_m, newer_m, epochs_m = self.state["epochs"][:, positions(sampled, self.state["epochs"])]
        known_m = (epochs_m >= 2) & (older_m > 0)
        scalarizer = scalarization.DWA(self.config.temperature)
        for means_m in (older_m, newer_m):
            scalarizer(torch.where(known_m, means_m, 1.0))
            scalarizer.step()
        return derivative(scalarizer, older_m) / len(older_m)

    def observe(self, sampled: Sampled, gradients: StepGradients) -> None:
        losses_m = gradients.losses_S[1:].to(self.state["sums"].dtype)
        counted_m = labelled(sampled, losses_m)
        added_2m = torch.stack((torch.where(counted_m, losses_m, 0.0), counted_m.to(losses_m.dtype)))
        self.state["sums"].index_add_(1, positions(sampled, losses_m), added_2m)
        self._steps += 1
        if self._steps % self.config.epoch_steps == 0:
            total_K, count_K = self.state["sums"]
            _, newer_K, epochs_K = self.state["epochs"]
            rolled_3K = torch.stack((newer_K, total_K / count_K.clamp_min(1), epochs_K + 1))
            self.state["epochs"] = torch.where(count_K > 0, rolled_3K, self.state["epochs"])
            self.state["sums"].zero_()

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "steps": self._steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._steps = int(state["steps"])


# 2. Weights that depend on the losses of the step.

SMALLEST_LOSS = 1e-12
"""Lower bound for losses, because the geometric mean has no derivative at 0."""


def loss_weights(kind: settings.Preference, losses_m: Tensor) -> Tensor:
    """Return weights of the losses, [m], that sum to 1."""
    found_m = preference(kind, losses_m)
    return torch.full_like(losses_m, 1 / len(losses_m)) if found_m is None else found_m


LOSS_FUNCTIONS: Mapping[str, Callable[[Any, Tensor], Any]] = {
    "geometric_mean": lambda c, losses_m: scalarization.GeometricMean(),
    "stch": lambda c, losses_m: scalarization.STCH(c.mu, loss_weights(c.preference, losses_m)),
    "cosmos": lambda c, losses_m: scalarization.COSMOS(c.penalty, loss_weights(c.preference, losses_m)),
    "pbi": lambda c, losses_m: scalarization.PBI(c.theta, loss_weights(c.preference, losses_m)),
}
"""Functions that return TorchJD's scalarizer, from a method's settings and the step's losses."""


class LossAggregation(Aggregation):
    """alpha_i = dF/dL_i at the losses of the step, for a function F of `LOSS_FUNCTIONS`. Computed on the device."""

    def weights(self, sampled: Sampled, gradients: StepGradients, separate_SP: Tensor, rows: list[int]) -> Tensor:
        losses_m = gradients.losses_S[rows].clamp_min(SMALLEST_LOSS)
        weights_S = torch.zeros_like(gradients.losses_S)
        weights_S[rows] = derivative(self.scalarizer(losses_m, places(sampled, rows, losses_m)), losses_m)
        return weights_S

    def scalarizer(self, losses_m: Tensor, places_m: Tensor) -> Any:
        """Return F for the step."""
        return LOSS_FUNCTIONS[self.config.name](self.config, losses_m)


class Famo(LossAggregation):
    """FAMO: F = c sum_i z_i log L_i with z = softmax(w), w learned so that all losses fall at an equal rate.

    Adam updates w with the change of log L_i since the loss was last sampled, differentiated through the softmax over
    the step's losses. The paper evaluates the same batch again after the step, a second forward pass; the next batch
    has the same expectation and more noise. SparseAdam does not change entries that are not sampled.
    """

    config: settings.FamoConfig

    def initial_state(self) -> dict[str, Tensor]:
        self._logits_K = nn.Parameter(self.weighting.flat_F.new_zeros(self.losses), requires_grad=False)
        self._adam: torch.optim.Optimizer = torch.optim.SparseAdam([self._logits_K], lr=self.config.lr)
        # Each loss when it was last seen; nan before.
        return {"logits": self._logits_K.data, "last_losses": torch.full_like(self._logits_K.data, torch.nan)}

    def scalarizer(self, losses_m: Tensor, places_m: Tensor) -> Any:
        last_K = self.state["last_losses"]
        before_m, now_m = last_K[places_m], losses_m.to(last_K.dtype)
        seen_m = ~before_m.isnan()
        if seen_m.any():
            at = places_m[seen_m]
            change = ((before_m + 1e-8) / (now_m + 1e-8)).log()[seen_m]
            z = torch.softmax(self._logits_K[at], dim=0)
            gradient = z * (change - (z * change).sum()) + self.config.weight_decay * self._logits_K[at]
            self._logits_K.grad = torch.sparse_coo_tensor(
                at[None], gradient, self._logits_K.shape, check_invariants=False
            )
            self._adam.step()
            self._logits_K.grad = None
        last_K[places_m] = now_m
        function = scalarization.FAMO(len(losses_m)).to(losses_m)
        function.load_state_dict({"_w": self._logits_K[places_m], "min_losses": torch.zeros_like(losses_m)})
        return function

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "adam": self._adam.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._adam.load_state_dict(state["adam"])
