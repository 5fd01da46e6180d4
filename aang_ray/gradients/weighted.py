"""The plain pass: one backward of the weighted loss. What `finetune` and `static` need, and nothing more."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from aang_ray.gradients.engine import P, Request, StepGradients


def weighted_pass(pieces: Sequence[P], losses: Callable[[P], Tensor], request: Request) -> StepGradients:
    """Add sum_s c_s g_s to `.grad` of body and heads by backward passes of sum_s c_s L_s, one a piece."""
    total_S: Tensor | None = None
    for piece in pieces:
        losses_S = losses(piece)
        if losses_S.requires_grad:
            torch.autograd.backward(losses_S @ request.coefficients_S.to(losses_S.dtype))
        total_S = losses_S.detach() if total_S is None else total_S + losses_S.detach()
    assert total_S is not None, "a step has at least one piece"
    return StepGradients(losses_S=total_S)
