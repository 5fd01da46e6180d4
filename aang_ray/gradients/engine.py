"""What a training step requests from a gradient engine, and what it gets.

The examples of a step are divided into *segments*: the dev batch (segment 0), the end task's batch, and one batch for
each sampled objective. Segment s has the unweighted mean loss L_s and the gradient g_s = dL_s / d theta with respect to
the body; v = g_0. For given coefficients c an engine adds sum_s c_s g_s to the `.grad` of body and heads, and returns
the statistics that were requested: `single_pass.SegmentEngine` in one pass, `loop.LoopEngine`, the reference, in one
for each segment.

Shape suffixes: S segments, P entries of the body's parameters (flattened in `named_parameters` order), V entries of an
embedding table, U wanted rows of a table, H width of a table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import psutil
import torch
from torch import Tensor, nn

from aang_ray.errors import UserError
from aang_ray.model.segments import PassUpdate, SegmentRows, pass_update


class Piece(Protocol):
    """A part of a step's batch for one forward pass. Segments are numbered over the whole step, dev first."""

    @property
    def tokens(self) -> SegmentRows:
        """The segment of each of the flattened [R * L] token positions that the body computes."""
        ...


@dataclass(frozen=True)
class JointRows:
    """Request for rows of a table's part of the joint gradient, which workers sum up before they compute its norm."""

    table: nn.Parameter
    place_V: Tensor
    """Index of each table row among the requested rows; `rows` for all others. [V]"""
    rows: int
    """Number U of requested rows."""


@dataclass(frozen=True)
class Request:
    """The quantities that an engine computes for a step."""

    coefficients_S: Tensor
    """Weight c_s of every segment in the update, fp32 on the device; the dev segment's is 0."""
    scores: bool = False
    """Return inner products with segment 0 and squared norms."""
    joint_from: int | None = None
    """With `scores`: also return the squared norm of the joint gradient, sum_{s >= joint_from} c_s g_s."""
    gram: bool = False
    """Return the matrix of all inner products."""
    separate: bool = False
    """Return every segment's gradient, one vector of the body's size for each."""
    keep: tuple[int, ...] = ()
    """With `scores`: return the gradients of these segments, one vector of the body's size for each."""
    joint_rows: JointRows | None = None
    """With `joint_from`: return these rows of the joint gradient instead of its norm."""
    reference_P: Tensor | None = None
    """With `scores`, without `gram` and `separate`: the inner products are with this vector, not with segment 0's
    gradient."""

    def __post_init__(self) -> None:
        """Refuse a reference with a matrix of all inner products, which has no place for it."""
        if self.reference_P is not None and (self.gram or self.separate or not self.scores):
            raise ValueError("a reference goes with scores alone")


@dataclass(frozen=True)
class StepGradients:
    """The result of an engine. All tensors are on the device, and the host does not wait for them."""

    losses_S: Tensor
    """Unweighted mean loss of each segment, [S]."""
    dots_S: Tensor | None = None
    """<v, g_s>; <u, g_s> for a request with the reference u."""
    norms2_S: Tensor | None = None
    """||g_s||^2."""
    joint_norm2: Tensor | None = None
    """||sum_{s >= joint_from} c_s g_s||^2, a scalar."""
    gram_SS: Tensor | None = None
    """<g_s, g_t>."""
    separate_SP: Tensor | None = None
    """Every g_s."""
    kept: Mapping[int, Tensor] = field(default_factory=dict)
    """g_s, [P], for each segment s of `Request.keep`."""
    joint_rows_UH: Tensor | None = None
    """The rows that `Request.joint_rows` requests."""
    update_P: Tensor | None = None
    """sum_s c_s g_s with a tied decoder's part. `Stepper` sets it if `Request.keep` is not empty."""


P = TypeVar("P", bound=Piece)


class Engine(Protocol):
    """Computes a step's gradients."""

    per_segment: bool
    """Whether each piece must hold a single segment (the loop) or may hold several (the single pass)."""

    def __call__(self, pieces: Sequence[P], losses: Callable[[P], Tensor], request: Request) -> StepGradients:
        """Run forward and backward over the pieces and add the update to `.grad`.

        Args:
            pieces: The step's batch, dev segment first.
            losses: Returns a piece's share of every segment's unweighted mean loss, [S]; 0 for a segment without
                labels.
            request: What to compute.
        """
        ...


def weighted_pass(pieces: Sequence[P], losses: Callable[[P], Tensor], request: Request) -> StepGradients:
    """Run a plain backward pass of sum_s c_s L_s for each piece, and return only the losses (`finetune`, `static`)."""
    total_S: Tensor | None = None
    for piece in pieces:
        with pass_update(PassUpdate(request.coefficients_S)):
            losses_S = losses(piece)
        if losses_S.requires_grad:
            torch.autograd.backward(losses_S @ request.coefficients_S.to(losses_S.dtype))
        total_S = losses_S.detach() if total_S is None else total_S + losses_S.detach()
    assert total_S is not None, "a step has at least one piece"
    return StepGradients(losses_S=total_S)


class UnsupportedModule(UserError):
    """A module, named in the message, whose gradient cannot be split by segment exactly."""

    def __init__(self, name: str, kind: str, reason: str) -> None:
        super().__init__(f"module {name!r} ({kind}) {reason}; set gradients.engine: loop, or replace the module")


def check_memory(body: Sequence[nn.Parameter], vectors: int, lower: str = "n or encoder.layers") -> None:
    """Refuse a step before it begins if the gradient vectors that it must store do not fit into free memory.

    Raises:
        UserError: They do not fit; the message has both numbers of bytes, and `lower`, the settings to lower.
    """
    dtype = torch.promote_types(body[0].dtype, torch.float32)
    entries = sum(parameter.numel() for parameter in body)
    needed = vectors * entries * dtype.itemsize
    free = free_memory(body[0].device)
    if needed > free:
        raise UserError(
            f"{vectors} gradients of {entries} parameters need {needed} bytes, {free} are free on "
            f"{body[0].device.type}: lower {lower}"
        )


def free_memory(device: torch.device) -> int:
    """Return the free bytes of the device's memory."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return int(psutil.virtual_memory().available)


def split_vector(vector_P: Tensor, parameters: Iterable[nn.Parameter]) -> list[tuple[nn.Parameter, Tensor]]:
    """Return each parameter with a view of its part of a vector, in the parameter's shape."""
    known = list(parameters)
    parts = torch.split(vector_P, [p.numel() for p in known])
    return [(p, part.view(p.shape)) for p, part in zip(known, parts, strict=True)]
