"""Dynamic weight average: what falls more slowly weighs more. (Liu, Johns and Davison 2019)"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torchjd import scalarization

from aang_ray.config.methods.scalarizations import DwaConfig
from aang_ray.gradients.engine import StepGradients
from aang_ray.methods.base import Sampled
from aang_ray.methods.over_space import labelled, positions
from aang_ray.methods.scalarization import Scalarization, derivative
from aang_ray.methods.weighting import Weighting


class DynamicWeightAverage(Scalarization):
    """w = softmax(r / T) with r_i = (mean L_i of the last epoch) / (of the epoch before), computed by TorchJD.

    The source multiplies by the number of losses; here weights sum to 1. An epoch is `epoch_steps` steps. An objective
    counts in the epochs in which it was sampled; until there are two of them r_i = 1.
    """

    def __init__(self, static: Weighting, config: DwaConfig) -> None:
        super().__init__(static)
        self._config = config
        losses = 1 + len(self.names)
        self._sums_2K = static.flat_F.new_zeros(2, losses)
        """Sum and number of the losses of the epoch at hand: the end task's, then every objective's."""
        self._epochs_3K = static.flat_F.new_zeros(3, losses)
        """Mean losses of the two latest epochs, the older one first, and how many epochs there were."""
        self._steps = 0

    def weights(self, sampled: Sampled) -> Tensor:
        older_m, newer_m, epochs_m = self._epochs_3K[:, positions(sampled, self._epochs_3K)]
        known_m = (epochs_m >= 2) & (older_m > 0)
        scalarizer = scalarization.DWA(self._config.temperature)
        for means_m in (older_m, newer_m):
            scalarizer(torch.where(known_m, means_m, 1.0))
            scalarizer.step()
        return derivative(scalarizer, older_m) / len(older_m)

    def observe(self, sampled: Sampled, gradients: StepGradients) -> None:
        losses_m = gradients.losses_S[1:].to(self._sums_2K.dtype)
        counted_m = labelled(sampled, losses_m)
        added_2m = torch.stack((torch.where(counted_m, losses_m, 0.0), counted_m.to(losses_m.dtype)))
        self._sums_2K.index_add_(1, positions(sampled, losses_m), added_2m)
        self._steps += 1
        if self._steps % self._config.epoch_steps == 0:
            self._end_epoch()

    def state_dict(self) -> dict[str, Any]:
        return {
            "sums": self._sums_2K.clone().cpu(),
            "epochs": self._epochs_3K.clone().cpu(),
            "steps": self._steps,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._sums_2K.copy_(state["sums"])
        self._epochs_3K.copy_(state["epochs"])
        self._steps = int(state["steps"])

    def _end_epoch(self) -> None:
        total_K, count_K = self._sums_2K
        _, newer_K, epochs_K = self._epochs_3K
        rolled_3K = torch.stack((newer_K, total_K / count_K.clamp_min(1), epochs_K + 1))
        self._epochs_3K = torch.where(count_K > 0, rolled_3K, self._epochs_3K)
        self._sums_2K.zero_()
