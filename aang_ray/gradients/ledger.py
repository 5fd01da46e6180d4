"""Adds up segment gradients into the update, and into inner products and norms.

These are sums over *blocks*, runs of entries of one parameter. So a segment's gradient of a block is needed only for
three additions, and is then dropped:

    update += c_s g_s,      dots_s += <g_0, g_s>,      norms2_s += <g_s, g_s>

If the step has several pieces, the norm of a sum over pieces is needed. So v = g_0 and segments that continue in a
later piece are *buffered*, summed in a body-sized vector until their last piece. Segments of `Request.keep` and the
joint gradient also take one vector each, and the Gram matrix and `Request.separate` all S of them.

Shape suffixes: S segments, P entries of the body (flattened in `named_parameters` order), B entries of a block, N rows
(tokens or lookups), U requested rows of a table, V entries of a table, H its width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from aang_ray.gradients.engine import Request, StepGradients
from aang_ray.gradients.products import PaddedCopies, inner, products
from aang_ray.gradients.statistics import from_gram
from aang_ray.model.segments import SegmentRows


@dataclass
class Block:
    """A run of entries of one parameter, flattened, and the tensors and lists to which its gradients are added."""

    update: Tensor
    targets: Sequence[Tensor]
    """The tensor of each segment to which c_s times its gradient is added: the update or the joint gradient."""
    coefficients: Sequence[Tensor]
    buffers: Mapping[int, Tensor]
    """For each buffered segment, the tensor in which its gradient is summed."""
    kept: Mapping[int, Tensor]
    """For each segment of `Request.keep` that is not buffered, the tensor of its gradient."""
    v_B: Tensor | None
    """The reference or the dev gradient; None until segment 0 is added."""
    norms: list[list[Tensor]]
    dots: list[list[Tensor]]
    joint: tuple[Tensor, list[Tensor]] | None
    """The block's joint gradient and the list of squared norms, if the joint norm is computed block by block."""

    def add(self, segment: int, gradient_B: Tensor) -> None:
        """Add one segment's gradient; segment 0 comes first."""
        target = self.targets[segment]
        target.addcmul_(gradient_B.to(target.dtype), self.coefficients[segment])
        if segment in self.kept:
            self.kept[segment].add_(gradient_B)
        buffer = self.buffers.get(segment)
        if buffer is not None:
            buffer += gradient_B
            return
        if segment == 0 and self.v_B is None:
            self.v_B = gradient_B.clone()
        self.norms[segment].append(torch.dot(gradient_B, gradient_B))
        if self.v_B is not None:
            self.dots[segment].append(torch.dot(gradient_B, self.v_B))

    def finish(self) -> None:
        """Add the joint gradient to the update, and its norm to the list, after all segments."""
        if self.joint is not None:
            joint, norms = self.joint
            norms.append(torch.dot(joint, joint))
            self.update.add_(joint)


def first_and_last_pieces(cuts: Sequence[SegmentRows]) -> list[tuple[int, int]]:
    """Return for each segment the first and the last piece with rows of it; (0, -1) for a segment without rows."""
    holders = [[i for i, cut in enumerate(cuts) if cut.of(s).stop > cut.of(s).start] for s in range(cuts[0].count)]
    result = [(pieces[0], pieces[-1]) if pieces else (0, -1) for pieces in holders]
    if any(pieces and pieces[0] < result[0][1] for pieces in holders[1:]):
        raise ValueError("pieces must hold the whole of segment 0, the dev batch, before any other segment")
    return result


class Ledger:
    """Adds up one step's update and statistics; `cuts` holds the segments of each piece's rows."""

    def __init__(self, parameters: Sequence[nn.Parameter], request: Request, cuts: Sequence[SegmentRows]) -> None:
        first = parameters[0]
        self.segments = cuts[0].count
        self.device = first.device
        self.dtype = torch.promote_types(first.dtype, torch.float32)
        self.coefficients_S = request.coefficients_S.to(self.dtype)
        self.copies = PaddedCopies()
        self._coefficients = self.coefficients_S.to(first.dtype).unbind()
        self._parameters, self._request = parameters, request
        self._offsets: dict[int, int] = {}
        self._size = 0
        for parameter in parameters:
            self._offsets[id(parameter)] = self._size
            self._size += parameter.numel()
        self._piece, self._pieces_of = 0, first_and_last_pieces(cuts)
        self._norms: list[list[Tensor]] = [[] for _ in range(self.segments)]
        self._dots: list[list[Tensor]] = [[] for _ in range(self.segments)]
        self._buffers: dict[int, Tensor] = {}
        self._kept: dict[int, Tensor] = {}
        self._members: tuple[SegmentRows, Tensor] | None = None
        several, matrix = len(cuts) > 1, request.gram or request.separate
        self._buffering = several and not matrix
        self.rows_SP = self.zeros(self.segments, self._size) if request.separate or (matrix and several) else None
        self.gram_SS = self.zeros(self.segments, self.segments) if matrix and self.rows_SP is None else None
        # The joint gradient's norm is computed block by block or, with several pieces, from the whole vector.
        rows = request.joint_rows
        joint = request.joint_from is not None and request.scores and not matrix and rows is None
        self._joint_P = self.zeros(self._size) if joint and several else None
        self._joint_norms: list[Tensor] | None = [] if joint and not several else None
        numbers_S = torch.arange(self.segments, device=self.device)
        first_joint = self.segments if request.joint_from is None else request.joint_from
        self._joint_S = self.coefficients_S.masked_fill(numbers_S < first_joint, 0.0)
        # There is one extra row, to which all rows are added that are not requested.
        self._joint_rows_UH = self.zeros(0, 0) if rows is None else self.zeros(rows.rows + 1, rows.table.shape[1])

    def zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=self.dtype, device=self.device)

    def members(self, rows: SegmentRows, like: Tensor) -> Tensor:
        """Return a matrix [S, N], in the type of `like`, that is 1 where row n belongs to segment s and 0 elsewhere."""
        if self._members is None or self._members[0] is not rows or self._members[1].dtype != like.dtype:
            members_SN = like.new_zeros(rows.count, rows.rows)
            for segment in range(rows.count):
                members_SN[segment, rows.of(segment)] = 1
            self._members = (rows, members_SN)
        return self._members[1]

    @property
    def takes_stacked(self) -> bool:
        """Whether a parameter's gradients are added for all segments at once, [S, B], and not segment by segment.

        The Gram matrix needs that, and a GPU is faster with few large operations; a CPU with what fits into its cache.
        """
        return not self._buffering and (self._request.gram or self._request.separate or self.device.type != "cpu")

    def present(self) -> list[int]:
        """Return the segments for which the current piece is between their first and last pieces with rows."""
        return [s for s, (first, last) in enumerate(self._pieces_of) if first <= self._piece <= last]

    def update(self, parameter: nn.Parameter) -> Tensor:
        """Return the parameter's `.grad`, which is created if there is none."""
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter, memory_format=torch.contiguous_format)
        return parameter.grad

    def part_of(self, vector_P: Tensor, parameter: nn.Parameter) -> Tensor:
        """Return the parameter's part of a body-sized vector, in the parameter's shape."""
        start = self._offsets[id(parameter)]
        return vector_P[start : start + parameter.numel()].view(parameter.shape)

    def targets(self, parameter: nn.Parameter) -> list[tuple[Tensor, Tensor]]:
        """Return pairs of coefficients, [S], and the tensor to which a parameter's gradients with these are added."""
        if self._joint_P is None:
            return [(self.coefficients_S, self.update(parameter))]
        joint = self.part_of(self._joint_P, parameter)
        return [(self.coefficients_S - self._joint_S, self.update(parameter)), (self._joint_S, joint)]

    def _is_buffered(self, segment: int) -> bool:
        first, last = self._pieces_of[segment]
        return self._buffering and (segment == 0 or first < last or segment in self._request.keep)

    def buffer(self, parameter: nn.Parameter, segment: int) -> Tensor | None:
        """Return the tensor in which a segment's gradient of the parameter is summed; None if it is not buffered."""
        return self._vector(self._buffers, parameter, segment) if self._is_buffered(segment) else None

    def reference(self, parameter: nn.Parameter) -> Tensor | None:
        """Return the parameter's part of the vector u of `Request.reference_P`, else of the buffer of segment 0."""
        whole_P = self._request.reference_P
        return self.buffer(parameter, 0) if whole_P is None else self.part_of(whole_P, parameter)

    def kept(self, parameter: nn.Parameter, segment: int) -> Tensor | None:
        """Return the tensor for the gradient of a segment of `Request.keep`; None for others, and if it is buffered."""
        if segment not in self._request.keep or self._is_buffered(segment):
            return None
        return self._vector(self._kept, parameter, segment)

    def _vector(self, vectors: dict[int, Tensor], parameter: nn.Parameter, segment: int) -> Tensor:
        if segment not in vectors:
            vectors[segment] = self.zeros(self._size)
        return self.part_of(vectors[segment], parameter)

    def block(self, parameter: nn.Parameter, start: int, stop: int) -> Block:
        """Return the block of entries [start, stop) of a parameter, to which segments can be added one by one."""

        def part(whole: Tensor) -> Tensor:
            return whole.view(-1)[start:stop]

        update, first, norms = part(self.update(parameter)), self._request.joint_from, self._joint_norms
        joint = update if self._joint_P is None else part(self.part_of(self._joint_P, parameter))
        if norms is not None:
            joint = self.zeros(stop - start)
        buffers = {s: part(found) for s in self.present() if (found := self.buffer(parameter, s)) is not None}
        kept = {s: part(found) for s in self.present() if (found := self.kept(parameter, s)) is not None}
        v = self.reference(parameter)
        return Block(
            update,
            [update if first is None or s < first else joint for s in range(self.segments)],
            self._coefficients,
            buffers,
            kept,
            None if v is None else part(v),
            self._norms,
            self._dots,
            None if norms is None else (joint, norms),
        )

    def add_stacked(self, parameter: nn.Parameter, gradients_SB: Tensor) -> None:
        """Add all segments' gradients of a parameter; the block is the whole parameter."""
        if self._buffering:
            block = self.block(parameter, 0, parameter.numel())
            for segment in self.present():
                block.add(segment, gradients_SB[segment])
            block.finish()
            return
        for coefficients_S, target in self.targets(parameter):
            target.view(-1).add_((coefficients_S @ gradients_SB).to(target.dtype))
        for segment in self._request.keep:
            kept = self.kept(parameter, segment)
            if kept is not None:
                kept.view(-1).add_(gradients_SB[segment])
        if self.rows_SP is not None:
            offset = self._offsets[id(parameter)]
            self.rows_SP[:, offset : offset + gradients_SB.shape[1]].add_(gradients_SB)
        elif self.gram_SS is not None:
            self.gram_SS.addmm_(gradients_SB, gradients_SB.t())
        else:
            v = self.reference(parameter)
            self.add_scores(gradients_SB.square().sum(1), gradients_SB @ (gradients_SB[0] if v is None else v.view(-1)))
            self.add_joint_score(lambda joint_S: (joint_S @ gradients_SB).square().sum())

    def add_scores(self, norms2_S: Tensor, dots_S: Tensor) -> None:
        """Add squared norms and inner products with v of a part of the body, except for buffered segments."""
        for segment in range(self.segments):
            if not self._is_buffered(segment):
                self._norms[segment].append(norms2_S[segment])
                self._dots[segment].append(dots_S[segment])

    def add_joint_score(self, norm2_of: Callable[[Tensor], Tensor]) -> None:
        """Add the joint gradient's squared norm in a part of the body; `norm2_of` returns it for coefficients [S]."""
        if self._joint_norms is not None:
            self._joint_norms.append(norm2_of(self._joint_S))

    def add_joint_lookups(self, parameter: nn.Parameter, ids_N: Tensor, rows_of: Callable[[Tensor], Tensor]) -> None:
        """Add lookups to the requested rows of a table's joint gradient; `rows_of` weights them by coefficients [S]."""
        if (wanted := self._request.joint_rows) is not None and parameter is wanted.table:
            self._joint_rows_UH.index_add_(0, wanted.place_V[ids_N], rows_of(self._joint_S))

    def add_joint_table(self, parameter: nn.Parameter, segment: int, gradient_VH: Tensor) -> None:
        """Add one segment's dense gradient of a table to the requested rows of the table's joint gradient."""
        if (wanted := self._request.joint_rows) is not None and parameter is wanted.table:
            self._joint_rows_UH.index_add_(0, wanted.place_V, self._joint_S[segment] * gradient_VH)

    def end_piece(self) -> None:
        """Compute norms and inner products of completed buffered segments, and drop their buffers (except v)."""
        for segment in sorted(self._buffers):
            if self._pieces_of[segment][1] == self._piece:
                vector_P = self._buffers[segment]
                self._norms[segment].append(inner(vector_P, vector_P))
                v_P = self._buffers.get(0) if self._request.reference_P is None else self._request.reference_P
                if v_P is not None:
                    self._dots[segment].append(inner(vector_P, v_P))
                if segment in self._request.keep:
                    self._kept[segment] = vector_P
                if segment != 0:
                    del self._buffers[segment]
        self._piece += 1

    def result(self, losses_S: Tensor) -> StepGradients:
        """Return the requested statistics after the last piece; `losses_S` are summed over pieces."""
        request, rows_SP = self._request, self.rows_SP
        if rows_SP is not None and not (request.gram or request.scores):
            return StepGradients(losses_S=losses_S, separate_SP=rows_SP if request.separate else None)
        gram_SS = self.gram_SS if rows_SP is None else products(rows_SP, rows_SP)
        if gram_SS is not None:
            return from_gram(losses_S, gram_SS, request, rows_SP)
        joint_norm2 = self._finish_joint()
        return StepGradients(
            losses_S=losses_S,
            dots_S=self._summed(self._dots),
            norms2_S=self._summed(self._norms),
            joint_norm2=joint_norm2,
            kept={s: self._kept[s] if s in self._kept else self.zeros(self._size) for s in request.keep},
            joint_rows_UH=None if request.joint_rows is None else self._joint_rows_UH[:-1],
        )

    def _finish_joint(self) -> Tensor | None:
        """Return the joint gradient's squared norm, and add the joint gradient to the update if it is separate."""
        if self._joint_norms is not None:
            return torch.stack([self.zeros(), *self._joint_norms]).sum()
        if self._joint_P is None:
            return None
        for parameter in self._parameters:
            self.update(parameter).add_(self.part_of(self._joint_P, parameter))
        return inner(self._joint_P, self._joint_P)

    def _summed(self, terms: list[list[Tensor]]) -> Tensor:
        return torch.stack([torch.stack(values).sum() if values else self.zeros() for values in terms])
