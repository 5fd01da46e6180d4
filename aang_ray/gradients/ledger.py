"""Where segment gradients go: into the update and into the statistics, and then nowhere.

Shape suffixes: S segments, P entries of the body (flattened in `named_parameters` order), N lookups, U wanted rows
of a table, V its entries, H its width, B entries of a block of one parameter.
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

# --- gradients.block: A run of entries of one parameter: it takes one segment's gradient after the other.
#
# Shape suffix: B entries.


@dataclass
class Block:
    """A run of entries of one parameter, flattened, and where its numbers go."""

    update: Tensor
    targets: Sequence[Tensor]
    """For each segment, what takes c_s times its gradient."""
    coefficients: Sequence[Tensor]
    held: Mapping[int, Tensor]
    """Where the gradients of segments go that are not complete yet."""
    kept: Mapping[int, Tensor]
    """Where the gradients of complete segments go that are asked for themselves."""
    v_B: Tensor | None
    """The dev gradient; None until segment 0 is added."""
    norms: list[list[Tensor]]
    dots: list[list[Tensor]]
    joint: tuple[Tensor, list[Tensor]] | None
    """Where the joint gradient is summed up for its own norm before it joins the update, and the norms."""

    def add(self, segment: int, gradient_B: Tensor) -> None:
        """One segment's gradient; segment 0 comes before the others."""
        target = self.targets[segment]
        target.addcmul_(gradient_B.to(target.dtype), self.coefficients[segment])
        if segment in self.kept:
            self.kept[segment].add_(gradient_B)
        held = self.held.get(segment)
        if held is not None:
            held += gradient_B
            return
        if segment == 0:
            self.v_B = gradient_B.clone()
        self.norms[segment].append(torch.dot(gradient_B, gradient_B))
        if self.v_B is not None:
            self.dots[segment].append(torch.dot(gradient_B, self.v_B))

    def finish(self) -> None:
        """All segments are added."""
        if self.joint is not None:
            joint, norms = self.joint
            norms.append(torch.dot(joint, joint))
            self.update.add_(joint)


def spans(cuts: Sequence[SegmentRows]) -> list[tuple[int, int]]:
    """First and last piece that has rows of each segment; (0, -1) for a segment without any.

    Raises:
        ValueError: pieces do not come with the dev batch, segment 0, first.
    """
    holders = [[i for i, cut in enumerate(cuts) if cut.of(s).stop > cut.of(s).start] for s in range(cuts[0].count)]
    result = [(pieces[0], pieces[-1]) if pieces else (0, -1) for pieces in holders]
    if any(pieces and pieces[0] < result[0][1] for pieces in holders[1:]):
        raise ValueError("pieces must hold the whole of segment 0, the dev batch, before any other segment")
    return result


class Ledger:
    """Accumulates sum_s c_s g_s, <v, g_s> and ||g_s||^2 (semantics section 3) block by block.

    Statistics are kept in fp32, in fp64 for fp64 parameters. Norms and products are those of a segment's
    gradient summed over the pieces, not sums of the pieces' own. So with several pieces v is held, and so
    is a segment that more than one piece holds: one body-sized vector for v and one for each segment that is
    open at a time, and one for each of `keep`. The Gram matrix over several pieces, and `separate`, hold all S
    vectors. `joint_from` holds the joint gradient over several pieces.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], request: Request, cuts: Sequence[SegmentRows]) -> None:
        first = parameters[0]
        self.segments = cuts[0].count
        self.device = first.device
        self.dtype = torch.promote_types(first.dtype, torch.float32)
        self.coefficients_S = request.coefficients_S.to(self.dtype)
        self._coefficients = self.coefficients_S.to(first.dtype).unbind()
        self._offsets: dict[int, int] = {}
        self._size = 0
        for parameter in parameters:
            self._offsets[id(parameter)] = self._size
            self._size += parameter.numel()
        self._request = request
        self._spans = spans(cuts)
        self._piece = 0
        self._norms: list[list[Tensor]] = [[] for _ in range(self.segments)]
        self._dots: list[list[Tensor]] = [[] for _ in range(self.segments)]
        self._held: dict[int, Tensor] = {}
        self._kept: dict[int, Tensor] = {}
        several, matrix = len(cuts) > 1, request.gram or request.separate
        self.rows_SP = self.zeros(self.segments, self._size) if request.separate or (matrix and several) else None
        self.gram_SS = self.zeros(self.segments, self.segments) if matrix and self.rows_SP is None else None
        self._hold = several and not matrix
        rows = request.joint_rows
        joint = request.joint_from is not None and request.scores and not matrix and rows is None
        self._joint_P = self.zeros(self._size) if joint and several else None
        self._joint_norms: list[Tensor] | None = [] if joint and not several else None
        numbers_S = torch.arange(self.segments, device=self.device)
        first_joint = self.segments if request.joint_from is None else request.joint_from
        self._joint_S = self.coefficients_S.masked_fill(numbers_S < first_joint, 0.0)
        # One row more, for those that are not wanted.
        self._joint_rows_UH = None if rows is None else self.zeros(rows.rows + 1, rows.table.shape[1])
        self._parameters = parameters
        self.padded = PaddedCopies()
        self._members: tuple[SegmentRows, Tensor] | None = None

    def zeros(self, *shape: int) -> Tensor:
        """Zeros in the statistics' type."""
        return torch.zeros(shape, dtype=self.dtype, device=self.device)

    def members(self, rows: SegmentRows, like: Tensor) -> Tensor:
        """Which rows are whose: [S, N], 1 where segment s owns row n, in the type of a tensor of rows."""
        if self._members is None or self._members[0] is not rows or self._members[1].dtype != like.dtype:
            members_SN = like.new_zeros(rows.count, rows.rows)
            for segment in range(rows.count):
                members_SN[segment, rows.of(segment)] = 1
            self._members = (rows, members_SN)
        return self._members[1]

    @property
    def by_columns(self) -> bool:
        """Whether all segments' gradients of a block are wanted at once.

        The Gram matrix needs them so, and a GPU prefers few large operations; a CPU works on one segment at
        a time, which stays in its cache.
        """
        return not self._hold and (self._request.gram or self._request.separate or self.device.type != "cpu")

    def present(self) -> list[int]:
        """Segments of which the piece at hand has rows."""
        return [s for s, (first, last) in enumerate(self._spans) if first <= self._piece <= last]

    def update(self, parameter: nn.Parameter) -> Tensor:
        """The parameter's `.grad`, made where there is none."""
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter, memory_format=torch.contiguous_format)
        return parameter.grad

    def _joint(self, parameter: nn.Parameter) -> Tensor | None:
        """The parameter's part of the joint gradient, in its shape, where its norm is wanted."""
        if self._joint_P is None:
            return None
        start = self._offsets[id(parameter)]
        return self._joint_P[start : start + parameter.numel()].view(parameter.shape)

    def targets(self, parameter: nn.Parameter) -> list[tuple[Tensor, Tensor]]:
        """Where the weighted segments of a parameter go: coefficients [S], and the tensor that takes their sum."""
        joint = self._joint(parameter)
        if joint is None:
            return [(self.coefficients_S, self.update(parameter))]
        return [(self.coefficients_S - self._joint_S, self.update(parameter)), (self._joint_S, joint)]

    def _holds(self, segment: int) -> bool:
        first, last = self._spans[segment]
        return self._hold and (segment == 0 or first < last or segment in self._request.keep)

    def held(self, parameter: nn.Parameter, segment: int) -> Tensor | None:
        """The parameter's part of a segment's held vector, in its shape, where the segment is held."""
        return self._part_of(self._held, parameter, segment) if self._holds(segment) else None

    def kept(self, parameter: nn.Parameter, segment: int) -> Tensor | None:
        """The parameter's part of a segment's gradient, in its shape, where it is kept and nothing holds it anyway."""
        if segment not in self._request.keep or self._holds(segment):
            return None
        return self._part_of(self._kept, parameter, segment)

    def _part_of(self, vectors: dict[int, Tensor], parameter: nn.Parameter, segment: int) -> Tensor:
        if segment not in vectors:
            vectors[segment] = self.zeros(self._size)
        start = self._offsets[id(parameter)]
        return vectors[segment][start : start + parameter.numel()].view(parameter.shape)

    def block(self, parameter: nn.Parameter, start: int, stop: int) -> Block:
        """Entries [start, stop) of a parameter, ready to take one segment's gradient after the other."""

        def part(whole: Tensor) -> Tensor:
            return whole.view(-1)[start:stop]

        update, first, norms = part(self.update(parameter)), self._request.joint_from, self._joint_norms
        held_joint = self._joint(parameter)
        joint = update if held_joint is None else part(held_joint)
        if norms is not None:
            joint = self.zeros(stop - start)
        held = {s: of_s for s in self.present() if (of_s := self.held(parameter, s)) is not None}
        kept = {s: of_s for s in self.present() if (of_s := self.kept(parameter, s)) is not None}
        dev = self.held(parameter, 0)
        return Block(
            update,
            [update if first is None or s < first else joint for s in range(self.segments)],
            self._coefficients,
            {segment: part(of_s) for segment, of_s in held.items()},
            {segment: part(of_s) for segment, of_s in kept.items()},
            None if dev is None else part(dev),
            self._norms,
            self._dots,
            None if norms is None else (joint, norms),
        )

    def separate(self, parameter: nn.Parameter, segment: int) -> Tensor | None:
        """The parameter's part of a segment's own gradient, in its shape, where all are kept."""
        if self.rows_SP is None:
            return None
        start = self._offsets[id(parameter)]
        return self.rows_SP[segment, start : start + parameter.numel()].view(parameter.shape)

    def add_columns(self, parameter: nn.Parameter, start: int, gradients_SB: Tensor) -> None:
        """All segments' gradients of entries [start, start + B) of a parameter."""
        stop = start + gradients_SB.shape[1]
        if self._hold:
            block = self.block(parameter, start, stop)
            for segment in self.present():
                block.add(segment, gradients_SB[segment])
            block.finish()
            return
        for coefficients_S, target in self.targets(parameter):
            target.view(-1)[start:stop] += (coefficients_S @ gradients_SB).to(target.dtype)
        for segment in self._request.keep:
            kept = self.kept(parameter, segment)
            if kept is not None:
                kept.view(-1)[start:stop] += gradients_SB[segment]
        if self.rows_SP is not None:
            offset = self._offsets[id(parameter)]
            self.rows_SP[:, offset + start : offset + stop] += gradients_SB
        elif self.gram_SS is not None:
            self.gram_SS.addmm_(gradients_SB, gradients_SB.t())
        else:
            self.add_scores(gradients_SB.square().sum(1), gradients_SB @ gradients_SB[0])
            if self._joint_norms is not None:
                self._joint_norms.append((self._joint_S @ gradients_SB).square().sum())

    def add_joint_score(self, norm2_of: Callable[[Tensor], Tensor]) -> None:
        """The joint gradient's squared norm in a part of the body, by a function of the coefficients [S]."""
        if self._joint_norms is not None:
            self._joint_norms.append(norm2_of(self._joint_S))

    def add_joint_lookups(self, parameter: nn.Parameter, ids_N: Tensor, rows_of: Callable[[Tensor], Tensor]) -> None:
        """The wanted rows of a table's joint gradient: those of ids, [N, H], by a function of the coefficients [S]."""
        wanted = self._request.joint_rows
        if wanted is not None and self._joint_rows_UH is not None and parameter is wanted.table:
            self._joint_rows_UH.index_add_(0, wanted.place_V[ids_N], rows_of(self._joint_S))

    def add_joint_table(self, parameter: nn.Parameter, segment: int, gradient_VH: Tensor) -> None:
        """The wanted rows of a segment's part of a table's joint gradient."""
        wanted = self._request.joint_rows
        if wanted is not None and self._joint_rows_UH is not None and parameter is wanted.table:
            self._joint_rows_UH.index_add_(0, wanted.place_V, self._joint_S[segment] * gradient_VH)

    def add_scores(self, norms2_S: Tensor, dots_S: Tensor) -> None:
        """Squared norms and inner products with v of a part of the body, but for segments that are held."""
        for segment in range(self.segments):
            if not self._holds(segment):
                self._norms[segment].append(norms2_S[segment])
                self._dots[segment].append(dots_S[segment])

    def end_piece(self) -> None:
        """Score the held segments that the piece completed, and drop them."""
        for segment in sorted(self._held):
            if self._spans[segment][1] == self._piece:
                vector_P = self._held[segment]
                self._norms[segment].append(inner(vector_P, vector_P))
                if 0 in self._held:
                    self._dots[segment].append(inner(vector_P, self._held[0]))
                if segment in self._request.keep:
                    self._kept[segment] = vector_P
                if segment != 0:
                    del self._held[segment]
        self._piece += 1

    def result(self, losses_S: Tensor) -> StepGradients:
        """What the step asked for."""
        request, rows_SP = self._request, self.rows_SP
        if rows_SP is not None and not (request.gram or request.scores):
            return StepGradients(losses_S=losses_S, separate_SP=rows_SP if request.separate else None)
        gram_SS = self.gram_SS if rows_SP is None else products(rows_SP, rows_SP)
        if gram_SS is not None:
            return from_gram(losses_S, gram_SS, request, rows_SP)
        joint_norm2 = self._joined()
        joint_wanted = request.joint_from is not None and request.joint_rows is None
        return StepGradients(
            losses_S=losses_S,
            dots_S=self._summed(self._dots),
            norms2_S=self._summed(self._norms),
            joint_norm2=joint_norm2 if joint_wanted else None,
            kept={s: self._kept[s] if s in self._kept else self.zeros(self._size) for s in request.keep},
            joint_rows_UH=None if self._joint_rows_UH is None else self._joint_rows_UH[:-1],
        )

    def _joined(self) -> Tensor | None:
        """The joint gradient's squared norm; afterwards it is part of the update."""
        if self._joint_norms is not None:
            return torch.stack([self.zeros(), *self._joint_norms]).sum()
        if self._joint_P is None:
            return None
        for parameter in self._parameters:
            joint = self._joint(parameter)
            if joint is not None:
                self.update(parameter).add_(joint)
        return inner(self._joint_P, self._joint_P)

    def _summed(self, terms: list[list[Tensor]]) -> Tensor:
        return torch.stack([torch.stack(values).sum() if values else self.zeros() for values in terms])
