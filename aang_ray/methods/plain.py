"""Methods without learned weights: one loss alone, fixed weights, and cosine gating."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from aang_ray.config.methods import CosineGatingConfig, MethodConfig, StaticConfig
from aang_ray.config.run import RunConfig
from aang_ray.gradients.engine import Request, StepGradients
from aang_ray.gradients.products import products
from aang_ray.gradients.statistics import cosine
from aang_ray.methods.aang import Weighting
from aang_ray.methods.base import Method, Sampled, like_device, weight_row
from aang_ray.objectives.space import Space
from aang_ray.store.schema import WeightRow


class Finetune(Method):
    """L = L_E: the end task alone."""

    coefficients: ClassVar[tuple[float, ...]] = (0.0, 1.0)
    """Weights of the step's segments."""

    def __init__(self, device: torch.device) -> None:
        self.state = {}
        self._request = Request(coefficients_S=torch.tensor(self.coefficients, device=device))

    @classmethod
    def build(cls, config: RunConfig, space: Space | None, device: torch.device) -> Self:
        return cls(device)

    def request(self, sampled: Sampled) -> Request:
        return self._request


class MaskedLm(Finetune):
    """L = L_k for the single objective of a masked-LM stage (TAPT, DAPT), which has no end-task examples."""

    coefficients = (0.0, 0.0, 1.0)


class Pooled(Finetune):
    """L = (1/K) sum of L_k over all K other labelled sets, which have a stage of their own."""

    def request(self, sampled: Sampled) -> Request:
        count = len(sampled.objectives)
        weights = (0.0, 0.0, *([1 / count] * count))
        return Request(coefficients_S=like_device(weights, self._request.coefficients_S))


class Static(Method):
    """Static multitask, L = 1/2 L_E + 1/2 (1/n) sum over S of L_k: Algorithm 1 with factors that stay 0.

    (Dery et al. 2023, section 7.3.) With `weights`, lambda and the factors A are those of the given weights, and stay
    so. Other methods start from these coefficients, or use them for the heads.
    """

    def __init__(self, weighting: Weighting, config: MethodConfig | None = None, seed: int = 0) -> None:
        self.weighting, self.seed = weighting, seed
        self.config: MethodConfig = config or StaticConfig()
        self.state = self.initial_state()

    @classmethod
    def build(cls, config: RunConfig, space: Space | None, device: torch.device) -> Self:
        weighting = Weighting.initial(config, space, device)
        given = config.method.weights if isinstance(config.method, StaticConfig) else None
        if given is not None and given.objectives is not None:
            # The factor A_k = ln w_k makes softmax(z restricted to S) proportional to the given weights.
            logs = [math.log(given.objectives[name]) for name in weighting.index.names["A"]]
            weighting.flat_F[: len(logs)] = like_device(logs, weighting.flat_F)
            weighting = weighting.with_lambda(given.end_task or 0.5)
        return cls(weighting, config.method, config.seed)

    def initial_state(self) -> dict[str, Tensor]:
        """Return the state before the first step. Vectors over losses are [1 + K]: the end task, then the space."""
        return {}

    @property
    def losses(self) -> int:
        """Number of losses, 1 + K: the end task and every objective of the space."""
        return 1 + len(self.names)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the space's objectives."""
        return self.weighting.index.names["A"]

    def request(self, sampled: Sampled) -> Request:
        return Request(coefficients_S=self.weighting.coefficients(sampled))

    def factors(self) -> Mapping[str, npt.NDArray[np.float64]]:
        return self.weighting.factors()

    def describe(self, sampled: Sampled) -> WeightRow | None:
        return self.weighting.row(sampled, {})


class MtTartan(Static):
    """L = (L_E + sum over S of L_k) / (1 + n). (Dery et al. 2022)"""

    @classmethod
    def build(cls, config: RunConfig, space: Space | None, device: torch.device) -> Self:
        weighting = Weighting.initial(config, space, device)
        n = len(weighting.index.names["A"]) if config.n == "all" else config.n
        return cls(weighting.with_lambda(1 / (1 + n)), config.method, config.seed)


class SeparateGradients(Static, ABC):
    """A method that computes the body's update from the separate gradients.

    Heads get the coefficients of static multitask: a head belongs to one loss, or to losses of one kind. Holds n + 2
    body-sized vectors.
    """

    whole_gradients = True
    _weights_m: Tensor | None = None
    """Weights of the gradients in the last step's update; None before it, and if no gradient has a single weight."""

    def request(self, sampled: Sampled) -> Request:
        return Request(self.weighting.coefficients(sampled), separate=True)

    def direction(self, sampled: Sampled, gradients: StepGradients) -> Tensor:
        assert gradients.separate_SP is not None
        return self.combined(sampled, gradients, gradients.separate_SP)

    @abstractmethod
    def combined(self, sampled: Sampled, gradients: StepGradients, separate_SP: Tensor) -> Tensor:
        """Return the body's update, [P]."""

    def describe(self, sampled: Sampled) -> WeightRow | None:
        return None if self._weights_m is None else weight_row(sampled, self.names, self._weights_m)


class CosineGating(SeparateGradients):
    """d = lambda g_E + (1 - lambda) / n sum_k a(cos(g_E, g_k)) g_k, lambda = 1/2. (Du et al. 2018)

    `gate`: a(c) = 1 if c >= 0, else 0, the paper's unweighted version; `weigh`: a(c) = max(0, c), the weighted one.
    """

    config: CosineGatingConfig

    def combined(self, sampled: Sampled, gradients: StepGradients, separate_SP: Tensor) -> Tensor:
        rows_mP = separate_SP[1:]
        gram_mm = products(rows_mP, rows_mP)
        cosines_m = cosine(gram_mm[0], gram_mm.diagonal())
        weigh = self.config.mode == "weigh"
        passes_m = cosines_m.clamp_min(0) if weigh else (cosines_m >= 0).to(cosines_m.dtype)
        passes_m[0].fill_(1.0)
        self._weights_m = self.weighting.coefficients(sampled)[1:].to(passes_m.dtype) * passes_m
        return self._weights_m @ rows_mP
