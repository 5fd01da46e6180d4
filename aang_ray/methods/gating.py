"""Cosine gating: an auxiliary gradient counts where it agrees with the end task's. (Du et al. 2018)"""

from __future__ import annotations

from torch import Tensor

from aang_ray.config.methods.similarity import CosineGatingConfig
from aang_ray.gradients.engine import Request, StepGradients
from aang_ray.gradients.products import products
from aang_ray.gradients.scores import cosine
from aang_ray.methods.base import Sampled
from aang_ray.methods.described import weight_row
from aang_ray.methods.unlearned import Unlearned
from aang_ray.methods.weighting import Weighting
from aang_ray.store.rows import WeightRow


class CosineGating(Unlearned):
    """d = lambda g_E + (1 - lambda) / n sum_k a(cos(g_E, g_k)) g_k, lambda = 1/2.

    `gate`: a(c) = 1 where c >= 0, else 0, the source's unweighted version; `weigh`: a(c) = max(0, c), the weighted one.
    Heads learn from every loss, with the coefficients of static multitask. Nothing waits for the device. Holds n + 2
    body-sized vectors.
    """

    whole_gradients = True

    def __init__(self, static: Weighting, config: CosineGatingConfig) -> None:
        super().__init__(static)
        self._mode = config.mode
        self._weights_m: Tensor | None = None
        """Weights of the last step, on the device."""

    def request(self, sampled: Sampled) -> Request:
        return Request(self.static.coefficients(sampled), separate=True)

    def direction(self, sampled: Sampled, gradients: StepGradients) -> Tensor:
        if gradients.separate_SP is None:
            raise ValueError("cosine gating needs the separate gradients")
        rows_mP = gradients.separate_SP[1:]
        gram_mm = products(rows_mP, rows_mP)
        cosines_m = cosine(gram_mm[0], gram_mm.diagonal())
        passes_m = cosines_m.clamp_min(0) if self._mode == "weigh" else (cosines_m >= 0).to(cosines_m.dtype)
        passes_m[0].fill_(1.0)
        self._weights_m = self.static.coefficients(sampled)[1:].to(passes_m.dtype) * passes_m
        return self._weights_m @ rows_mP

    def describe(self, sampled: Sampled) -> WeightRow | None:
        return None if self._weights_m is None else weight_row(sampled, self.names, self._weights_m)
