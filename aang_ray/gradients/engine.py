"""What every engine of gradients offers: one update and the statistics that a method asked for.

Let segment s of a step have the unweighted loss L_s and the body gradient g_s. Segment 0 may be the
dev batch, with v = g_0. An engine returns, for coefficients c, the update sum_s c_s g_s (added to
`.grad`; heads get the same weighted sum of their own gradients) and, where asked,
<v, g_s>, ||g_s||^2, the Gram matrix <g_s, g_t>, or the g_s themselves. (semantics sections 2.7 and 3)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from torch import Tensor, nn

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
