"""AANG: learn the weights of the objectives and of the end task from the agreement of gradients with dev.

This is Algorithm 1 of Dery et al. 2023; with a space of one objective it is META-TARTAN (Dery et al. 2022). Equations
and switches: docs/semantics.md, sections 1 and 3.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from aang_ray.config.methods import AangConfig
from aang_ray.config.run import RunConfig
from aang_ray.errors import UserError
from aang_ray.gradients.engine import Request, StepGradients
from aang_ray.gradients.statistics import cosine
from aang_ray.methods.base import Method, Sampled, labelled, like_device, named_weights
from aang_ray.objectives.source import FIRST_OBJECTIVE
from aang_ray.objectives.space import Space
from aang_ray.store.schema import WeightRow

# 1. Factors: z_k = A_k + D_d + T_t + R_r + O_o for the objective k = (d, t, r, o).

LETTERS = ("A", "D", "T", "R", "O")


@dataclass(frozen=True)
class FactorIndex:
    """The entries of a flat vector of factors whose sum is each objective's logit."""

    names: Mapping[str, tuple[str, ...]]
    """Names of the entries by letter, in the order of the flat vector."""
    entries_K5: Tensor
    """For each objective the flat positions of its A, D, T, R and O, int64."""

    @classmethod
    def of(cls, names: Mapping[str, Sequence[str]], stages: Sequence[tuple[str, str, str, str]]) -> FactorIndex:
        """Return the index of a space from the `names` of the entries by letter and each objective's (d, t, r, o)."""
        ordered = {letter: tuple(names[letter]) for letter in LETTERS}
        offsets = dict(zip(LETTERS, np.cumsum([0] + [len(ordered[letter]) for letter in LETTERS])[:-1], strict=True))
        rows = [
            [int(offsets["A"]) + k]
            + [int(offsets[letter]) + ordered[letter].index(name) for letter, name in zip("DTRO", stage, strict=True)]
            for k, stage in enumerate(stages)
        ]
        return cls(ordered, torch.tensor(rows, dtype=torch.int64))

    @property
    def size(self) -> int:
        return sum(len(entries) for entries in self.names.values())


def logits(flat_F: Tensor, entries_n5: Tensor) -> Tensor:
    """Return z of the sampled objectives, [n], from all factors [F] and the sampled objectives' entries [n, 5]."""
    return flat_F[entries_n5].sum(dim=1)


def scatter(gradient_n: Tensor, entries_n5: Tensor, size: int) -> Tensor:
    """Return the gradient of all factors, [size], from that of the logits, [n], summed over those that use a factor."""
    flat_F = torch.zeros(size, dtype=gradient_n.dtype, device=gradient_n.device)
    return flat_F.index_add(0, entries_n5.flatten(), gradient_n[:, None].expand(-1, entries_n5.shape[1]).flatten())


# 2. Weights: w = softmax(z restricted to S), lambda = softmax(a_E, a_X)[E].


@dataclass
class Weighting:
    """Factors and (a_E, a_X) on the device, and the weights that follow from them.

    In `published` allocation an objective's coefficient is (b / B) * softmax_S(A_k + O_o), not renormalised
    (docs/semantics.md, section 2, point 3).
    """

    index: FactorIndex
    flat_F: Tensor
    lambda_logits_2: Tensor
    published: bool

    @classmethod
    def zeros(cls, index: FactorIndex, device: torch.device, published: bool) -> Weighting:
        """Return a weighting whose factors are all 0, so that w = 1/n and lambda = 1/2."""
        moved = FactorIndex(index.names, index.entries_K5.to(device))
        return cls(moved, torch.zeros(index.size, device=device), torch.zeros(2, device=device), published)

    @classmethod
    def initial(cls, config: RunConfig, space: Space | None, device: torch.device) -> Weighting:
        """Return the weighting of a run before its first step: all factors are 0, so that w = 1/n and lambda = 1/2.

        Raises:
            UserError: There is no space of objectives.
        """
        if space is None:
            raise UserError(f"method.name: {config.method.name} needs a space of auxiliary objectives")
        index = FactorIndex.of(space.factors(), [objective.stages for objective in space.objectives])
        return cls.zeros(index, device, config.objectives.allocation == "published")

    def with_lambda(self, weight: float) -> Weighting:
        """Return the same weighting with another weight of the end task, in (0, 1)."""
        logits_2 = self.lambda_logits_2.new_tensor([0.0, math.log(1 / weight - 1)])
        return replace(self, lambda_logits_2=logits_2)

    @property
    def lambda_(self) -> Tensor:
        """Weight of the end task, a scalar."""
        return torch.softmax(self.lambda_logits_2, dim=0)[0]

    def entries(self, sampled: Sampled) -> Tensor:
        """Return the flat positions of the sampled objectives' factors, [n, 5]."""
        return self.index.entries_K5.index_select(0, like_device(sampled.objectives, self.index.entries_K5))

    def weights(self, sampled: Sampled) -> Tensor:
        """Return w of the sampled objectives, [n]."""
        entries_n5 = self.entries(sampled)
        if not self.published:
            return torch.softmax(logits(self.flat_F, entries_n5), dim=0)
        shares_n = like_device(sampled.shares, self.flat_F)
        return shares_n * torch.softmax(logits(self.flat_F, entries_n5[:, ::4]), dim=0)  # columns 0 and 4: A and O

    def coefficients(self, sampled: Sampled) -> Tensor:
        """Return the segments' coefficients (0 for dev, lambda, (1 - lambda) w_1, ..., (1 - lambda) w_n), [2 + n]."""
        lambda_ = self.lambda_.reshape(1)
        return torch.cat((torch.zeros_like(lambda_), lambda_, (1 - lambda_) * self.weights(sampled)))

    def factors(self) -> Mapping[str, npt.NDArray[np.float64]]:
        """Return the factors in host memory, by letter."""
        flat = self.flat_F.double().cpu().numpy()
        ends = np.cumsum([len(self.index.names[letter]) for letter in LETTERS])[:-1]
        return dict(zip(LETTERS, np.split(flat, ends), strict=True))

    def row(self, sampled: Sampled, health: Mapping[str, float]) -> WeightRow:
        """Return the weights at this step for the store, with the given `health` values."""
        factors = {
            letter: dict(zip(self.index.names[letter], (float(v) for v in values), strict=True))
            for letter, values in self.factors().items()
        }
        weights = self.weights(sampled).tolist()
        return WeightRow(
            step=sampled.step + 1,
            end_task_weight=float(self.lambda_),
            weights=named_weights(sampled, self.index.names["A"], weights),
            factors=factors,
            health=dict(health),
        )


# 3. The meta-gradient: how the dev loss after a step changes with the weights of the step.
#
# With theta' = theta - beta d, d = lambda g_E + (1 - lambda) sum_k w_k g_k and v the dev gradient,
#
#     dL_dev/dz_k = -beta (1 - lambda) w_k (s_k - sum_j w_j s_j)
#     dL_dev/da_E = -beta lambda (1 - lambda) (s_E - s_X) = -dL_dev/da_X
#
# with s_k = <v, g_k>, s_E = <v, g_E> and s_X = <v, sum_k w_k g_k>. `jacobian: softmax` is this with beta folded into
# the learning rate. `identity`, as published, drops the Jacobians: dz_k = -s_k, da_E = -s_E, da_X = -s_X. `score:
# cosine` divides each inner product by both norms. (docs/semantics.md, section 3)


@dataclass(frozen=True)
class Scores:
    """Scores of a step's gradients: their cosines or inner products with the dev gradient."""

    objectives_n: Tensor
    end_task: Tensor
    auxiliary: Tensor
    """Score of the joint auxiliary gradient."""


def cosine_scores(dots_S: Tensor, norms2_S: Tensor, joint_norm2: Tensor, joint_dot: Tensor) -> Scores:
    """Return cosines with v, 0 where a norm is 0. `joint_*` are of the joint auxiliary gradient."""
    cosines_S = cosine(dots_S, norms2_S)
    joint = cosine(torch.stack((norms2_S[0], joint_dot)), torch.stack((norms2_S[0], joint_norm2)))[1]
    return Scores(cosines_S[FIRST_OBJECTIVE:], cosines_S[1], joint)


def identity_gradient(scores: Scores) -> tuple[Tensor, Tensor]:
    """Return (dz [n], da [2]) as published."""
    return -scores.objectives_n, -torch.stack((scores.end_task, scores.auxiliary))


def softmax_gradient(scores: Scores, weights_n: Tensor, lambda_: Tensor) -> tuple[Tensor, Tensor]:
    """Return (dz [n], da [2]), differentiated through w = softmax(z) and lambda = softmax(a), divided by beta."""
    centred_n = scores.objectives_n - (weights_n * scores.objectives_n).sum()
    end = -lambda_ * (1 - lambda_) * (scores.end_task - scores.auxiliary)
    return -(1 - lambda_) * weights_n * centred_n, torch.stack((end, -end))


# 4. The method.

PUBLISHED_CLIP = 10.0
"""Norm at which the released code clips each objective's body gradient."""


class Aang(Method):
    """Plain SGD on the factors (`aux_lr`) and on (a_E, a_X) (`sopt_lr`), every `meta_every` steps.

    With both learning rates 0 this is static multitask, and no meta-gradients are computed.
    """

    def __init__(self, weighting: Weighting, config: AangConfig) -> None:
        self.weighting, self.config = weighting, config
        self.uses_dev = config.uses_dev
        self._gradient_F = torch.zeros_like(weighting.flat_F)
        self._gradient_2 = torch.zeros_like(weighting.lambda_logits_2)
        self._averaged = 0
        """Number of steps whose meta-gradients are in the two sums above."""
        self._health: list[tuple[int, Tensor]] = []
        """Pairs (steps done, [cos(v, g_E), ||v||] on the device) of all steps since the last call of `describe`."""

    @classmethod
    def build(cls, config: RunConfig, space: Space | None, device: torch.device) -> Self:
        assert isinstance(config.method, AangConfig)
        return cls(Weighting.initial(config, space, device), config.method)

    def request(self, sampled: Sampled) -> Request:
        coefficients_S = self.weighting.coefficients(sampled)
        if not self.uses_dev:
            return Request(coefficients_S)
        if self.config.auxiliary_score == "published":
            return Request(coefficients_S, scores=True, gram=True)
        if self.config.score == "dot":
            return Request(coefficients_S, scores=True)
        return Request(coefficients_S, scores=True, joint_from=FIRST_OBJECTIVE)

    def observe(self, sampled: Sampled, gradients: StepGradients) -> None:
        if not self.uses_dev:
            return
        weights_n = self.weighting.weights(sampled)
        scores = self._scores(sampled, gradients, weights_n)
        if self.config.jacobian == "identity":
            dz_n, da_2 = identity_gradient(scores)
        else:
            dz_n, da_2 = softmax_gradient(scores, weights_n, self.weighting.lambda_)
        # An objective without labels has g = 0, and its z must not change (with `softmax` it would).
        dz_n = torch.where(labelled(sampled, dz_n)[1:], dz_n, 0.0).to(self._gradient_F.dtype)
        self._gradient_F += scatter(dz_n, self.weighting.entries(sampled), self.weighting.index.size)
        self._gradient_2 += da_2.to(self._gradient_2.dtype)
        self._averaged += 1
        if self._averaged == self.config.meta_every:
            self.weighting.flat_F -= self.config.aux_lr * self._gradient_F / self._averaged
            self.weighting.lambda_logits_2 -= self.config.sopt_lr * self._gradient_2 / self._averaged
            self._gradient_F.zero_()
            self._gradient_2.zero_()
            self._averaged = 0

    def _scores(self, sampled: Sampled, gradients: StepGradients, weights_n: Tensor) -> Scores:
        dots_S, norms2_S = gradients.dots_S, gradients.norms2_S
        assert dots_S is not None
        assert norms2_S is not None
        cosines_S = cosine(dots_S, norms2_S)
        self._health.append((sampled.step + 1, torch.stack((cosines_S[1], norms2_S[0].sqrt())).float()))
        if self.config.auxiliary_score == "published":
            return self._published_scores(sampled, gradients, dots_S, norms2_S)
        objectives_n = dots_S[FIRST_OBJECTIVE:]
        if self.config.score == "dot":
            return Scores(objectives_n, dots_S[1], (weights_n.to(dots_S.dtype) * objectives_n).sum())
        assert gradients.joint_norm2 is not None
        # The norm is that of (1 - lambda) sum w_k g_k, so the inner product must be of it too; the cosine is the same.
        joint_n = self.weighting.coefficients(sampled)[FIRST_OBJECTIVE:].to(dots_S.dtype)
        return cosine_scores(dots_S, norms2_S, gradients.joint_norm2, (joint_n * objectives_n).sum())

    def _published_scores(self, sampled: Sampled, gradients: StepGradients, dots_S: Tensor, norms2_S: Tensor) -> Scores:
        """Return scores in which s_X is that of sum (number of labels) g_k, with each g_k clipped to norm 10."""
        assert gradients.gram_SS is not None
        labels_n = like_device(sampled.labels, dots_S).to(dots_S.dtype)
        norms_n = norms2_S[FIRST_OBJECTIVE:].sqrt().clamp_min(1e-30)
        joint_n = labels_n * torch.clamp(PUBLISHED_CLIP / norms_n, max=1.0)
        dot = (joint_n * dots_S[FIRST_OBJECTIVE:]).sum()
        if self.config.score == "dot":
            return Scores(dots_S[FIRST_OBJECTIVE:], dots_S[1], dot)
        norm2 = joint_n @ gradients.gram_SS[FIRST_OBJECTIVE:, FIRST_OBJECTIVE:] @ joint_n
        return cosine_scores(dots_S, norms2_S, norm2, dot)

    def factors(self) -> Mapping[str, npt.NDArray[np.float64]]:
        return self.weighting.factors()

    def describe(self, sampled: Sampled) -> WeightRow:
        """Return the weights, and cos(v, g_E) since the last call: mean, standard deviation, and value at each step."""
        health: dict[str, float] = {}
        if self._health:
            values_K2 = torch.stack([values for _, values in self._health]).double().cpu()
            means = values_K2.mean(dim=0).tolist()
            deviation = float(values_K2[:, 0].std(correction=0))
            health = {"cos_dev_end_task": means[0], "cos_dev_end_task_sd": deviation, "dev_gradient_norm": means[1]}
            for (step, _), cos in zip(self._health, values_K2[:, 0].tolist(), strict=True):
                health[f"cos_dev_end_task/{step}"] = cos
        self._health.clear()
        return self.weighting.row(sampled, health)

    def state_dict(self) -> dict[str, Any]:
        return {
            "flat": self.weighting.flat_F.clone().cpu(),
            "lambda_logits": self.weighting.lambda_logits_2.clone().cpu(),
            "gradient": self._gradient_F.clone().cpu(),
            "lambda_gradient": self._gradient_2.clone().cpu(),
            "averaged": self._averaged,
            "health": [(step, values.tolist()) for step, values in self._health],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.weighting.flat_F.copy_(state["flat"])
        self.weighting.lambda_logits_2.copy_(state["lambda_logits"])
        self._gradient_F.copy_(state["gradient"])
        self._gradient_2.copy_(state["lambda_gradient"])
        self._averaged = int(state["averaged"])
        device = self.weighting.flat_F.device
        self._health = [(int(step), torch.tensor(values, device=device)) for step, values in state["health"]]
