"""Cross-entropy over a vocabulary, exact, without the matrix of all logits.

    loss_m = logsumexp_v(z_mv) - z_m,y(m),      z = x Wᵀ + b,      dloss_m / dz_m = softmax(z_m) - e_y(m)

The logits of a block of rows are computed in the type of the matrix products, turned into the gradient in place, and
used at once:

    dloss/dx_m = (p_m - e_m) W,      sum_m u_m dloss_m/dW = sum over blocks of (p - e)ᵀ (u x)

Then the block is overwritten by the next one. Maxima, exponentials and sums are in fp32 or wider. A pass over
M rows of V logits keeps M W numbers where logits, their fp32 copy and its softmax were 3 M V.

dloss/dx is known up to the factor u_m that the backward pass brings. The sums for W and b need u. A pass that knows u
beforehand (`segments.PassUpdate`) gets them from the forward pass; any other computes the blocks a second time.

Shape suffixes: M rows (labelled positions), W width of the embeddings, V vocabulary, B rows of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

ROWS = {"cpu": 512, "cuda": 4096}
"""Rows of a block: enough for the matrix products to reach their rate."""
ROWS_IN_CACHE = {"cpu": 32, "cuda": 4096}
"""Rows whose softmax is computed at once: on a CPU their logits fit into its cache."""
ENTRIES_IN_CACHE = {"cpu": 1024, "cuda": 2**20}
"""Entries of the vocabulary whose half-precision products are added to an fp32 sum at once. PyTorch adds an fp32 copy
of them, which on a CPU then stays in its cache.
"""


def compute_type(x_MW: Tensor, weight_VW: Tensor) -> torch.dtype:
    """Return the type of the matrix products: autocast's inside autocast, else the wider of the two."""
    kind = x_MW.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return torch.promote_types(x_MW.dtype, weight_VW.dtype)


def logit_gradients(
    x_MW: Tensor,
    weight_VW: Tensor,
    bias_V: Tensor,
    label_M: Tensor,
    *,
    loss_M: Tensor | None = None,
    bias_sum: tuple[Tensor, Tensor] | None = None,
) -> Iterator[tuple[slice, Tensor]]:
    """Yield p - e of each block of rows, [B, V], in a buffer that the next block overwrites.

    Args:
        x_MW: the decoder's input, in the type of the matrix products, as are the next two.
        weight_VW: its matrix.
        bias_V: its bias.
        label_M: the correct entry of each row.
        loss_M: where the losses are written, fp32 or wider.
        bias_sum: u, [M], and the tensor [V] to which the sum of u_m (p - e)_m is added, both fp32 or wider.
    """
    kind, (rows, vocabulary) = x_MW.device.type, (len(x_MW), len(weight_VW))
    wide = torch.promote_types(x_MW.dtype, torch.float32)
    size, part = min(max(rows, 1), ROWS.get(kind, 4096)), min(max(rows, 1), ROWS_IN_CACHE.get(kind, 4096))
    logits_BV = x_MW.new_empty(size, vocabulary)
    softmax_BV = x_MW.new_empty(part, vocabulary, dtype=wide)
    wide_BV = softmax_BV.new_empty(part, vocabulary) if wide != x_MW.dtype else None
    minus_one_B1 = softmax_BV.new_full((part, 1), -1.0)
    for start in range(0, rows, size):
        block = slice(start, min(start + size, rows))
        of_block_BV = logits_BV[: block.stop - start]
        torch.addmm(bias_V, x_MW[block], weight_VW.t(), out=of_block_BV)
        for first in range(start, block.stop, part):
            stop = min(first + part, block.stop)
            half_BV = of_block_BV[first - start : stop - start]
            z_BV = half_BV if wide_BV is None else wide_BV[: stop - first].copy_(half_BV)
            p_BV = torch.softmax(z_BV, 1, out=softmax_BV[: stop - first])
            label_B1 = label_M[first:stop, None]
            if loss_M is not None:
                # The largest probability is at least 1 / V, so its logarithm is as exact as the type allows.
                logsumexp_B = z_BV.amax(1) - p_BV.amax(1).log_()
                torch.sub(logsumexp_B, z_BV.gather(1, label_B1).squeeze(1), out=loss_M[first:stop])
            p_BV.scatter_add_(1, label_B1, minus_one_B1[: stop - first])
            if bias_sum is not None:
                scale_M, sum_V = bias_sum
                sum_V.addmv_(p_BV.t(), scale_M[first:stop])
            half_BV.copy_(p_BV)
        yield block, of_block_BV


class WeightSum:
    """Adds (p - e)ᵀ (u x) of one block after the other to a tensor [V, W] that is fp32 or wider."""

    def __init__(self, x_MW: Tensor, scale_M: Tensor, sum_VW: Tensor) -> None:
        self._scaled_MW = x_MW * scale_M[:, None].to(x_MW.dtype)
        self._sum_VW = sum_VW
        self._product_VW = None if sum_VW.dtype == x_MW.dtype else x_MW.new_empty(sum_VW.shape)

    def add(self, block: slice, gradient_BV: Tensor) -> None:
        """Add a block of rows."""
        scaled_BW = self._scaled_MW[block]
        if self._product_VW is None:
            self._sum_VW.addmm_(gradient_BV.t(), scaled_BW)
        else:
            torch.mm(gradient_BV.t(), scaled_BW, out=self._product_VW)
            entries = ENTRIES_IN_CACHE.get(self._sum_VW.device.type, 2**20)
            for first in range(0, len(self._sum_VW), entries):
                self._sum_VW[first : first + entries].add_(self._product_VW[first : first + entries])


class Saved(NamedTuple):
    """What the graph keeps for the backward pass of `DecodedLoss`."""

    x_MW: Tensor
    """The decoder's input, in the type of the matrix products."""
    weight_VW: Tensor
    bias_V: Tensor
    label_M: Tensor
    unit_MW: Tensor | None
    """The gradient of each row's loss with respect to x, if it was needed."""
    weight_sum_VW: Tensor | None
    """The sum for W, if it was computed."""
    bias_sum_V: Tensor | None


class DecodedLoss(torch.autograd.Function):
    """The losses, [M], of x, W, b and the labels; differentiable any number of times in a row, but not twice."""

    @staticmethod
    def forward(
        ctx: Any,
        x_MW: Tensor,
        weight_VW: Tensor,
        bias_V: Tensor,
        label_M: Tensor,
        scale_M: Tensor | None,
        needed: tuple[bool, bool, bool],
    ) -> Tensor:
        """Compute losses and gradients.

        Args:
            ctx: the node of the graph.
            x_MW: the decoder's input.
            weight_VW: its matrix.
            bias_V: its bias.
            label_M: the correct entry of each row.
            scale_M: u, the factor of each row in the sums for W and b; None if it is not known yet.
            needed: whether to compute the gradient of x, and the sums for W and for b (these only with `scale_M`).
        """
        dtype = compute_type(x_MW, weight_VW)
        of_x, of_weight, of_bias = needed
        with torch.autocast(x_MW.device.type, enabled=False):
            x, weight, bias = x_MW.detach().to(dtype), weight_VW.detach().to(dtype), bias_V.detach().to(dtype)
            wide = torch.promote_types(dtype, torch.float32)
            loss_M = x.new_empty(len(x), dtype=wide)
            unit_MW = torch.empty_like(x) if of_x else None
            scale_M = None if scale_M is None else scale_M.to(wide)
            sum_VW = sum_V = weight_sum = bias_sum = None
            if scale_M is not None and of_weight:
                sum_VW = x.new_zeros(weight.shape, dtype=wide)
                weight_sum = WeightSum(x, scale_M, sum_VW)
            if scale_M is not None and of_bias:
                sum_V = x.new_zeros(len(weight), dtype=wide)
                bias_sum = (scale_M, sum_V)
            for block, gradient_BV in logit_gradients(x, weight, bias, label_M, loss_M=loss_M, bias_sum=bias_sum):
                if unit_MW is not None:
                    torch.mm(gradient_BV, weight, out=unit_MW[block])
                if weight_sum is not None:
                    weight_sum.add(block, gradient_BV)
        ctx.save_for_backward(*Saved(x, weight_VW, bias_V, label_M, unit_MW, sum_VW, sum_V))
        ctx.input_type = x_MW.dtype
        return loss_M

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients, which for W and b are those sums if the forward pass has them."""
        (scale_M,) = grads
        saved = Saved(*ctx.saved_tensors)
        of_x, of_weight, of_bias = ctx.needs_input_grad[:3]
        x_grad: Tensor | None = None
        if of_x:
            assert saved.unit_MW is not None
            x_grad = (saved.unit_MW * scale_M[:, None].to(saved.unit_MW.dtype)).to(ctx.input_type)
        sum_VW, sum_V = saved.weight_sum_VW, saved.bias_sum_V
        missing_weight, missing_bias = of_weight and sum_VW is None, of_bias and sum_V is None
        if missing_weight or missing_bias:
            found = decoder_sums(
                saved.x_MW, saved.weight_VW, saved.bias_V, saved.label_M, scale_M, of_weight=missing_weight
            )
            sum_VW = found[0] if missing_weight else sum_VW
            sum_V = found[1] if missing_bias else sum_V
        return (
            x_grad,
            sum_VW.to(saved.weight_VW.dtype) if of_weight and sum_VW is not None else None,
            sum_V.to(saved.bias_V.dtype) if of_bias and sum_V is not None else None,
            None,
            None,
            None,
        )


def saved_by(node: Any) -> Saved | None:
    """Return what a node of the graph keeps; None if it is not that of `DecodedLoss`."""
    kind: type[Any] = DecodedLoss._backward_cls
    return Saved(*node.saved_tensors) if isinstance(node, kind) else None


@torch.no_grad()
def decoder_sums(
    x_MW: Tensor, weight_VW: Tensor, bias_V: Tensor, label_M: Tensor, scale_M: Tensor, *, of_weight: bool = True
) -> tuple[Tensor | None, Tensor]:
    """Compute blocks again; return sum_m u_m dloss_m/dW, [V, W], if asked for, and sum_m u_m dloss_m/db, [V].

    `x_MW` is in the type of the matrix products; the sums are fp32 or wider.
    """
    with torch.autocast(x_MW.device.type, enabled=False):
        wide = torch.promote_types(x_MW.dtype, torch.float32)
        scale_M = scale_M.to(wide)
        weight, bias = weight_VW.detach().to(x_MW.dtype), bias_V.detach().to(x_MW.dtype)
        sum_V = x_MW.new_zeros(len(weight), dtype=wide)
        sum_VW = x_MW.new_zeros(weight.shape, dtype=wide) if of_weight else None
        weight_sum = None if sum_VW is None else WeightSum(x_MW, scale_M, sum_VW)
        for block, gradient_BV in logit_gradients(x_MW, weight, bias, label_M, bias_sum=(scale_M, sum_V)):
            if weight_sum is not None:
                weight_sum.add(block, gradient_BV)
    return sum_VW, sum_V


def decoded_losses(
    x_MW: Tensor,
    weight_VW: Tensor,
    bias_V: Tensor,
    label_M: Tensor,
    scale_M: Tensor | None = None,
    sums: tuple[bool, bool] = (False, False),
) -> Tensor:
    """Return the cross-entropy of each row, [M], in fp32 or wider, differentiable.

    Args:
        x_MW: the decoder's input.
        weight_VW: its matrix.
        bias_V: its bias.
        label_M: the correct entry of each row.
        scale_M: the factor u of each row in the sums for W and b, if it is known before the backward pass.
        sums: whether the sum for W, and the one for b, are computed with `scale_M`. A backward pass then returns them
            as gradients, whatever it is given.
    """
    needed = (torch.is_grad_enabled() and x_MW.requires_grad, *sums)
    apply: Callable[..., Tensor] = DecodedLoss.apply
    return apply(x_MW, weight_VW, bias_V, label_M, scale_M, needed)
