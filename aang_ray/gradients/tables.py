"""Segment gradients of embedding tables, computed without dense tables where possible.

Row v of g_s is the sum of the N rows of G with id v and segment s. Equal keys are found by sorting, so all sizes are
known in advance and nothing waits for the device.

Shape suffixes: N rows, S segments, V entries of the table, H width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from aang_ray.gradients.ledger import Ledger
from aang_ray.gradients.products import inner
from aang_ray.gradients.rules import Lookups
from aang_ray.model.segments import per_row


class TableGradient:
    """All rows of G that a pass adds to a table of V `entries`, with their ids and segments."""

    def __init__(self, lookups: Sequence[Lookups], entries: int, dtype: torch.dtype) -> None:
        self.segments = lookups[0].rows.count
        self.entries = entries
        self.ids_N = _joined([lookup.ids_N for lookup in lookups])
        self.grads_NH = _joined([lookup.grads_NH.to(dtype) for lookup in lookups])
        numbers_S = torch.arange(self.segments, device=self.ids_N.device)
        self.segment_N = _joined([per_row(numbers_S, lookup.rows) for lookup in lookups])

    def norms2(self) -> Tensor:
        """Return ||g_s||^2, [S]: sums of rows with equal id and segment, squared and added."""
        group_N, key_N = _groups(self.segment_N * self.entries + self.ids_N)
        sums_NH = torch.zeros_like(self.grads_NH).index_add_(0, group_N, self.grads_NH)
        return self._by_segment(torch.linalg.vector_norm(sums_NH, dim=1).square_(), key_N // self.entries)

    def norm2_of(self, coefficients_S: Tensor) -> Tensor:
        """Return ||sum_s c_s g_s||^2, a scalar."""
        group_N, _ = _groups(self.ids_N)
        sums_NH = torch.zeros_like(self.grads_NH).index_add_(0, group_N, self.weighted(coefficients_S))
        return inner(sums_NH.view(-1), sums_NH.view(-1))

    def dots(self, table_VH: Tensor) -> Tensor:
        """Return <table, g_s>, [S]."""
        return self._by_segment((table_VH.index_select(0, self.ids_N) * self.grads_NH).sum(1), self.segment_N)

    def dots_with_dev(self) -> Tensor:
        """Return <g_0, g_s>, [S]. g_0 is stored in N rows and not in V."""
        group_N, _ = _groups(self.ids_N)
        of_dev_N = self.segment_N == 0
        v_NH = torch.zeros_like(self.grads_NH).index_add_(0, group_N, self.grads_NH * of_dev_N[:, None])
        return self._by_segment((v_NH.index_select(0, group_N).mul_(self.grads_NH)).sum(1), self.segment_N)

    def _by_segment(self, values_N: Tensor, segment_N: Tensor) -> Tensor:
        return values_N.new_zeros(self.segments).index_add_(0, segment_N, values_N)

    def weighted(self, coefficients_S: Tensor) -> Tensor:
        """Return every row of G times its segment's coefficient, [N, H]."""
        return self.grads_NH * coefficients_S[self.segment_N][:, None]

    def stacked(self) -> Tensor:
        """Return all g_s as dense vectors, [S, V * H]."""
        result = self.grads_NH.new_zeros(self.segments * self.entries, self.grads_NH.shape[1])
        result.index_add_(0, self.segment_N * self.entries + self.ids_N, self.grads_NH)
        return result.view(self.segments, -1)


def settle_lookups(ledger: Ledger, parameter: nn.Parameter, lookups: Sequence[Lookups]) -> None:
    """Add a table's segment gradients from all lookups of one pass to the ledger."""
    entries = parameter.shape[0]
    gradient = TableGradient(lookups, entries, ledger.dtype)
    ledger.add_joint_lookups(parameter, gradient.ids_N, gradient.weighted)
    if ledger.segments * entries <= 2 * len(
        gradient.ids_N
    ):  # for a small table, dense gradients are cheaper than sorting
        ledger.add_stacked(parameter, gradient.stacked())
        return
    for segment in ledger.present():
        _scatter(lookups, segment, ledger.kept(parameter, segment))
    for coefficients_S, target_VH in ledger.targets(parameter):
        target_VH.index_add_(0, gradient.ids_N, gradient.weighted(coefficients_S).to(target_VH.dtype))
    if ledger.rows_SP is not None:
        for segment in ledger.present():
            _scatter(lookups, segment, ledger.part_of(ledger.rows_SP[segment], parameter))
    elif ledger.gram_SS is not None:
        for segment in ledger.present():
            table_VH = ledger.zeros(*parameter.shape)
            _scatter(lookups, segment, table_VH)
            ledger.gram_SS[segment] += gradient.dots(table_VH)
    else:
        for segment in ledger.present():
            _scatter(lookups, segment, ledger.buffer(parameter, segment))
        v_VH = ledger.reference(parameter)
        ledger.add_scores(gradient.norms2(), gradient.dots_with_dev() if v_VH is None else gradient.dots(v_VH))
        ledger.add_joint_score(gradient.norm2_of)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _groups(keys_N: Tensor) -> tuple[Tensor, Tensor]:
    """Return the group of each row, so that rows with equal keys form one, and each group's key (0 after the last)."""
    sorted_N, order_N = keys_N.sort()
    group_N = torch.cat([sorted_N.new_zeros(1), (sorted_N[1:] != sorted_N[:-1]).long()]).cumsum(0)
    of_row_N = torch.empty_like(order_N).scatter_(0, order_N, group_N)
    return of_row_N, torch.zeros_like(group_N).scatter_(0, group_N, sorted_N)


def _scatter(lookups: Sequence[Lookups], segment: int, out_VH: Tensor | None) -> None:
    if out_VH is not None:
        for lookup in lookups:
            lookup.add_to(segment, out_VH)
