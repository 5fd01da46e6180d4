"""AANG: learn the weights of the objectives and of the end task from gradient agreement with dev.

Algorithm 1 of Dery et al. 2023; with a space of one objective it is META-TARTAN.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from aang_ray.config.methods import AangConfig
from aang_ray.gradients.engine import Request, StepGradients
from aang_ray.gradients.statistics import cosine
from aang_ray.methods.base import Sampled, Weighting, beside, scatter
from aang_ray.store.schema import WeightRow

# --- methods.meta: The meta-gradient: how the dev loss after a step changes with the weights of the step.
#
# With theta' = theta - beta d, d = lambda g_E + (1 - lambda) sum_k w_k g_k and v the dev gradient,
#
#     dL_dev/dz_k = -beta (1 - lambda) w_k (s_k - sum_j w_j s_j)
#     dL_dev/da_E = -beta lambda (1 - lambda) (s_E - s_X) = -dL_dev/da_X
#
# with s_k = <v, g_k>, s_E = <v, g_E>, s_X = <v, sum_k w_k g_k> (semantics section 3, first-order
# derivation). `jacobian: softmax` is this with beta folded into the learning rate; `identity`, as
# published, drops the Jacobians: dz_k = -s_k, da_E = -s_E, da_X = -s_X. `score: cosine` divides each
# inner product by both norms.


@dataclass(frozen=True)
class Scores:
    """Agreement with the dev gradient."""

    objectives_n: Tensor
    end_task: Tensor
    auxiliary: Tensor
    """Of the joint auxiliary gradient."""


def dot_scores(dots_S: Tensor, weights_n: Tensor) -> Scores:
    """Inner products with v; segment 1 is the end task, 2 and on are the objectives."""
    objectives_n = dots_S[2:]
    return Scores(objectives_n, dots_S[1], (weights_n * objectives_n).sum())


def cosine_scores(dots_S: Tensor, norms2_S: Tensor, joint_norm2: Tensor, joint_dot: Tensor) -> Scores:
    """Cosines with v; 0 where a norm is 0. `joint_*` belong to the joint auxiliary gradient."""
    cosines_S = cosine(dots_S, norms2_S)
    joint = cosine(torch.stack((norms2_S[0], joint_dot)), torch.stack((norms2_S[0], joint_norm2)))[1]
    return Scores(cosines_S[2:], cosines_S[1], joint)


def identity_gradient(scores: Scores) -> tuple[Tensor, Tensor]:
    """(dz [n], da [2]) as published."""
    return -scores.objectives_n, -torch.stack((scores.end_task, scores.auxiliary))


def softmax_gradient(scores: Scores, weights_n: Tensor, lambda_: Tensor) -> tuple[Tensor, Tensor]:
    """(dz [n], da [2]) through w = softmax(z) and lambda = softmax(a), divided by beta."""
    centred_n = scores.objectives_n - (weights_n * scores.objectives_n).sum()
    end = -lambda_ * (1 - lambda_) * (scores.end_task - scores.auxiliary)
    return -(1 - lambda_) * weights_n * centred_n, torch.stack((end, -end))


FIRST = 2
"""Segments from this one on are the sampled objectives."""
PUBLISHED_CLIP = 10.0
"""The released code scales each objective's body gradient to this norm at most."""


class Aang:
    """Plain SGD on the factors (`aux_lr`) and on (a_E, a_X) (`sopt_lr`), every `meta_every` steps.

    With both learning rates 0 this is static multitask, and no meta work is done.
    """

    whole_gradients = False

    def __init__(self, weighting: Weighting, config: AangConfig) -> None:
        self.weighting, self.config = weighting, config
        self.uses_dev = config.uses_dev
        self._gradient_F = torch.zeros_like(weighting.flat_F)
        self._gradient_2 = torch.zeros_like(weighting.lambda_logits_2)
        self._averaged = 0
        self._health: list[tuple[int, Tensor]] = []
        """(steps done, [cos(v, g_E), ||v||]) of every step since the last description, on the device."""

    def request(self, sampled: Sampled) -> Request:
        coefficients_S = self.weighting.coefficients(sampled)
        if not self.uses_dev:
            return Request(coefficients_S)
        if self.config.auxiliary_score == "published":
            return Request(coefficients_S, scores=True, gram=True)
        if self.config.score == "dot":
            return Request(coefficients_S, scores=True)
        return Request(coefficients_S, scores=True, joint_from=FIRST)

    def direction(self, sampled: Sampled, gradients: StepGradients) -> None:
        return None

    def observe(self, sampled: Sampled, gradients: StepGradients) -> None:
        if not self.uses_dev:
            return
        weights_n = self.weighting.weights(sampled)
        scores = self._scores(sampled, gradients, weights_n)
        if self.config.jacobian == "identity":
            dz_n, da_2 = identity_gradient(scores)
        else:
            dz_n, da_2 = softmax_gradient(scores, weights_n, self.weighting.lambda_)
        # A segment without labels has g = 0 and its z does not move.
        labelled_n = beside([count > 0 for count in sampled.labels], dz_n)
        dz_n = torch.where(labelled_n, dz_n, 0.0).to(self._gradient_F.dtype)
        self._gradient_F += scatter(dz_n, self.weighting.entries(sampled), self.weighting.index.size)
        self._gradient_2 += da_2.to(self._gradient_2.dtype)
        self._averaged += 1
        if self._averaged == self.config.meta_every:
            self.weighting.flat_F -= self.config.aux_lr * self._gradient_F / self._averaged
            self.weighting.lambda_logits_2 -= self.config.sopt_lr * self._gradient_2 / self._averaged
            self._gradient_F.zero_()
            self._gradient_2.zero_()
            self._averaged = 0

    def factors(self) -> Mapping[str, npt.NDArray[np.float64]]:
        return self.weighting.factors()

    def describe(self, sampled: Sampled) -> WeightRow:
        health = self._described_health()
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
        like = self.weighting.flat_F
        self._health = [(int(step), torch.tensor(values, device=like.device)) for step, values in state["health"]]

    def _described_health(self) -> dict[str, float]:
        """Mean and deviation since the last description, and cos(v, g_E) of every step."""
        if not self._health:
            return {}
        values_K2 = torch.stack([values for _, values in self._health]).double().cpu()
        means = values_K2.mean(dim=0).tolist()
        deviation = float(values_K2[:, 0].std(correction=0))
        described = {"cos_dev_end_task": means[0], "cos_dev_end_task_sd": deviation, "dev_gradient_norm": means[1]}
        for (step, _), cos in zip(self._health, values_K2[:, 0].tolist(), strict=True):
            described[f"cos_dev_end_task/{step}"] = cos
        return described

    def _scores(self, sampled: Sampled, gradients: StepGradients, weights_n: Tensor) -> Scores:
        dots_S, norms2_S = gradients.dots_S, gradients.norms2_S
        if dots_S is None or norms2_S is None:
            raise ValueError("AANG needs the scores of the step's gradients")
        cosines_S = cosine(dots_S, norms2_S)
        self._health.append((sampled.step + 1, torch.stack((cosines_S[1], norms2_S[0].sqrt())).float()))
        if self.config.auxiliary_score == "published":
            return self._published_scores(sampled, gradients, dots_S, norms2_S)
        if self.config.score == "dot":
            return dot_scores(dots_S, weights_n.to(dots_S.dtype))
        if gradients.joint_norm2 is None:
            raise ValueError("the score of the joint auxiliary gradient needs its norm")
        # Of (1 - lambda) sum w_k g_k: a cosine does not see the scale.
        joint_n = self.weighting.coefficients(sampled)[FIRST:].to(dots_S.dtype)
        return cosine_scores(dots_S, norms2_S, gradients.joint_norm2, (joint_n * dots_S[FIRST:]).sum())

    def _published_scores(self, sampled: Sampled, gradients: StepGradients, dots_S: Tensor, norms2_S: Tensor) -> Scores:
        """s_X of sum (active labels) g_k, each g_k clipped to norm 10 first."""
        if gradients.gram_SS is None:
            raise ValueError("the published score of the joint auxiliary gradient needs the Gram matrix")
        labels_n = beside(sampled.labels, dots_S).to(dots_S.dtype)
        joint_n = labels_n * torch.clamp(PUBLISHED_CLIP / norms2_S[FIRST:].sqrt().clamp_min(1e-30), max=1.0)
        dot = (joint_n * dots_S[FIRST:]).sum()
        if self.config.score == "dot":
            return Scores(dots_S[FIRST:], dots_S[1], dot)
        norm2 = joint_n @ gradients.gram_SS[FIRST:, FIRST:] @ joint_n
        return cosine_scores(dots_S, norms2_S, norm2, dot)
