"""A step's statistics where all inner products are known."""

from __future__ import annotations

import torch
from torch import Tensor

from aang_ray.gradients.engine import Request, StepGradients


def from_gram(losses_S: Tensor, gram_SS: Tensor, request: Request, separate_SP: Tensor | None) -> StepGradients:
    """What a step asked for, from G = <g_s, g_t>: norms are its diagonal, ||sum c_s g_s||^2 is cᵀ G c."""
    joint_norm2 = None
    if request.scores and request.joint_from is not None:
        numbers_S = torch.arange(len(gram_SS), device=gram_SS.device)
        joint_S = request.coefficients_S.to(gram_SS.dtype).masked_fill(numbers_S < request.joint_from, 0.0)
        joint_norm2 = joint_S @ gram_SS @ joint_S
    return StepGradients(
        losses_S=losses_S,
        dots_S=gram_SS[0].clone() if request.scores else None,
        norms2_S=gram_SS.diagonal().clone() if request.scores else None,
        joint_norm2=joint_norm2,
        gram_SS=gram_SS if request.gram else None,
        separate_SP=separate_SP if request.separate else None,
    )
