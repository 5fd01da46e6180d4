"""Attention of training steps in half precision on a CPU: what PyTorch computes, in less time.

PyTorch trains such attention with dropout in a dozen passes over fp32 matrices [R, A, L, L], which are larger than the
caches, and without dropout in a kernel whose backward pass takes longer still. Here a few rows are taken through the
whole computation at a time,

    P = softmax(scale Q Kᵀ + mask),      out = (P * keep) V / (1 - p),

in fp32 as there, so the results differ by rounding only. The mask of dropout, `keep`, is drawn in one call for all
rows: these are the random numbers that PyTorch draws.

Shape suffixes: R rows, A heads, L tokens of a row, D width of a head; B = rows of a group times heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "aang_ray"
"""Name of this attention in Hugging Face's registry."""

GROUP = 2**19
"""Entries of attention matrices that are computed at once for each thread, so that they stay in a core's cache."""


class TrainingAttention(torch.autograd.Function):
    """Attention, [R, L, A, D], of queries, keys and values [R, A, L, D] and an additive mask [R, 1 or A, L, L]."""

    @staticmethod
    def forward(
        ctx: Any, q_RALD: Tensor, k_RALD: Tensor, v_RALD: Tensor, mask: Tensor, dropout: float, scale: float
    ) -> Tensor:
        """Compute the attention; `dropout` is the probability p, and `scale` that of the scores."""
        rows, heads, length, width = q_RALD.shape
        p_RALL = torch.empty(rows, heads, length, length, dtype=torch.float32)
        keep_RALL = torch.empty_like(p_RALL).bernoulli_(1.0 - dropout) if dropout > 0.0 else None
        out_RLAD = q_RALD.new_empty(rows, length, heads, width)
        scores, dropped = _Buffer(length, length), _Buffer(length, length)
        q, k, v, out = (_Buffer(length, width) for _ in range(4))
        for part in _groups(q_RALD):
            scores_BLL = scores.copy_of(mask[part].expand(-1, heads, -1, -1))
            scores_BLL.baddbmm_(q.copy_of(q_RALD[part]), k.copy_of(k_RALD[part]).mT, alpha=scale)
            p_BLL = torch.softmax(scores_BLL, -1, out=p_RALL[part].view_as(scores_BLL))
            if keep_RALL is not None:
                p_BLL = torch.mul(p_BLL, keep_RALL[part].view_as(p_BLL), out=dropped.like(p_BLL))
            out_BLD = _product(p_BLL, v.copy_of(v_RALD[part]), 1.0 / (1.0 - dropout), out)
            _write(out_BLD, out_RLAD[part].transpose(1, 2))
        ctx.save_for_backward(q_RALD, k_RALD, v_RALD, p_RALL, *(() if keep_RALL is None else (keep_RALL,)))
        ctx.dropout, ctx.scale = dropout, scale
        return out_RLAD

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of queries, keys and values."""
        q_RALD, k_RALD, v_RALD, p_RALL, *rest = ctx.saved_tensors
        keep_RALL = rest[0] if rest else None
        kept, scale = 1.0 / (1.0 - ctx.dropout), ctx.scale
        grad_RALD = grads[0].transpose(1, 2)
        rows, heads, length, width = q_RALD.shape
        dq_RALD, dk_RALD, dv_RALD = (q_RALD.new_empty(rows, length, heads, width).transpose(1, 2) for _ in range(3))
        dropped, of_p, of_scores = (_Buffer(length, length) for _ in range(3))
        q, k, v, grad, product = (_Buffer(length, width) for _ in range(5))
        for part in _groups(q_RALD):
            grad_BLD = grad.copy_of(grad_RALD[part])
            p_BLL = dropped_BLL = p_RALL[part].view(-1, length, length)
            if keep_RALL is not None:
                keep_BLL = keep_RALL[part].view_as(p_BLL)
                dropped_BLL = torch.mul(p_BLL, keep_BLL, out=dropped.like(p_BLL))
            _write(_product(dropped_BLL.mT, grad_BLD, kept, product), dv_RALD[part])
            dp_BLL = _product(grad_BLD, v.copy_of(v_RALD[part]).mT, kept, of_p)
            if keep_RALL is not None:
                dp_BLL *= keep_BLL
            # d scores = P * (dP - sum over keys of P * dP)
            ds_BLL = torch.mul(p_BLL, dp_BLL, out=of_scores.like(p_BLL))
            ds_BLL.addcmul_(p_BLL, ds_BLL.sum(-1, keepdim=True), value=-1.0)
            _write(_product(ds_BLL, k.copy_of(k_RALD[part]), scale, product), dq_RALD[part])
            _write(_product(ds_BLL.mT, q.copy_of(q_RALD[part]), scale, product), dk_RALD[part])
        return dq_RALD, dk_RALD, dv_RALD, None, None, None


class _Buffer:
    """An fp32 buffer of matrices, which is made at its first use, by the largest group."""

    def __init__(self, *shape: int) -> None:
        self._shape = shape
        self._buffer: Tensor | None = None

    def of(self, count: int) -> Tensor:
        """Return room for `count` matrices."""
        if self._buffer is None:
            self._buffer = torch.empty(count, *self._shape, dtype=torch.float32)
        return self._buffer[:count]

    def like(self, matrices: Tensor) -> Tensor:
        """Return room for as many matrices."""
        return self.of(len(matrices))

    def copy_of(self, source: Tensor) -> Tensor:
        """Return the matrices of all rows and heads, [rows, heads, ...], in fp32, one after the other."""
        copy = self.of(source.shape[0] * source.shape[1])
        copy.view(source.shape).copy_(source)
        return copy


def _groups(q_RALD: Tensor) -> Iterator[slice]:
    """Yield runs of rows; only the last may be shorter."""
    rows, heads, length, _ = q_RALD.shape
    size = max(1, GROUP * torch.get_num_threads() // (heads * length * length))
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))


def _product(left: Tensor, right: Tensor, factor: float, buffer: _Buffer) -> Tensor:
    """Return `factor` times the products of two lists of matrices, in the buffer."""
    out = buffer.like(left)
    return torch.baddbmm(out, left, right, beta=0.0, alpha=factor, out=out)


def _write(matrices_BLD: Tensor, target_RALD: Tensor) -> None:
    """Copy a group's matrices to its rows and heads."""
    target_RALD.copy_(matrices_BLD.view(target_RALD.shape))


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """Compute attention as Hugging Face's models ask for it; all but training in half precision on a CPU by PyTorch.

    Args:
        module: the layer.
        query: [R, A, L, D], as are key and value.
        key: see query.
        value: see query.
        attention_mask: additive, [R, 1, L, L].
        dropout: probability of dropout.
        scaling: factor of the scores; None for 1 / sqrt(D).
        **settings: what else a model may ask for.

    Returns:
        The result, [R, L, A, D], and no attention matrices.
    """
    if attention_mask is not None and _serves(query, key, value, attention_mask, settings):
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        apply: Callable[..., Tensor] = TrainingAttention.apply
        return apply(query, key, value, attention_mask, dropout, scale), None
    found: tuple[Tensor, None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **settings
    )
    return found


def _serves(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, settings: dict[str, Any]) -> bool:
    """Return whether `TrainingAttention` computes this call."""
    return (
        query.device.type == "cpu"
        and query.dtype in (torch.bfloat16, torch.float16)
        and torch.is_grad_enabled()
        and query.requires_grad
        and query.shape == key.shape == value.shape
        and mask.is_floating_point()
        and not mask.requires_grad
        and mask.shape[0] == query.shape[0]
        and mask.shape[-2:] == (query.shape[2], query.shape[2])
        and settings.get("position_bias") is None
    )


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)  # without it, models would ignore a padding mask


def use_training_attention(body: nn.Module) -> None:
    """Let a Hugging Face model that uses PyTorch's attention use `attention`."""
    model: Any = body
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(NAME)
