"""Weights of tasks that are trained one by one, in rounds: what alphaVIL and DIW share. (semantics section 7)"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from aang_ray.gradients.engine import Request, StepGradients
from aang_ray.methods.base import Sampled, beside
from aang_ray.store.rows import WeightRow

SMALLEST_WEIGHT = 1e-6
"""Even a slightly negative weight makes parameters overshoot (alphaVIL, footnote 1)."""


class RoundMethod:
    """One weight w_i a task, 1 at the start: task 0 is the end task, then come the objectives of the run.

    A step trains one task alone, or (`together`) all of them by L = 1/N sum_i w_i L_i, with N tasks: at w = 1 that is
    the multitask baseline of the paper, which averages. Weights are host numbers: they move once a round.
    """

    uses_dev = False
    whole_gradients = False

    def __init__(self, names: Sequence[str], device: torch.device) -> None:
        self._names, self._device = names, device
        self.end_task_weight = 1.0
        self._weights: dict[int, float] = {}
        """By objective; 1 where it never moved."""
        self.together = False
        self.loss_scale = 1.0
        """Weight of the loss of a task that is trained alone."""

    def weights(self, objectives: Sequence[int]) -> list[float]:
        """w of the end task and of these objectives."""
        return [self.end_task_weight, *(self._weights.get(k, 1.0) for k in objectives)]

    def move(self, objectives: Sequence[int], by: Sequence[float]) -> None:
        """w_i <- max(w_i + by_i, 1e-6) for the end task and these objectives."""
        moved = [max(w + step, SMALLEST_WEIGHT) for w, step in zip(self.weights(objectives), by, strict=True)]
        self.end_task_weight = moved[0]
        self._weights.update(zip(objectives, moved[1:], strict=True))

    def request(self, sampled: Sampled) -> Request:
        if self.together:
            weights = self.weights(sampled.objectives)
            return Request(self._coefficients([0.0, *(w / len(weights) for w in weights)]))
        return Request(self._coefficients([0.0] * (1 + len(sampled.objectives)) + [self.loss_scale]))

    def direction(self, sampled: Sampled, gradients: StepGradients) -> None:
        return None

    def observe(self, sampled: Sampled, gradients: StepGradients) -> None:
        """Nothing is learned within a round."""

    def factors(self) -> None:
        return None

    def row(self, step: int, objectives: Sequence[int], health: Mapping[str, float]) -> WeightRow:
        """Normalised weights for the store: of the end task among all, of the objectives among themselves."""
        end_task, *others = self.weights(objectives)
        names, total = [self._names[k] for k in objectives], sum(others)
        raw = {f"w/{name}": w for name, w in zip(("end-task", *names), (end_task, *others), strict=True)}
        return WeightRow(
            step=step,
            end_task_weight=end_task / (end_task + total),
            weights={name: w / total for name, w in zip(names, others, strict=True)},
            factors={},
            health={**raw, **health},
        )

    def state_dict(self) -> dict[str, Any]:
        return {"end_task": self.end_task_weight, "weights": dict(self._weights)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.end_task_weight = float(state["end_task"])
        self._weights = {int(k): float(w) for k, w in state["weights"].items()}

    def _coefficients(self, values: Sequence[float]) -> Tensor:
        return beside(values, torch.empty(0, device=self._device))
