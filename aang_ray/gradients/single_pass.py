"""The gradients of all segments for the price of their sum."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from aang_ray.gradients.engine import Final, P, Request, StepGradients
from aang_ray.gradients.ledger import Ledger
from aang_ray.gradients.memory import check_memory
from aang_ray.gradients.recorder import Parameters, Recorder, find_sites
from aang_ray.gradients.regions import Regions
from aang_ray.gradients.settle import settle_dense
from aang_ray.gradients.weighted import weighted_pass


class SegmentEngine:
    """One forward and one backward pass of the unweighted losses of all segments (semantics section 3).

    The gradient of a linear layer's weight is Gᵀ X, a sum over tokens, and segments are ranges of tokens:
    G_sᵀ X_s for every s costs the multiplications of the sum. Each is multiplied by c_s into the update,
    by v and by itself into the statistics, and dropped. Not weighting the losses keeps norms exact where
    a weight underflows. Heads get their weighted sum only. `tied_in_scores` counts the decoder's part of
    a tied table in scores and norms as well as in the update.

    Memory beyond a plain step: gradients of one matrix, for v, the joint gradient and the segment at hand; see
    `Ledger` for several pieces, the Gram matrix and separate gradients.

    Raises:
        UnsupportedModule: a module mixes rows, or otherwise has no exact segment gradients.
    """

    per_segment = False

    def __init__(self, body: nn.Module, heads: nn.Module, tied_in_scores: bool) -> None:
        self._body, self._heads, self._tied_in_scores = body, heads, tied_in_scores
        self._sites = find_sites(body, heads)

    def __call__(
        self,
        pieces: Sequence[P],
        losses: Callable[[P], Tensor],
        request: Request,
        final: Final | None = None,
    ) -> StepGradients:
        if not (request.scores or request.gram or request.separate):
            return weighted_pass(pieces, losses, request, self._body, final)
        parameters = Parameters.of(self._body, self._heads)
        cuts = [piece.tokens for piece in pieces]
        if request.separate or (request.gram and len(pieces) > 1):
            check_memory(parameters.body, len(request.coefficients_S))
        elif len(pieces) > 1:
            # v, a segment that goes on in the next piece, the joint gradient, and what is to be kept.
            check_memory(parameters.body, 3 + len(request.keep))
        ledger = Ledger(parameters.body, request, cuts)
        recorder = Recorder(self._sites, ledger, parameters, self._tied_in_scores)
        total_S = torch.zeros_like(ledger.coefficients_S)
        with recorder.hooked(self._body, self._heads):
            for number, piece in enumerate(pieces, start=1):
                recorder.begin(piece.tokens, final if number == len(pieces) else None)
                losses_S = losses(piece)
                if losses_S.requires_grad:
                    _backward(recorder, ledger, parameters, losses_S)
                ledger.end_piece()
                total_S += losses_S.detach()
        return ledger.result(total_S)


def _backward(recorder: Recorder, ledger: Ledger, parameters: Parameters, losses_S: Tensor) -> None:
    regions = Regions(recorder.calls, losses_S, parameters.all)
    recorder.backward(losses_S, regions.parameters, retain_graph=bool(regions.parameters))
    if not regions.parameters:
        return
    body = frozenset(parameters.body)
    of_body = [p for p in regions.parameters if p in body]
    of_heads = [p for p in regions.parameters if p not in body]
    with recorder.gradients_cut():
        if of_body:

            def gradients_of(segment: int) -> list[Tensor]:
                found = regions.segment(of_body, segment)
                return [
                    ledger.zeros(*p.shape) if g is None else g.to(ledger.dtype, copy=True).contiguous()
                    for p, g in zip(of_body, found, strict=True)
                ]

            settle_dense(ledger, of_body, gradients_of, recorder.take_deferred())
        if of_heads:
            for parameter, gradient in zip(of_heads, regions.weighted(of_heads, ledger.coefficients_S), strict=True):
                if gradient is not None:
                    ledger.update(parameter).add_(gradient)
