"""Weights of tasks that are trained one by one, in rounds: what alphaVIL and DIW share. (semantics section 7)"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from aang_ray.config.methods import AlphavilConfig, DiwConfig
from aang_ray.config.run import RunConfig
from aang_ray.config.sections import MethodSection
from aang_ray.errors import UserError
from aang_ray.gradients.engine import Request
from aang_ray.methods.base import Method, Sampled, like_device
from aang_ray.objectives.space import Space
from aang_ray.store.schema import WeightRow

SMALLEST_WEIGHT = 1e-6
"""Even a slightly negative weight makes parameters overshoot (alphaVIL, footnote 1)."""


class RoundMethod(Method):
    """One weight w_i a task, 1 at the start: task 0 is the end task, then come the objectives of the run.

    A step trains one task alone, or (`together`) all of them by L = 1/N sum_i w_i L_i, with N tasks: at w = 1 that is
    the multitask baseline of the paper, which averages. Weights are host numbers: they move once a round.
    """

    def __init__(self, names: Sequence[str], device: torch.device, config: MethodSection) -> None:
        self._names, self._device = names, device
        self.end_task_weight = 1.0
        self._weights: dict[int, float] = {}
        """By objective; 1 where it never moved."""
        self.together = False
        self.loss_scale = 1.0
        """Weight of the loss of a task that is trained alone."""

    @classmethod
    def build(cls, config: RunConfig, space: Space | None, device: torch.device) -> Self:
        if space is None:
            raise UserError(f"method.name: {config.method.name} needs a space of auxiliary objectives")
        return cls(space.factors()["A"], device, config.method)

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
        return like_device(values, torch.empty(0, device=self._device))


# --- methods.alphavil: alphaVIL: mix the tasks' parameter updates by gradient descent on the dev loss. (semantics section 7)


class Alphavil(RoundMethod):
    """theta <- theta + sum_i alpha_i delta_i, then w_i <- max(w_i + (alpha_i - 1), 1e-6)."""

    def __init__(self, names: Sequence[str], device: torch.device, config: AlphavilConfig) -> None:
        super().__init__(names, device, config)
        self.config = config
        self._objectives: tuple[int, ...] = ()
        self._alpha: list[float] = []

    def mix(self, theta_Q: Tensor, deltas_NQ: Tensor, gradient: Callable[[Tensor], Tensor]) -> Tensor:
        """alpha, [N]: see `mixed`."""
        config = self.config
        return mixed(theta_Q, deltas_NQ, gradient, config.alpha_steps, config.alpha_lr, config.alpha_momentum)

    def learn(self, objectives: Sequence[int], alpha: Sequence[float]) -> None:
        """Move the weights by what the mixing found."""
        self.move(objectives, [value - 1 for value in alpha])
        self._objectives, self._alpha = tuple(objectives), list(alpha)

    def describe(self, sampled: Sampled) -> WeightRow:
        names = ["end-task", *(self._names[k] for k in self._objectives)]
        health = {f"alpha/{name}": value for name, value in zip(names, self._alpha, strict=False)}
        return self.row(sampled.step + 1, self._objectives or sampled.objectives, health)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "objectives": list(self._objectives), "alpha": list(self._alpha)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._objectives, self._alpha = tuple(state["objectives"]), list(state["alpha"])


def mixed(
    theta_Q: Tensor,
    deltas_NQ: Tensor,
    gradient: Callable[[Tensor], Tensor],
    steps: int,
    lr: float,
    momentum: float,
) -> Tensor:
    """alpha, [N], by `steps` steps of SGD from 1 on L(theta + sum_i alpha_i delta_i).

    `gradient` gives the gradient of L at parameters [Q], so that dL/d alpha_i = <grad L(theta + sum alpha delta),
    delta_i>. (alphaVIL, Algorithm 1, lines 8 and 9)
    """
    alpha_N = torch.ones(len(deltas_NQ), dtype=deltas_NQ.dtype, device=deltas_NQ.device)
    optimizer = torch.optim.SGD([alpha_N], lr=lr, momentum=momentum)
    for _ in range(steps):
        alpha_N.grad = deltas_NQ @ gradient(torch.addmv(theta_Q, deltas_NQ.t(), alpha_N))
        optimizer.step()
    return alpha_N.detach()


# --- methods.diw: Discriminative importance weighting, the baseline of alphaVIL. (semantics section 7)


class Diw(RoundMethod):
    """w_i <- max(w_i + rate (score of task i alone - score of all together), 1e-6), scores on dev.

    A round's training of all tasks together is tried again with the moved weights until its score exceeds the last
    round's, or `tries` are made; then the last try stands.
    """

    def __init__(self, names: Sequence[str], device: torch.device, config: DiwConfig) -> None:
        super().__init__(names, device, config)
        self.config = config
        self.tries = 0
        """Made in this round."""
        self.last_score = -1.0
        """Of the last round; before the first, less than any score."""
        self._objectives: tuple[int, ...] = ()
        self._health: dict[str, float] = {}

    def judge(self, objectives: Sequence[int], alone: Sequence[float], together: float) -> bool:
        """Move the weights after a try; whether the round is over."""
        self.move(objectives, [self.config.weight_lr * (score - together) for score in alone])
        self.tries += 1
        names = ["end-task", *(self._names[k] for k in objectives)]
        self._objectives = tuple(objectives)
        self._health = {f"alone/{name}": score for name, score in zip(names, alone, strict=True)}
        self._health |= {"together": together, "tries": float(self.tries)}
        return together > self.last_score or self.tries >= self.config.tries

    def end_round(self, together: float) -> None:
        """The next round is compared with this score."""
        self.last_score, self.tries = together, 0

    def describe(self, sampled: Sampled) -> WeightRow:
        return self.row(sampled.step + 1, self._objectives or sampled.objectives, self._health)

    def state_dict(self) -> dict[str, Any]:
        own = {"tries": self.tries, "last_score": self.last_score}
        return {**super().state_dict(), **own, "objectives": list(self._objectives), "health": dict(self._health)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.tries, self.last_score = int(state["tries"]), float(state["last_score"])
        self._objectives, self._health = tuple(state["objectives"]), dict(state["health"])
