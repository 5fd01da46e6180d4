"""Hands the contributions to one parameter over to the ledger: added per segment first, then scored.

Shape suffixes: S segments, B entries of a block, P entries of the parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn

from aang_ray.gradients.alignment import Aligned
from aang_ray.gradients.contributions import Contribution, Lookups, Products, Sums
from aang_ray.gradients.ledger import Ledger
from aang_ray.gradients.tables import settle_lookups

BLOCK = 160_000
"""Most entries of a block: what is read and written of a gradient, v and the update stays in a core's cache."""


def settle(ledger: Ledger, parameter: nn.Parameter, contributions: Sequence[Contribution]) -> None:
    """Add all that one pass contributes to a parameter; segments' norms are norms of the sums."""
    sums = [c for c in contributions if isinstance(c, Sums)]
    products = [c for c in contributions if isinstance(c, Products)]
    lookups = [c for c in contributions if isinstance(c, Lookups)]
    if len(sums) == len(contributions):
        columns_SP = sums[0].columns(ledger.dtype, ledger.members)
        for other in sums[1:]:
            columns_SP += other.columns(ledger.dtype, ledger.members)
        ledger.add_columns(parameter, 0, columns_SP)
    elif len(products) == len(contributions):
        _settle_products(ledger, parameter, products)
    elif len(lookups) == len(contributions):
        settle_lookups(ledger, parameter, lookups)
    else:
        settle_dense(ledger, [parameter], lambda _: [ledger.zeros(*parameter.shape)], {parameter: contributions})


def _settle_products(ledger: Ledger, parameter: nn.Parameter, products: Sequence[Products]) -> None:
    """P_s = sum over calls of G_sᵀ X_s, for one segment after the other, dropped as soon as it is scored."""
    factors = [Aligned(c.grads_NO, c.inputs_NI, c.rows, ledger.padded) for c in products]
    if ledger.by_columns:
        columns_SP = ledger.zeros(ledger.segments, *parameter.shape)
        for segment in ledger.present():
            for factor in factors:
                columns_SP[segment] += factor.product(segment)
        ledger.add_columns(parameter, 0, columns_SP.flatten(1))
        return
    entries = parameter.numel()
    size = -(-entries // -(-entries // BLOCK))
    starts = range(0, entries, size)
    blocks = [ledger.block(parameter, start, min(start + size, entries)) for start in starts]
    scratch_B = ledger.zeros(size)
    for segment in ledger.present():
        gradients = [factor.product(segment).view(-1) for factor in factors]
        for start, block in zip(starts, blocks, strict=True):
            parts = [gradient[start : start + size] for gradient in gradients]
            # One call's product in the statistics' own type is used as it is.
            gradient_B = parts[0]
            if len(parts) > 1 or gradient_B.dtype != ledger.dtype:
                gradient_B = scratch_B[: len(gradient_B)].copy_(gradient_B)
                for other in parts[1:]:
                    gradient_B += other
            block.add(segment, gradient_B)
    for block in blocks:
        block.finish()


def settle_dense(
    ledger: Ledger,
    parameters: Sequence[nn.Parameter],
    gradients_of: Callable[[int], Sequence[Tensor]],
    contributions: Mapping[nn.Parameter, Sequence[Contribution]],
) -> None:
    """The general way: each segment's whole gradient of a few parameters, one segment after the other.

    `gradients_of(s)` gives one fresh tensor for each parameter, to which its contributions are added.
    """
    columns = [ledger.zeros(ledger.segments, p.numel()) for p in parameters] if ledger.by_columns else []
    blocks = [] if ledger.by_columns else [ledger.block(p, 0, p.numel()) for p in parameters]
    for segment in ledger.present():
        for index, (parameter, gradient) in enumerate(zip(parameters, gradients_of(segment), strict=True)):
            for contribution in contributions.get(parameter, ()):
                contribution.add_to(segment, gradient)
            ledger.add_joint_table(parameter, segment, gradient)
            if ledger.by_columns:
                columns[index][segment] = gradient.view(-1)
            else:
                blocks[index].add(segment, gradient.view(-1))
    for block in blocks:
        block.finish()
    for parameter, columns_SP in zip(parameters, columns, strict=False):
        ledger.add_columns(parameter, 0, columns_SP)
