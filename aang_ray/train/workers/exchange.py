"""One step's gradients, each worker computing those of its own examples.

Let worker r compute the parts g_s^r of segments' gradients, g_s = sum_r g_s^r. Sums are linear, so that

| wanted | of each worker | sent |
|---|---|---|
| update sum_s c_s g_s | sum_s c_s g_s^r | the body once, the used heads once |
| <v, g_s> | <v, g_s^r>, with a v of its own | a scalar |
| norm of g_s | norm, of whoever computes all of s | a scalar; the body among the workers that share s |
| norm of sum_{s > 1} c_s g_s | norm of the summed update less c_1 g_1, of whoever computes the end task | a scalar |
| separate gradients, Gram matrix | all g_s^r | the body for each segment, by the nature of what is asked |

and nothing else crosses the wire. The last norm is taken of what counts in scores: a tied table's lookups, without
its part as decoder (`rows.py`). With dropout every worker has a v^r of its own: <v, g_s> is then
sum_r <v^r, g_s^r> / ||v^r|| times the root of mean_r ||v^r||^2, so that cosines stay cosines. Without dropout all
v^r are one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ParamSpec, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from aang_ray.errors import RunFailure
from aang_ray.gradients.engine import JointRows, OnComplete, Request, StepGradients
from aang_ray.gradients.products import products
from aang_ray.gradients.statistics import from_gram
from aang_ray.model.heads import TiedDecoder
from aang_ray.objectives.source import END_TASK, FIRST_OBJECTIVE
from aang_ray.train.device import is_out_of_memory
from aang_ray.train.domain import Domain
from aang_ray.train.workers.group import Agreement, Pending, Traffic, Workers
from aang_ray.train.workers.placement import EMPTY, Placement, Range, place

# --- train.parallel.body_sum: The sum of the body's gradients over the workers, on its way while the backward pass goes on.


BUCKET_BYTES = 25 * 2**20
"""Large enough for the network's full rate, small enough to begin early; PyTorch's own choice for data parallelism."""

Bucket = tuple[nn.Parameter, ...]


def buckets_of(parameters: Iterable[nn.Parameter], limit: int = BUCKET_BYTES) -> tuple[Bucket, ...]:
    """Parameters in reverse order, the order in which a backward pass completes them, about `limit` bytes together."""
    buckets: list[Bucket] = []
    bucket: list[nn.Parameter] = []
    room = limit
    for parameter in reversed(list(parameters)):
        size = parameter.numel() * parameter.element_size()
        if bucket and size > room:
            buckets.append(tuple(bucket))
            bucket, room = [], limit
        bucket.append(parameter)
        room -= size
    return (*buckets, tuple(bucket)) if bucket else tuple(buckets)


class BodySum:
    """One step's sums, bucket by bucket, in the same order on every worker.

    A bucket leaves when all its parameters are complete and the one before it has left. `.grad` is then a view of
    the bucket's buffer; where a worker has no gradient, zeros are sent.
    """

    def __init__(self, buckets: Sequence[Bucket], workers: Workers) -> None:
        self.buckets, self._workers = buckets, workers
        self._bucket_of = {p: number for number, bucket in enumerate(buckets) for p in bucket}
        self._waits_for = [len(bucket) for bucket in buckets]
        self._sent: list[Pending] = []
        self.bytes = 0
        self.touched: dict[nn.Parameter, bool] = {}
        """Whether this worker has a gradient, of every parameter that was sent."""

    def complete(self, parameter: nn.Parameter) -> None:
        """A parameter's `.grad` will not change any more."""
        self._waits_for[self._bucket_of[parameter]] -= 1
        while len(self._sent) < len(self.buckets) and self._waits_for[len(self._sent)] == 0:
            self._send(self.buckets[len(self._sent)])

    def complete_all(self) -> None:
        """No parameter's `.grad` will change any more."""
        for bucket in self.buckets[len(self._sent) :]:
            self._send(bucket)

    def wait(self) -> None:
        """Let what follows wait for all sums."""
        for pending in self._sent:
            pending.wait()

    @torch.no_grad()
    def _send(self, bucket: Bucket) -> None:
        flat = flattened(bucket)
        self.touched.update({p: p.grad is not None for p in bucket})
        view_gradients(bucket, flat)
        self.bytes += flat.nbytes
        self._sent.append(self._workers.sum_later(flat))


def flattened(parameters: Sequence[nn.Parameter]) -> Tensor:
    """The gradients of parameters of one type end to end, zeros where there is none."""
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in parameters])


def view_gradients(parameters: Sequence[nn.Parameter], flat: Tensor) -> None:
    """Let `.grad` of parameters be views of a vector of all of them."""
    start = 0
    for parameter in parameters:
        parameter.grad = flat[start : start + parameter.numel()].view(parameter.shape)
        start += parameter.numel()


# --- train.parallel.rows: Which rows of a tied table each worker looks up in a step, so that the joint gradient's norm can be exact.
#
# The table's part of the update also holds what it did as decoder, which counts in no score. So the lookups' part of
# the joint gradient is summed up apart: only the rows that several workers look up have to be sent.


Entries = npt.NDArray[np.int64]


@dataclass(frozen=True)
class RowPlan:
    """Rows of one worker: first those that others look up, too, in the same order on all; then its own."""

    place_V: Entries
    shared: int
    rows: int

    @classmethod
    def of(cls, entries: Sequence[Entries], rank: int, size: int) -> RowPlan:
        """From the entries, each once, that the objectives of every worker look up in a table of so many rows."""
        users_V = np.bincount(np.concatenate(entries), minlength=size)
        shared = np.flatnonzero(users_V > 1)
        own = entries[rank][users_V[entries[rank]] == 1]
        rows = len(shared) + len(own)
        place_V = np.full(size, rows, dtype=np.int64)
        place_V[np.concatenate((shared, own))] = np.arange(rows)
        return cls(place_V, len(shared), rows)

    def wanted(self, table: nn.Parameter) -> JointRows:
        """For the engine."""
        place_V = torch.from_numpy(self.place_V)
        if table.is_cuda:
            place_V = place_V.pin_memory()
        return JointRows(table, place_V.to(table.device, non_blocking=True), self.rows)


# --- train.parallel.local: What one worker computes of a step, where it has no memory or nothing to compute.


Compute = Callable[[Request, OnComplete | None], StepGradients]
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


@dataclass(frozen=True)
class Share:
    """Who computes what of a step, as all workers know it."""

    placement: Placement
    ranges: tuple[Range, ...]
    """This worker's examples of each segment."""
    rows: RowPlan | None


class Exchange:
    """Runs a worker's part of a step and completes it with the others'; made by all workers alike."""

    def __init__(self, workers: Workers, body: nn.Module, heads: nn.Module, tied_in_scores: bool) -> None:
        self._workers = workers
        self._body = [p for p in body.parameters() if p.requires_grad]
        self._heads = [p for p in heads.parameters() if p.requires_grad]
        self._buckets = buckets_of(self._body)
        self._table = None if tied_in_scores else _tied_table(self._body, heads)
        """Whose gradient is more than what counts in scores."""
        self.traffic = Traffic()
        """Of the last step."""

    def share(self, domain: Domain, batch: Any, whole: bool) -> Share:
        """Place a step's examples; `whole` segments where norms will be asked for. Safe on another thread."""
        workers = self._workers
        placement = place(domain.costs(batch), workers.size, whole)
        rows = None
        if self._table is not None and whole:
            objectives = [(EMPTY,) * FIRST_OBJECTIVE + ranges[FIRST_OBJECTIVE:] for ranges in placement.ranges]
            entries = [domain.entries_read(batch, ranges) for ranges in objectives]
            rows = RowPlan.of(entries, workers.rank, len(self._table))
        return Share(placement, placement.ranges[workers.rank], rows)

    def gradients(self, compute: Compute, request: Request, share: Share) -> StepGradients:
        """The whole step's gradients in `.grad`, and its statistics, alike on every worker.

        Raises:
            RunFailure, UserError: those that `compute` raises on any worker.
            WorkerLost: if another worker fails or cannot be reached.
        """
        self.traffic = Traffic()
        if request.gram or request.separate:
            return self._matrix(compute, request)
        if request.keep:
            return self._kept(compute, request)
        if request.scores:
            return self._scored(compute, request, share)
        return self._weighted(compute, request)

    def _weighted(self, compute: Compute, request: Request) -> StepGradients:
        body = BodySum(self._buckets, self._workers)
        local = self._agreed(compute, request, body)
        losses_S = local.losses_S / self._computed(local.losses_S)
        self._sum(losses_S, "scalars")
        body.wait()
        return StepGradients(losses_S)

    def _kept(self, compute: Compute, request: Request) -> StepGradients:
        """The update, and some segments' gradients: a body-sized vector is sent for each. Scores are not known."""
        body = BodySum(self._buckets, self._workers)
        local = self._agreed(compute, request, body)
        losses_S = local.losses_S / self._computed(local.losses_S)
        self._sum(losses_S, "scalars")
        for segment in request.keep:
            self._sum(local.kept[segment], "separate")
        body.wait()
        return StepGradients(losses_S, kept=local.kept)

    def _scored(self, compute: Compute, request: Request, share: Share) -> StepGradients:
        split = share.placement.split()
        for ranks in split.values():
            self._workers.join(ranks)
        body = BodySum(self._buckets, self._workers)
        local = self._agreed(compute, self._own(request, share, split), body)
        dots_S, norms2_S = local.dots_S, local.norms2_S
        assert dots_S is not None
        assert norms2_S is not None
        self._complete_norms(norms2_S, local, split)
        joint = norms2_S.new_zeros(1)
        if request.joint_from is not None:
            joint = self._joint(request, share, local, body).reshape(1)
        body.wait()
        return self._joined(request, local.losses_S, dots_S, norms2_S, joint)

    def _own(self, request: Request, share: Share, split: dict[int, tuple[int, ...]]) -> Request:
        """What this worker asks of its own examples."""
        rank = self._workers.rank
        keep = {segment for segment, ranks in split.items() if rank in ranks}
        joint = request.joint_from is not None
        if joint and request.joint_from != FIRST_OBJECTIVE:
            raise ValueError("workers know the joint gradient of all objectives only")
        if joint and rank in share.placement.members(END_TASK):
            keep.add(END_TASK)
        rows = None
        if joint and self._table is not None:
            assert share.rows is not None
            rows = share.rows.wanted(self._table)
        return replace(
            request, keep=tuple(sorted(keep)), joint_from=FIRST_OBJECTIVE if rows is not None else None, joint_rows=rows
        )

    def _complete_norms(self, norms2_S: Tensor, local: StepGradients, split: dict[int, tuple[int, ...]]) -> None:
        """Sum up shared segments among their workers, the first of which states the norm."""
        for segment, ranks in split.items():
            norms2_S[segment] = 0
            if self._workers.rank in ranks:
                g_P = local.kept[segment]
                self._workers.sum_(g_P, ranks)
                self.traffic.parts += g_P.nbytes
                if self._workers.rank == ranks[0]:
                    norms2_S[segment] = _norm2(g_P)

    @torch.no_grad()
    def _joint(self, request: Request, share: Share, local: StepGradients, body: BodySum) -> Tensor:
        """This worker's part of the joint gradient's squared norm."""
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
        return total + self._norm2_without(local.kept[END_TASK], request.coefficients_S[END_TASK])

    def _norm2_without(self, g_P: Tensor, weight: Tensor) -> Tensor:
        """||d - c g||^2 of the update d, but for a table whose part as decoder is no part of g."""
        total, start = g_P.new_zeros(()), 0
        for parameter in self._body:
            part_P = g_P[start : start + parameter.numel()]
            start += parameter.numel()
            if parameter.grad is not None and parameter is not self._table:
                rest_P = torch.addcmul(parameter.grad.view(-1).to(g_P.dtype), part_P, weight.to(g_P.dtype), value=-1)
                total = total + _norm2(rest_P)
        return total

    def _joined(
        self, request: Request, losses_S: Tensor, dots_S: Tensor, norms2_S: Tensor, joint: Tensor
    ) -> StepGradients:
        """All scalars in one message."""
        norm = norms2_S[0].sqrt()
        unit = torch.where(norm > 0, 1 / norm, 0.0)
        parts = [losses_S.to(norms2_S.dtype), dots_S * unit, norms2_S]
        count_S = self._computed(norms2_S)
        packed = torch.cat([*(part / count_S for part in parts), joint.to(norms2_S.dtype)])
        self._sum(packed, "scalars")
        total_S, cosines_S, squares_S = packed[:-1].view(3, -1).clone().unbind()
        return StepGradients(
            losses_S=total_S.to(losses_S.dtype),
            dots_S=cosines_S * squares_S[0].sqrt(),
            norms2_S=squares_S,
            joint_norm2=packed[-1] if request.joint_from is not None else None,
        )

    def _matrix(self, compute: Compute, request: Request) -> StepGradients:
        """S body-sized vectors are sent: inner products of gradients on different workers need them.

        The update is a sum of them, so that nothing else is sent, unless a tied decoder's part is missing there.
        """
        body = BodySum(self._buckets if self._table is not None else (), self._workers)
        local = self._agreed(compute, replace(request, separate=True, gram=False, scores=False, joint_from=None), body)
        rows_SP = local.separate_SP
        assert rows_SP is not None
        rows_SP[0] /= self._workers.size
        self._sum(rows_SP, "separate")
        losses_S = local.losses_S / self._computed(local.losses_S)
        self._sum(losses_S, "scalars")
        body.wait()
        if self._table is None:
            self._set_body(request.coefficients_S.to(rows_SP.dtype) @ rows_SP)
        return from_gram(losses_S, products(rows_SP, rows_SP), request, rows_SP)

    def _set_body(self, update_P: Tensor) -> None:
        start = 0
        for parameter in self._body:
            if parameter.grad is not None:
                part_P = update_P[start : start + parameter.numel()]
                parameter.grad = part_P.view(parameter.shape).to(parameter.dtype)
            start += parameter.numel()

    def _agreed(self, compute: Compute, request: Request, body: BodySum) -> StepGradients:
        """Compute, send the body's and the heads' gradients; an error on any worker ends the step on all.

        A parameter without a gradient on any worker has none afterwards, as without workers; one with a gradient
        somewhere has one everywhere.
        """
        parameters = [*self._body, *self._heads]
        with Agreement(self._workers) as agreement:
            try:
                local = compute(request, body.complete if body.buckets else None)
            finally:  # what the others began to sum up must end, and the flags are as many on all
                body.complete_all()
                agreement.flags = [body.touched.get(p, p.grad is not None) for p in parameters]
        for parameter, touched in zip(parameters, agreement.flags, strict=True):
            if not touched:
                parameter.grad = None
            elif parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self.traffic.body += body.bytes
        self.traffic.control += 8 * (self._workers.size + len(parameters))
        self._sum_heads()
        return local

    @torch.no_grad()
    def _sum_heads(self) -> None:
        """The used heads' gradients in one message."""
        used = [p for p in self._heads if p.grad is not None]
        if used:
            flat = flattened(used)
            self._sum(flat, "heads")
            view_gradients(used, flat)

    def _computed(self, like_S: Tensor) -> Tensor:
        """How many workers computed each segment wholly: all of them the dev batch, [S]."""
        count_S = torch.ones_like(like_S)
        count_S[0] = self._workers.size
        return count_S

    def _sum(self, tensor: Tensor, kind: str) -> None:
        self._workers.sum_(tensor)
        setattr(self.traffic, kind, getattr(self.traffic, kind) + tensor.nbytes)


def _tied_table(body: Sequence[nn.Parameter], heads: nn.Module) -> nn.Parameter | None:
    """The body's table that heads use as decoder."""
    tied = [module.table.weight for module in heads.modules() if isinstance(module, TiedDecoder)]
    return next((parameter for parameter in body if any(parameter is table for table in tied)), None)


def _norm2(vector_P: Tensor) -> Tensor:
    return products(vector_P[None], vector_P[None])[0, 0]
