"""ATTITTUD: auxiliary task update decomposition. (Dery et al. 2021; docs/semantics.md, section 6)

In the subspace of the end task's per-example gradients, the auxiliary gradient is split into the part that lowers the
end task's loss and the part that raises it; the rest does neither to first order. Each part has its own weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from aang_ray.config.methods import AttittudConfig
from aang_ray.gradients.engine import Request, StepGradients, check_memory
from aang_ray.gradients.statistics import ExampleJacobian, reweighted, span
from aang_ray.methods.aang import Weighting
from aang_ray.methods.base import PrimaryMethod, Sampled, like_device
from aang_ray.methods.plain import Static
from aang_ray.objectives import randomness
from aang_ray.objectives.source import END_TASK
from aang_ray.store.schema import WeightRow

SHARES = ("aux_neutral", "aux_helps", "aux_harms")
"""Names in the store of the three parts' fractions of the auxiliary gradient's squared norm."""


class Attittud(Static, PrimaryMethod):
    """d = lambda g_E + eta_perp g_perp + eta_plus g_plus + eta_minus g_minus of g = (1 - lambda) sum w_k g_k.

    lambda = 1/2 and w = 1/n as in static multitask, also for the heads. g is the update minus lambda g_E, so it
    includes a tied decoder's part without `whole_gradients`. All workers use the first worker's V and p.
    """

    config: AttittudConfig

    def __init__(self, weighting: Weighting, config: AttittudConfig, seed: int) -> None:
        super().__init__(weighting, config, seed)
        self._basis_PK: Tensor | None = None
        self._primary_K: Tensor | None = None
        self._shares: list[Tensor] = []
        """Fractions at every step since the last call of `describe`, on the device."""

    @property
    def measures(self) -> bool:
        return self.config.subspace == "jacobian"

    def primary_examples(self, step: int) -> tuple[int, int]:
        refresh = step % self.config.refresh_every == 0
        return self.config.subspace_examples if refresh else 0, self.config.primary_examples

    def measure(self, step: int, subspace: ExampleJacobian | None, primary: ExampleJacobian) -> tuple[Tensor, ...]:
        """Estimate a new V if `subspace` is given (this waits for the device), and compute p = V^T (mean gradient)."""
        if subspace is not None:
            self._basis_PK = None  # frees its memory before the new one is made
            check_memory(subspace.parameters, 3 * self.config.rank, "method.rank or encoder.layers")
            rows, columns = min(self.config.rank, subspace.examples), subspace.examples
            draw = randomness.generator(self.seed, step, randomness.METHOD, 1).standard_normal((rows, columns))
            omega_KM = like_device(draw.tolist(), self.weighting.flat_F)
            self._basis_PK = span(subspace, omega_KM, rotate=self.config.basis == "sound")
        if self._basis_PK is None:
            raise ValueError("the subspace must be estimated before it is used")
        self._primary_K = self._basis_PK.t() @ primary.mean_gradient()
        return (self._primary_K,) if subspace is None else (self._basis_PK, self._primary_K)

    def request(self, sampled: Sampled) -> Request:
        return Request(self.weighting.coefficients(sampled), scores=True, keep=(END_TASK,))

    def direction(self, sampled: Sampled, gradients: StepGradients) -> Tensor:
        update_P = gradients.update_P
        if update_P is None:
            raise ValueError("ATTITTUD needs the update and the part of it that is the end task's")
        config = self.config
        weight = self.weighting.coefficients(sampled)[END_TASK].to(update_P.dtype)
        end_task_P = weight * gradients.kept[END_TASK].to(update_P.dtype)
        basis_PK, primary_K = self._subspace(end_task_P)
        joint_P, shares_3 = reweighted(
            update_P - end_task_P, basis_PK, primary_K, config.eta_perp, config.eta_plus, config.eta_minus
        )
        self._shares.append(shares_3)
        return end_task_P + joint_P

    def _subspace(self, end_task_P: Tensor) -> tuple[Tensor, Tensor]:
        """Return V and p = V^T g_E: as they were measured, or of the step's own g_E. V is 0 if g_E is."""
        if self.config.subspace == "gradient":
            norm_1 = torch.linalg.vector_norm(end_task_P).reshape(1)
            return (end_task_P / norm_1.clamp_min(torch.finfo(norm_1.dtype).tiny)).unsqueeze(1), norm_1
        if self._basis_PK is None or self._primary_K is None:
            raise ValueError("ATTITTUD needs its measurement of the end task before a step")
        return self._basis_PK, self._primary_K

    def describe(self, sampled: Sampled) -> WeightRow:
        health: dict[str, float] = {}
        if self._shares:
            means = torch.stack(self._shares).mean(dim=0).tolist()
            health = dict(zip(SHARES, means, strict=True))
        self._shares.clear()
        return self.weighting.row(sampled, health)

    def state_dict(self) -> dict[str, Any]:
        return {
            "basis": None if self._basis_PK is None else self._basis_PK.clone().cpu(),
            "shares": [shares_3.clone().cpu() for shares_3 in self._shares],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        device = self.weighting.flat_F.device
        self._basis_PK = None if state["basis"] is None else state["basis"].to(device)
        self._shares = [shares_3.to(device) for shares_3 in state["shares"]]
