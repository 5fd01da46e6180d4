"""The plain pass: one backward of the weighted loss. What `finetune` and `static` need, and nothing more."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from aang_ray.gradients.engine import Final, P, Request, StepGradients


def weighted_pass(
    pieces: Sequence[P],
    losses: Callable[[P], Tensor],
    request: Request,
    body: nn.Module,
    final: Final | None = None,
) -> StepGradients:
    """Add sum_s c_s g_s to `.grad` of body and heads by backward passes of sum_s c_s L_s, one a piece."""
    total_S: Tensor | None = None
    for number, piece in enumerate(pieces, start=1):
        losses_S = losses(piece)
        if losses_S.requires_grad:
            with _heard(body, final if number == len(pieces) else None):
                torch.autograd.backward(losses_S @ request.coefficients_S.to(losses_S.dtype))
        total_S = losses_S.detach() if total_S is None else total_S + losses_S.detach()
    assert total_S is not None, "a step has at least one piece"
    return StepGradients(losses_S=total_S)


@contextmanager
def _heard(body: nn.Module, final: Final | None) -> Iterator[None]:
    """Call `final` for every parameter that the backward pass is done with."""
    parameters = [p for p in body.parameters() if p.requires_grad]
    handles: list[RemovableHandle] = []
    if final is not None:
        for parameter in parameters:
            register: Callable[[Final], RemovableHandle] = parameter.register_post_accumulate_grad_hook
            handles.append(register(final))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
