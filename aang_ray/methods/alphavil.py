"""alphaVIL: mix the tasks' parameter updates by gradient descent on the dev loss. (semantics section 7)"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from aang_ray.config.methods import AlphavilConfig
from aang_ray.methods.base import Sampled
from aang_ray.methods.rounds import RoundMethod
from aang_ray.store.rows import WeightRow


class Alphavil(RoundMethod):
    """theta <- theta + sum_i alpha_i delta_i, then w_i <- max(w_i + (alpha_i - 1), 1e-6)."""

    def __init__(self, names: Sequence[str], device: torch.device, config: AlphavilConfig) -> None:
        super().__init__(names, device)
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
