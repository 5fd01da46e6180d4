"""What one worker computes of a step, where it has no memory or nothing to compute."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import nn

from aang_ray.errors import RunFailure
from aang_ray.gradients.engine import Final, Request, StepGradients
from aang_ray.train.micro import is_out_of_memory

Compute = Callable[[Request, Final | None], StepGradients]
"""An engine's pass over a worker's examples."""
Given = ParamSpec("Given")
Answer = TypeVar("Answer")


def failing_for_all(compute: Callable[Given, Answer]) -> Callable[Given, Answer]:
    """Memory that runs out on one worker is a failure of the run: the sums of its step have begun already."""

    def checked(*given: Given.args, **named: Given.kwargs) -> Answer:
        try:
            return compute(*given, **named)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise RunFailure(
                "out of memory on one of the workers: set batch.micro to a smaller number, or lower data.max_tokens, "
                "batch.auxiliary or encoder.layers"
            ) from error

    return checked


def no_gradients(request: Request, body: nn.Module) -> StepGradients:
    """Of a worker without examples."""
    parameters = [p for p in body.parameters() if p.requires_grad]
    segments = len(request.coefficients_S)
    dtype = torch.promote_types(parameters[0].dtype, torch.float32)
    zeros_S = torch.zeros(segments, dtype=dtype, device=parameters[0].device)
    rows = request.joint_rows
    return StepGradients(
        zeros_S,
        dots_S=zeros_S.clone(),
        norms2_S=zeros_S.clone(),
        separate_SP=zeros_S.new_zeros(segments, sum(p.numel() for p in parameters)) if request.separate else None,
        kept={segment: zeros_S.new_zeros(sum(p.numel() for p in parameters)) for segment in request.keep},
        joint_rows_UH=None if rows is None else zeros_S.new_zeros(rows.rows, rows.table.shape[1]),
    )
