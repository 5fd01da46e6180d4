"""The meta-gradient: how the dev loss after a step changes with the weights of the step.

With theta' = theta - beta d, d = lambda g_E + (1 - lambda) sum_k w_k g_k and v the dev gradient,

    dL_dev/dz_k = -beta (1 - lambda) w_k (s_k - sum_j w_j s_j)
    dL_dev/da_E = -beta lambda (1 - lambda) (s_E - s_X) = -dL_dev/da_X

with s_k = <v, g_k>, s_E = <v, g_E>, s_X = <v, sum_k w_k g_k> (semantics section 3, first-order
derivation). `jacobian: softmax` is this with beta folded into the learning rate; `identity`, as
published, drops the Jacobians: dz_k = -s_k, da_E = -s_E, da_X = -s_X. `score: cosine` divides each
inner product by both norms.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from aang_ray.gradients.scores import cosine


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
