"""What one call of one module gives to the gradient of one parameter, segment by segment.

Shape suffixes: N rows, S segments, I inputs, O outputs, V entries of a table, H its width, P parameters.
Rows of a segment are contiguous, so that a segment's part is a slice and never a copy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.grad import conv1d_weight, conv2d_weight

from aang_ray.model.segments import SegmentRows


def per_row(values_S: Tensor, rows: SegmentRows) -> Tensor:
    """Every row's value of its segment, [S] to [N], without waiting for the device."""
    lengths = torch.tensor([b - a for a, b in zip(rows.bounds, rows.bounds[1:], strict=False)])
    return values_S.repeat_interleave(lengths.to(values_S.device, non_blocking=True), output_size=rows.rows)


class Contribution(Protocol):
    """The part of a parameter's segment gradients that comes from one call."""

    rows: SegmentRows

    def add_to(self, segment: int, out: Tensor) -> None:
        """Add the segment's gradient to a tensor of the parameter's shape."""
        ...

    def add_total(self, coefficients_S: Tensor, out: Tensor) -> None:
        """Add sum_s c_s g_s to a tensor of the parameter's shape."""
        ...


class Products:
    """A matrix that maps rows: the segment's gradient is G_sᵀ X_s, [O, I], the same products as in the sum."""

    def __init__(self, grads_NO: Tensor, inputs_NI: Tensor, rows: SegmentRows) -> None:
        self.rows = rows
        self.grads_NO = grads_NO
        self.inputs_NI = inputs_NI

    def add_to(self, segment: int, out: Tensor) -> None:
        part = self.rows.of(segment)
        out += self.grads_NO[part].t() @ self.inputs_NI[part]

    def add_total(self, coefficients_S: Tensor, out: Tensor) -> None:
        weights_N = per_row(coefficients_S, self.rows).to(self.inputs_NI.dtype)
        out += self.grads_NO.t() @ (self.inputs_NI * weights_N[:, None])


class Sums:
    """A vector that is added to every row: the segment's gradient is the sum of its rows of G.

    With `inputs` and `scaled`, a vector that multiplies `scaled(row)`: the sum of G * scaled(X).
    """

    def __init__(
        self,
        grads_NP: Tensor,
        rows: SegmentRows,
        inputs_NP: Tensor | None = None,
        scaled: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.rows = rows
        self.grads_NP = grads_NP
        self.inputs_NP = inputs_NP
        self.scaled = scaled

    def columns(self, dtype: torch.dtype, members: Callable[[SegmentRows, Tensor], Tensor] | None = None) -> Tensor:
        """All segments' gradients, [S, P], in the given type.

        With `members`, a function that gives the 0/1 matrix of who owns which row, [S, N], rows of half
        precision are added by a product with it: read once, accumulated in fp32, rounded once.
        """
        if members is not None and self.inputs_NP is None and self.grads_NP.dtype in (torch.bfloat16, torch.float16):
            return (members(self.rows, self.grads_NP) @ self.grads_NP).to(dtype)
        columns_SP = self.grads_NP.new_zeros(self.rows.count, self.grads_NP.shape[1], dtype=dtype)
        for segment in range(self.rows.count):
            part = self.rows.of(segment)
            if part.stop > part.start:
                torch.sum(self._terms(part, dtype), dim=0, dtype=dtype, out=columns_SP[segment])
        return columns_SP

    def _terms(self, part: slice, dtype: torch.dtype) -> Tensor:
        grads_NP = self.grads_NP[part]
        if self.inputs_NP is None or self.scaled is None:
            return grads_NP
        return self.scaled(self.inputs_NP[part].to(dtype)).mul_(grads_NP)

    def add_to(self, segment: int, out: Tensor) -> None:
        out += self._terms(self.rows.of(segment), out.dtype).sum(0, dtype=out.dtype).view(out.shape)

    def add_total(self, coefficients_S: Tensor, out: Tensor) -> None:
        out += (coefficients_S @ self.columns(coefficients_S.dtype)).view(out.shape)


class Lookups:
    """A table read at ids: row v of the segment's gradient is the sum of G over the segment's rows with id v."""

    def __init__(self, grads_NH: Tensor, ids_N: Tensor, rows: SegmentRows, padding: int | None) -> None:
        self.rows = rows
        self.ids_N = ids_N
        # The entry of padding is constant by definition of the module.
        self.grads_NH = grads_NH if padding is None else grads_NH * (ids_N != padding)[:, None]

    def add_to(self, segment: int, out: Tensor) -> None:
        part = self.rows.of(segment)
        out.index_add_(0, self.ids_N[part], self.grads_NH[part].to(out.dtype))

    def add_total(self, coefficients_S: Tensor, out: Tensor) -> None:
        weights_N = per_row(coefficients_S, self.rows).to(out.dtype)
        out.index_add_(0, self.ids_N, self.grads_NH.to(out.dtype) * weights_N[:, None])


class Convolution:
    """A filter bank: the segment's gradient is the correlation of its examples' inputs with their gradients."""

    def __init__(self, module: nn.Conv1d | nn.Conv2d, grads: Tensor, inputs: Tensor, rows: SegmentRows) -> None:
        self.rows = rows
        self._module: Any = module
        self._grads = grads
        self._inputs = inputs

    def add_to(self, segment: int, out: Tensor) -> None:
        part = self.rows.of(segment)
        module = self._module
        weight_grad: Callable[..., Tensor] = conv1d_weight if isinstance(module, nn.Conv1d) else conv2d_weight
        out += weight_grad(
            self._inputs[part],
            module.weight.shape,
            self._grads[part],
            module.stride,
            module.padding,
            module.dilation,
            module.groups,
        )

    def add_total(self, coefficients_S: Tensor, out: Tensor) -> None:
        for segment in range(self.rows.count):
            gradient = torch.zeros_like(out)
            self.add_to(segment, gradient)
            out += coefficients_S[segment] * gradient
