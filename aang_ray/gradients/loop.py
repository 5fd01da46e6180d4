"""The reference engine: one forward and one backward pass for every segment, with which tests compare the single pass.

Shape suffixes: S segments, P entries of the body's parameters, V entries of a table, U wanted rows of it, H width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from aang_ray.gradients.engine import JointRows, P, Request, StepGradients, check_memory, split_vector, weighted_pass
from aang_ray.gradients.products import inner, products
from aang_ray.model.heads import TiedDecoder
from aang_ray.model.segments import PassUpdate, pass_update


class LoopEngine:
    """Computes gradients segment by segment; pieces must hold one segment each. Arguments as `SegmentEngine`."""

    per_segment = True

    def __init__(self, body: nn.Module, heads: nn.Module, tied_in_scores: bool) -> None:
        self._body, self._heads, self._tied_in_scores = body, heads, tied_in_scores

    def __call__(self, pieces: Sequence[P], losses: Callable[[P], Tensor], request: Request) -> StepGradients:
        if not (request.scores or request.gram or request.separate):
            return weighted_pass(pieces, losses, request)
        body = [p for p in self._body.parameters() if p.requires_grad]
        segments, size = len(request.coefficients_S), sum(p.numel() for p in body)
        if request.gram or request.separate:
            check_memory(body, segments)
        wide = torch.promote_types(body[0].dtype, torch.float32)
        losses_S = torch.zeros(segments, dtype=wide, device=body[0].device)
        norms2_S, dots_S = torch.zeros_like(losses_S), torch.zeros_like(losses_S)
        rows: list[Tensor] = []
        kept: dict[int, Tensor] = {}
        v_P = request.reference_P
        joint_P = losses_S.new_zeros(size)
        for segment in range(segments):
            g_P = losses_S.new_zeros(size)
            for piece in _pieces_of(pieces, segment):
                losses_S[segment] += self._add(piece, losses, segment, request.coefficients_S[segment], body, g_P)
            v_P = g_P if v_P is None else v_P
            norms2_S[segment], dots_S[segment] = inner(g_P, g_P), inner(g_P, v_P)
            if request.joint_from is not None and segment >= request.joint_from:
                joint_P += request.coefficients_S[segment].to(g_P.dtype) * g_P
            if request.gram or request.separate:
                rows.append(g_P)
            if segment in request.keep:
                kept[segment] = g_P
        rows_SP = torch.stack(rows) if rows else None
        joint_norm2 = inner(joint_P, joint_P) if request.scores and request.joint_from is not None else None
        return StepGradients(
            losses_S=losses_S,
            dots_S=dots_S if request.scores else None,
            norms2_S=norms2_S if request.scores else None,
            joint_norm2=joint_norm2 if request.joint_rows is None else None,
            gram_SS=products(rows_SP, rows_SP) if request.gram and rows_SP is not None else None,
            separate_SP=rows_SP if request.separate else None,
            kept=kept,
            joint_rows_UH=None if request.joint_rows is None else _wanted_rows(request.joint_rows, body, joint_P),
        )

    def _add(
        self,
        piece: P,
        losses: Callable[[P], Tensor],
        segment: int,
        weight: Tensor,
        body: Sequence[nn.Parameter],
        g_P: Tensor,
    ) -> Tensor:
        """Add one piece's part of g_s to `g_P`, add c_s (`weight`) times that part to `.grad`, and return its loss."""
        heads = [p for p in self._heads.parameters() if p.requires_grad]
        with self._separate_decoders(body) as decoders:
            with pass_update(PassUpdate(torch.ones(piece.tokens.count, device=g_P.device))):  # the gradient of `loss`
                loss = losses(piece)[segment]
            if not loss.requires_grad:
                return loss
            decoder = list(decoders.values())
            found = torch.autograd.grad(loss, [*body, *heads, *decoder], allow_unused=True)
        parts = dict(zip(map(id, [*body, *heads, *decoder]), found, strict=True))
        for parameter, out in split_vector(g_P, body):
            gradient = parts[id(parameter)]
            of_decoder = parts[id(decoders[parameter])] if parameter in decoders else None
            if gradient is not None:
                out += gradient
            if of_decoder is not None and self._tied_in_scores:
                out += of_decoder
            _accumulate(parameter, gradient, weight)
            _accumulate(parameter, of_decoder, weight)
        for parameter in heads:
            _accumulate(parameter, parts[id(parameter)], weight)
        return loss.detach()

    @contextmanager
    def _separate_decoders(self, body: Sequence[nn.Parameter]) -> Iterator[dict[nn.Parameter, Tensor]]:
        """Replace tables of tied decoders by leaves, which get their gradients as decoders; yield these."""
        decoders = [m for m in self._heads.modules() if isinstance(m, TiedDecoder)]
        leaves = {p: p.detach().requires_grad_() for p in body if any(m.table.weight is p for m in decoders)}
        try:
            for table, leaf in leaves.items():
                for module in decoders:
                    if module.table.weight is table:
                        module.alias = leaf
            yield leaves
        finally:
            for module in decoders:
                module.alias = None


def _pieces_of(pieces: Sequence[P], segment: int) -> list[P]:
    """Return the pieces of one segment; they must hold no rows of another one."""

    def has(piece: P, segment: int) -> bool:
        part = piece.tokens.of(segment)
        return bool(part.stop > part.start)

    found = [piece for piece in pieces if has(piece, segment)]
    if any(has(piece, other) for piece in found for other in range(piece.tokens.count) if other != segment):
        raise ValueError("the loop takes pieces of one segment each")
    return found


def _accumulate(parameter: nn.Parameter, gradient: Tensor | None, weight: Tensor) -> None:
    if gradient is None:
        return
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    parameter.grad.addcmul_(gradient, weight.to(gradient.dtype))


def _wanted_rows(wanted: JointRows, body: Sequence[nn.Parameter], joint_P: Tensor) -> Tensor:
    """Return the requested rows of a table's part of the joint gradient, [U, H]."""
    table_VH = next(part for parameter, part in split_vector(joint_P, body) if parameter is wanted.table)
    rows_UH = table_VH.new_zeros(wanted.rows + 1, table_VH.shape[1])
    return rows_UH.index_add_(0, wanted.place_V, table_VH)[: wanted.rows]
