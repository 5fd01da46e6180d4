"""Sums up the gradients and statistics of a step whose examples are divided among the workers.

Worker r computes the part g_s^r of each segment's gradient, g_s = sum_r g_s^r. Sums are linear, so the workers send

- for the update: the body once, the used heads once;
- for <v, g_s> and the norm of g_s: scalars; if workers share s, also the body among them;
- for the dev gradient itself (`keep`), the mean of all v^r: the body once; for <u, g_s> with a given u: scalars;
- for the norm of the joint gradient d - c_1 g_1: a scalar of the worker that computes the end task;
- for separate gradients and the Gram matrix: the body for each segment.

With dropout every worker has its own dev gradient v^r, and <v, g_s> is sum_r <v^r, g_s^r> / ||v^r|| times the square
root of mean_r ||v^r||^2 (docs/objective-parallel.md).

Shape suffixes: S segments (0 dev, 1 end task, 2 ... the objectives), P entries of the body's gradient as one vector, V
rows of the tied table, U of them that this worker looks up, H hidden size, W workers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ParamSpec, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from aang_ray.errors import RunFailure
from aang_ray.gradients.engine import JointRows, Request, StepGradients, split_vector
from aang_ray.gradients.products import inner, products
from aang_ray.gradients.statistics import from_gram
from aang_ray.model.heads import TiedDecoder
from aang_ray.objectives.source import DEV, END_TASK, FIRST_OBJECTIVE
from aang_ray.train.device import is_out_of_memory
from aang_ray.train.domain import Domain
from aang_ray.train.workers.group import Pending, Workers, agreed
from aang_ray.train.workers.placement import EMPTY, Placement, Range, place

Entries = npt.NDArray[np.int64]
Compute = Callable[[Request], StepGradients]
"""An engine's pass over this worker's examples."""
Given = ParamSpec("Given")
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class RowPlan:
    """The rows of a tied table that this worker looks up in a step. They make the joint gradient's norm exact.

    The table's gradient in the update has a decoder's part, which does not count. So its rows from lookups are summed
    up separately: first those that several workers look up, in the same order on all of them, then this worker's own.
    """

    place_V: Entries
    """Index of every table row among the U looked-up rows, [V]; U for a row that this worker does not look up."""
    shared: int
    """Number of rows that several workers look up."""
    rows: int
    """Number U of rows that this worker needs: the shared rows and its own."""

    @classmethod
    def of(cls, entries: Sequence[Entries], rank: int, size: int) -> RowPlan:
        """Return the plan of worker `rank`, from the distinct rows that each worker looks up of a table of `size`."""
        users_V = np.bincount(np.concatenate(entries), minlength=size)
        shared = np.flatnonzero(users_V > 1)
        own = entries[rank][users_V[entries[rank]] == 1]
        rows = len(shared) + len(own)
        place_V = np.full(size, rows, dtype=np.int64)
        place_V[np.concatenate((shared, own))] = np.arange(rows)
        return cls(place_V, len(shared), rows)

    def wanted(self, table: nn.Parameter) -> JointRows:
        """Return the request for these rows of the joint gradient, with indices on the table's device."""
        place_V = torch.from_numpy(self.place_V)
        if table.is_cuda:
            place_V = place_V.pin_memory()
        return JointRows(table, place_V.to(table.device, non_blocking=True), self.rows)


@dataclass(frozen=True)
class Share:
    """The placement of a step's examples, which is the same on all workers, and this worker's part."""

    placement: Placement
    ranges: tuple[Range, ...]
    """This worker's examples [start, stop) of each segment, [S]."""
    rows: RowPlan | None
    """Rows of the tied table; None if they are not needed."""


def failing_for_all(compute: Callable[Given, Answer]) -> Callable[Given, Answer]:
    """Return `compute` with `RunFailure` if memory runs out, because one worker alone cannot repeat a step."""

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
    """Return the statistics of a worker without examples: zeros."""
    parameters = [p for p in body.parameters() if p.requires_grad]
    size, segments = sum(p.numel() for p in parameters), len(request.coefficients_S)
    dtype = torch.promote_types(parameters[0].dtype, torch.float32)
    zeros_S = torch.zeros(segments, dtype=dtype, device=parameters[0].device)
    rows = request.joint_rows
    return StepGradients(
        zeros_S,
        dots_S=zeros_S.clone(),
        norms2_S=zeros_S.clone(),
        separate_SP=zeros_S.new_zeros(segments, size) if request.separate else None,
        kept={segment: zeros_S.new_zeros(size) for segment in request.keep},
        joint_rows_UH=None if rows is None else zeros_S.new_zeros(rows.rows, rows.table.shape[1]),
    )


class Exchange:
    """Computes this worker's part of a step and adds the parts of the others. All workers must make the same calls."""

    def __init__(self, workers: Workers, body: nn.Module, heads: nn.Module, tied_in_scores: bool) -> None:
        self._workers = workers
        self._body = [p for p in body.parameters() if p.requires_grad]
        self._heads = [p for p in heads.parameters() if p.requires_grad]
        tied = {m.table.weight for m in heads.modules() if isinstance(m, TiedDecoder) and not tied_in_scores}
        self._table = next((parameter for parameter in self._body if parameter in tied), None)
        """The body's table that heads use as decoder, if only the part from lookups counts in scores; else None."""
        self.traffic: Counter[str] = Counter()
        """Bytes that this worker summed up with the others in the last step, by kind (docs/objective-parallel.md)."""

    def share(self, domain: Domain, batch: Any, whole: bool) -> Share:
        """Return the placement of a step's examples; `whole`: norms are requested, so segments should stay whole."""
        workers = self._workers
        placement = place([segment.lengths_E for segment in batch.segments], workers.size, whole)
        rows = None
        if self._table is not None and whole:
            objectives = [(EMPTY,) * FIRST_OBJECTIVE + ranges[FIRST_OBJECTIVE:] for ranges in placement.ranges]
            entries = [domain.entries_read(batch, ranges) for ranges in objectives]
            rows = RowPlan.of(entries, workers.rank, len(self._table))
        return Share(placement, placement.ranges[workers.rank], rows)

    def gradients(self, compute: Compute, request: Request, share: Share) -> StepGradients:
        """Return the statistics of the whole step and set `.grad` to its update. Both are the same on all workers.

        Raises:
            RunFailure, UserError: `compute` raises them on any worker.
            WorkerLost: Another worker fails or cannot be reached.
        """
        self.traffic = Counter()
        if request.gram or request.separate:
            return self._matrix(compute, request)
        if request.scores and set(request.keep) <= {DEV}:
            return self._scored(compute, request, share)
        local, body = self._computed(compute, request)
        losses_S = self._losses(local)
        for segment in request.keep:  # a body-sized vector is sent for each
            self._sum(local.kept[segment], "separate")
        body.wait()
        return StepGradients(losses_S, kept=local.kept)

    def _matrix(self, compute: Compute, request: Request) -> StepGradients:
        """Sum up separate gradients or a Gram matrix: S body-sized vectors, and the body only with a tied decoder."""
        all_rows = replace(request, separate=True, gram=False, scores=False, joint_from=None)
        local, body = self._computed(compute, all_rows, send_body=self._table is not None)
        rows_SP = local.separate_SP
        assert rows_SP is not None
        rows_SP[0] /= self._workers.size
        self._sum(rows_SP, "separate")
        losses_S = self._losses(local)
        body.wait()
        if self._table is None:
            for parameter, part in split_vector(request.coefficients_S.to(rows_SP.dtype) @ rows_SP, self._body):
                if parameter.grad is not None:
                    parameter.grad = part.to(parameter.dtype)
        return from_gram(losses_S, products(rows_SP, rows_SP), request, rows_SP)

    def _scored(self, compute: Compute, request: Request, share: Share) -> StepGradients:
        """Sum up inner products and norms. Workers that share a segment sum up its gradient among themselves.

        The dev gradient is kept on request; all workers compute all of it, so the sum is divided by their number.
        """
        split = share.placement.split()
        for ranks in split.values():
            self._workers.join(ranks)
        local, body = self._computed(compute, self._own_request(request, share, split))
        dots_S, norms2_S = local.dots_S, local.norms2_S
        assert dots_S is not None
        assert norms2_S is not None
        for segment, ranks in split.items():
            norms2_S[segment] = 0
            if self._workers.rank in ranks:
                g_P = local.kept[segment]
                self._workers.sum_(g_P, ranks)
                self.traffic["parts"] += g_P.nbytes
                if self._workers.rank == ranks[0]:  # one of them contributes the norm to the sum over all workers
                    norms2_S[segment] = inner(g_P, g_P)
        joint = norms2_S.new_zeros(1)
        if request.joint_from is not None:
            joint = self._joint_part(request, share, local, body).reshape(1)
        kept = {}
        for segment in request.keep:  # a body-sized vector is sent
            kept[segment] = local.kept[segment] / self._workers.size
            self._sum(kept[segment], "separate")
        body.wait()
        return replace(self._joined(request, local.losses_S, dots_S, norms2_S, joint), kept=kept)

    def _own_request(self, request: Request, share: Share, split: dict[int, tuple[int, ...]]) -> Request:
        """Return this worker's request, which also asks for the gradients that are needed to complete norms."""
        rank = self._workers.rank
        keep = {segment for segment, ranks in split.items() if rank in ranks} | set(request.keep)
        rows = None
        if request.joint_from is not None:
            if request.joint_from != FIRST_OBJECTIVE:
                raise ValueError("workers know the joint gradient of all objectives only")
            if rank in share.placement.members(END_TASK):
                keep.add(END_TASK)
            if self._table is not None:
                assert share.rows is not None
                rows = share.rows.wanted(self._table)
        joint_from = None if rows is None else FIRST_OBJECTIVE
        return replace(request, keep=tuple(sorted(keep)), joint_from=joint_from, joint_rows=rows)

    @torch.no_grad()
    def _joint_part(self, request: Request, share: Share, local: StepGradients, body: Pending) -> Tensor:
        """Return this worker's part of the joint gradient's squared norm. The norm is the sum over all workers."""
        shared, total = None, local.losses_S.new_zeros(())
        if local.joint_rows_UH is not None and share.rows is not None:
            shared = local.joint_rows_UH[: share.rows.shared].contiguous()
            self._sum(shared, "rows")
            total = total + local.joint_rows_UH[share.rows.shared :].square().sum()
        body.wait()
        if self._workers.rank != share.placement.members(END_TASK)[0]:
            return total
        if shared is not None:
            total = total + shared.square().sum()
        # ||d - c_1 g_1||^2 for the update d, without the tied table, whose rows are counted above.
        g_P = local.kept[END_TASK]
        weight = request.coefficients_S[END_TASK].to(g_P.dtype)
        for parameter, part in split_vector(g_P, self._body):
            if parameter.grad is not None and parameter is not self._table:
                rest = torch.addcmul(parameter.grad.to(g_P.dtype), part, weight, value=-1).reshape(-1)
                total = total + inner(rest, rest)
        return total

    def _joined(
        self, request: Request, losses_S: Tensor, dots_S: Tensor, norms2_S: Tensor, joint: Tensor
    ) -> StepGradients:
        """Sum up all scalars in one message, and return the statistics of the whole step."""
        norm = norms2_S[0].sqrt()
        # All workers have the same reference, but each has its own v.
        unit = torch.where(norm > 0, 1 / norm, 0.0) if request.reference_P is None else torch.ones_like(norm)
        count_S = self._computing(norms2_S)
        parts = [losses_S.to(norms2_S.dtype), dots_S * unit, norms2_S]
        packed = torch.cat([*(part / count_S for part in parts), joint.to(norms2_S.dtype)])
        self._sum(packed, "scalars")
        total_S, cosines_S, squares_S = packed[:-1].view(3, -1).clone().unbind()
        return StepGradients(
            losses_S=total_S.to(losses_S.dtype),
            dots_S=cosines_S * squares_S[0].sqrt() if request.reference_P is None else cosines_S,
            norms2_S=squares_S,
            joint_norm2=packed[-1] if request.joint_from is not None else None,
        )

    def _computed(self, compute: Compute, request: Request, send_body: bool = True) -> tuple[StepGradients, Pending]:
        """Compute this worker's part, sum up the heads' gradients, and begin to sum up those of the body.

        Afterwards a parameter has a gradient on all workers if it had one on any worker, and else on none.
        """
        parameters = [*self._body, *self._heads]
        with agreed(self._workers) as flags:
            try:
                local = compute(request)
            finally:  # a worker that failed must send as many flags as the others
                flags += [p.grad is not None for p in parameters]
        self.traffic["control"] += 8 * (self._workers.size + len(parameters))
        for parameter, used in zip(parameters, flags, strict=True):
            if used and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        body = self._begin_sum(self._body, "body") if send_body else Pending(None)
        self._begin_sum(self._heads, "heads").wait()
        return local, body

    @torch.no_grad()
    def _begin_sum(self, parameters: Sequence[nn.Parameter], kind: str) -> Pending:
        """Begin to sum up gradients in one message. Each `.grad` becomes a view of the message."""
        used = [p for p in parameters if p.grad is not None]
        if not used:
            return Pending(None)
        flat = torch.cat([p.grad.reshape(-1) for p in used if p.grad is not None])
        for parameter, part in split_vector(flat, used):
            parameter.grad = part
        self.traffic[kind] += flat.nbytes
        return self._workers.sum_later(flat)

    def _losses(self, local: StepGradients) -> Tensor:
        losses_S = local.losses_S / self._computing(local.losses_S)
        self._sum(losses_S, "scalars")
        return losses_S

    def _computing(self, like_S: Tensor) -> Tensor:
        """Return the number of workers that compute the same of each segment, [S]: W for dev (segment 0), else 1."""
        count_S = torch.ones_like(like_S)
        count_S[0] = self._workers.size
        return count_S

    def _sum(self, tensor: Tensor, kind: str) -> None:
        self._workers.sum_(tensor)
        self.traffic[kind] += tensor.nbytes
