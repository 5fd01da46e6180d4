"""The body's update as an aggregation of the rows of the Jacobian: g_E and the objectives' gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from aang_ray.config.methods.aggregations import GramSection
from aang_ray.errors import RunFailure
from aang_ray.gradients.engine import Request, StepGradients
from aang_ray.gradients.products import products
from aang_ray.methods.base import Sampled
from aang_ray.methods.described import weight_row
from aang_ray.methods.gram_weights import gram_weights
from aang_ray.methods.seeding import seeded
from aang_ray.methods.unlearned import Unlearned
from aang_ray.methods.weighting import Weighting
from aang_ray.objectives.source import FIRST_OBJECTIVE
from aang_ray.store.rows import WeightRow


class GramAggregation(Unlearned):
    """d = sum_i alpha_i g_i over the end task and the sampled objectives, alpha from their Gram matrix.

    The weights come from TorchJD (`gram_weights`), which computes on the host: each step waits for the device once.
    Objectives without labels at a step are left out. Heads get the coefficients of static multitask: a head belongs to
    one loss, or to losses of one kind. Holds n + 2 body-sized vectors.
    """

    whole_gradients = True

    def __init__(self, static: Weighting, config: GramSection, seed: int) -> None:
        super().__init__(static)
        self._config, self._seed = config, seed
        self._weights_m: Tensor | None = None
        """alpha of the last step."""

    def request(self, sampled: Sampled) -> Request:
        return Request(self.static.coefficients(sampled), separate=True)

    def direction(self, sampled: Sampled, gradients: StepGradients) -> Tensor:
        """The aggregation, [P].

        Raises:
            RunFailure: for a gradient that is not finite.
        """
        separate_SP = gradients.separate_SP
        if separate_SP is None:
            raise ValueError("an aggregation needs the separate gradients")
        gram_SS = products(separate_SP, separate_SP).cpu()
        self._check(sampled, gram_SS)
        rows = [1, *(FIRST_OBJECTIVE + i for i, count in enumerate(sampled.labels) if count > 0)]
        gram_mm = gram_SS[rows][:, rows]
        weights_S = torch.zeros(len(gram_SS), dtype=gram_SS.dtype)
        if gram_mm.trace() > 0:  # without a gradient there is no update
            with seeded(self._seed, sampled.step, gram_mm.device):
                weights_S[rows] = gram_weights(self._config, gram_mm).to(weights_S.dtype)
        self._weights_m = weights_S[1:]
        return weights_S.to(separate_SP) @ separate_SP

    def describe(self, sampled: Sampled) -> WeightRow | None:
        return None if self._weights_m is None else weight_row(sampled, self.names, self._weights_m)

    def _check(self, sampled: Sampled, gram_SS: Tensor) -> None:
        finite = gram_SS.diagonal().isfinite().tolist()
        if all(finite):
            return
        objective = finite.index(False) - FIRST_OBJECTIVE
        name = "the end task" if objective < 0 else self.names[sampled.objectives[objective]]
        raise RunFailure(
            f"step {sampled.step + 1}: the gradient of {name} is not finite; lower optim.body_lr or optim.head_lr, "
            "or set precision=fp32"
        )
