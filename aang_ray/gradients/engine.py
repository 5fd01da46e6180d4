"""What every engine of gradients offers: one update and the statistics that a method asked for.

Let segment s of a step have the unweighted loss L_s and the body gradient g_s. Segment 0 may be the
dev batch, with v = g_0. An engine returns, for coefficients c, the update sum_s c_s g_s (added to
`.grad`; heads get the same weighted sum of their own gradients) and, where asked,
<v, g_s>, ||g_s||^2, the Gram matrix <g_s, g_t>, or the g_s themselves. (semantics sections 2.7 and 3)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import psutil
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from aang_ray.errors import UserError
from aang_ray.model.segments import SegmentRows


class Piece(Protocol):
    """A part of a step's batch that goes through the model in one forward pass.

    Segments are numbered over the whole step; a piece may hold some of them only, or part of one
    (the others are empty in its bounds). Pieces are cut along segments, dev first.
    """

    @property
    def tokens(self) -> SegmentRows:
        """Whose are the flattened [R * L] positions that the body computes."""
        ...


@dataclass(frozen=True)
class JointRows:
    """Which rows of a table's joint gradient are wanted, for sums over processes that each have a part of it."""

    table: nn.Parameter
    place_V: Tensor
    """Where each of the table's V rows goes among those that are wanted; `rows` for one that is not."""
    rows: int


@dataclass(frozen=True)
class Request:
    """What a step wants of the engine."""

    coefficients_S: Tensor
    """Weight of every segment in the update, fp32 on the device; the dev segment's is 0."""
    scores: bool = False
    """Inner products with segment 0 and squared norms."""
    joint_from: int | None = None
    """With `scores`: also the squared norm of sum_{s >= joint_from} c_s g_s."""
    gram: bool = False
    """The matrix of all inner products."""
    separate: bool = False
    """The gradients themselves, one body-sized vector a segment."""
    keep: tuple[int, ...] = ()
    """With `scores`: segments whose gradients are wanted themselves, one body-sized vector each."""
    joint_rows: JointRows | None = None
    """With `joint_from`: instead of the joint gradient's norm, these rows of it."""


@dataclass(frozen=True)
class StepGradients:
    """What one step's gradients say. Everything stays on the device; nothing waits for it."""

    losses_S: Tensor
    dots_S: Tensor | None = None
    norms2_S: Tensor | None = None
    joint_norm2: Tensor | None = None
    """||sum_{s >= joint_from} c_s g_s||^2, a scalar."""
    gram_SS: Tensor | None = None
    separate_SP: Tensor | None = None
    """[S, P]: the body's parameters flattened in `named_parameters` order."""
    kept: Mapping[int, Tensor] = field(default_factory=dict)
    """[P] for each segment of `keep`."""
    joint_rows_UH: Tensor | None = None
    """The wanted rows of sum_{s >= joint_from} c_s g_s of a table, as they are scored."""
    update_P: Tensor | None = None
    """sum_s c_s g_s, [P], a tied decoder's part included: with `keep`, filled in when all workers' parts are there."""


P = TypeVar("P", bound=Piece)
Final = Callable[[nn.Parameter], None]


class Engine(Protocol):
    """Computes a step's gradients."""

    per_segment: bool
    """Whether pieces must hold one segment each (the loop), or may hold many (the single pass)."""

    def __call__(
        self,
        pieces: Sequence[P],
        losses: Callable[[P], Tensor],
        request: Request,
        final: Final | None = None,
    ) -> StepGradients:
        """Run forward and backward over the pieces.

        `losses(piece)` returns the piece's share of every segment's unweighted mean loss, [S]: shares
        add up over pieces, and a segment without labels has 0. `final` is called with a parameter of the
        body as soon as its `.grad` is complete, once at most; all are complete at the end.
        """
        ...


# --- gradients.products: Inner products of body-sized vectors.


RUN = 4096


def products(rows_mP: Tensor, others_kP: Tensor) -> Tensor:
    """<a_i, b_j>, [m, k], in the rows' type; summed in that type over runs of entries and in fp64 over the runs.

    One fp32 matrix product over 2e7 entries was seen to be off by 0.6 % on a CPU: too much for the rank, the
    eigenvalues and the inverse of a Gram matrix. In runs it is 2e-8, and no slower.
    """
    runs = rows_mP.shape[1] // RUN
    whole = runs * RUN
    left, right = (rows[:, :whole].reshape(len(rows), runs, RUN).transpose(0, 1) for rows in (rows_mP, others_kP))
    total_mk = torch.bmm(left, right.transpose(1, 2)).sum(0, dtype=torch.float64)
    return (total_mk + rows_mP[:, whole:] @ others_kP[:, whole:].t()).to(rows_mP.dtype)


def inner(a_P: Tensor, b_P: Tensor) -> Tensor:
    """<a, b> of two vectors, a scalar, as exact as `products`."""
    return products(a_P[None], b_P[None])[0, 0]


# --- gradients.memory: Whether the gradients that a step wants to keep apart fit into memory.


def check_memory(body: Sequence[nn.Parameter], segments: int, lower: str = "n or encoder.layers") -> None:
    """Refuse a step that would hold S gradients of P entries where S * P * itemsize exceeds the free memory.

    Raises:
        UserError: names the bytes needed and free, and what to lower.
    """
    dtype = torch.promote_types(body[0].dtype, torch.float32)
    entries = sum(parameter.numel() for parameter in body)
    needed = segments * entries * dtype.itemsize
    free = _free(body[0].device)
    if needed > free:
        raise UserError(
            f"{segments} gradients of {entries} parameters need {needed} bytes, {free} are free on "
            f"{body[0].device.type}: lower {lower}"
        )


def _free(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return int(psutil.virtual_memory().available)


# --- gradients.unsupported: What the single pass refuses.


class UnsupportedModule(UserError):
    """A module whose segment gradients cannot be told apart exactly; the message has its qualified name."""

    def __init__(self, name: str, kind: str, reason: str) -> None:
        super().__init__(f"module {name!r} ({kind}) {reason}; set gradients.engine: loop, or replace the module")


# --- gradients.matrix: A step's statistics where all inner products are known.


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


# --- gradients.scores: How far each segment's gradient agrees with the dev gradient.


def cosine(dots_S: Tensor, norms2_S: Tensor) -> Tensor:
    """cos(v, g_s) = <v, g_s> / (||v|| ||g_s||), [S]; 0 where a norm is 0. Segment 0 is v.

    The norms are multiplied as square roots, so that small and large ones neither vanish nor overflow.
    (semantics section 3)
    """
    norms_S = norms2_S.clamp_min(0).sqrt()
    product_S = norms_S[0] * norms_S
    defined_S = product_S > 0
    return torch.where(defined_S, dots_S / torch.where(defined_S, product_S, 1.0), 0.0).clamp(-1.0, 1.0)


# --- gradients.weighted: The plain pass: one backward of the weighted loss. What `finetune` and `static` need, and nothing more.


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
