"""Two special matrix products: long inner products with high precision, and fast products of row ranges.

Shape suffixes: P entries of the body's parameters, m and k numbers of vectors; N rows, I inputs, O outputs of a layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Self

import torch
from torch import Tensor

from aang_ray.model.segments import SegmentRows

RUN = 4096
"""Number of entries of a long inner product that are summed in the vectors' own type."""

MULTIPLE = 64
"""Lengths of row ranges are rounded up to a multiple of this: half-precision kernels on a CPU take about 2 ms for each
new length, far more than the product itself, and segments have new lengths at every step.
"""


def products(rows_mP: Tensor, others_kP: Tensor) -> Tensor:
    """Return all inner products <a_i, b_j> of long vectors, [m, k], in the vectors' type.

    Runs of `RUN` entries are summed in the vectors' type, and the runs in fp64. A single fp32 product over 2e7 entries
    had an error of 0.6 % on a CPU, too much for the inverse of a Gram matrix. With runs it is 2e-8, as fast.
    """
    runs = rows_mP.shape[1] // RUN
    whole = runs * RUN
    left, right = (rows[:, :whole].reshape(len(rows), runs, RUN).transpose(0, 1) for rows in (rows_mP, others_kP))
    total_mk = torch.bmm(left, right.transpose(1, 2)).sum(0, dtype=torch.float64)
    return (total_mk + rows_mP[:, whole:] @ others_kP[:, whole:].t()).to(rows_mP.dtype)


def inner(a_P: Tensor, b_P: Tensor) -> Tensor:
    """Return <a, b> of two vectors as a scalar, as precise as `products`."""
    return products(a_P[None], b_P[None])[0, 0]


@dataclass(frozen=True)
class Windows:
    """Row ranges of all segments with lengths rounded up to a multiple of `MULTIPLE`."""

    copies: tuple[slice, ...]
    """Each segment's range in a copy that has zeros in the gaps."""
    originals: tuple[slice, ...]
    """A range of the same length in the original for each segment; it extends beyond the segment's own rows."""
    starts: tuple[int, ...]
    """Offset of each segment's own rows within its range in the copy."""

    @classmethod
    def of(cls, rows: SegmentRows) -> Self | None:
        """Return the windows of all segments; None if a rounded length exceeds the number of rows."""
        lengths = [-(-(b - a) // MULTIPLE) * MULTIPLE for a, b in zip(rows.bounds, rows.bounds[1:], strict=False)]
        if max(lengths) > rows.rows:
            return None
        ends = list(accumulate(lengths))
        # A window that would end after the last row begins earlier.
        firsts = [min(begin, rows.rows - length) for begin, length in zip(rows.bounds, lengths, strict=False)]
        return cls(
            tuple(slice(end - length, end) for end, length in zip(ends, lengths, strict=True)),
            tuple(slice(first, first + length) for first, length in zip(firsts, lengths, strict=True)),
            tuple(e - n + b - f for e, n, b, f in zip(ends, lengths, rows.bounds, firsts, strict=False)),
        )


class PaddedCopies:
    """Makes copies with zeros in the gaps. The last copy is reused, because projections often share an input."""

    def __init__(self) -> None:
        self._last: tuple[Tensor, int, SegmentRows, Tensor] | None = None

    def copy(self, source_NC: Tensor, rows: SegmentRows, windows: Windows) -> Tensor:
        """Return the rows of each segment, padded with zeros before or after them to the rounded length."""
        if self._last is not None:
            last, version, of_rows, copy = self._last
            same = last.data_ptr() == source_NC.data_ptr() and last.shape == source_NC.shape
            if same and of_rows is rows and last.dtype == source_NC.dtype and last._version == version:
                return copy
        copy = source_NC.new_empty(windows.copies[-1].stop, source_NC.shape[1])
        for segment, (window, at) in enumerate(zip(windows.copies, windows.starts, strict=True)):
            own = rows.of(segment)
            end = at + own.stop - own.start
            copy[window.start : at] = 0
            copy[at:end] = source_NC[own]
            copy[end : window.stop] = 0
        self._last = (source_NC, source_NC._version, rows, copy)
        return copy


class SegmentProducts:
    """Computes G_sᵀ X_s for one segment after the other.

    If lengths are rounded up, the narrower factor is copied with zeros in the gaps, so that the rows that are read of
    the other factor beyond the segment are multiplied by zeros.
    """

    def __init__(self, grads_NO: Tensor, inputs_NI: Tensor, rows: SegmentRows, copies: PaddedCopies) -> None:
        self._grads_NO, self._inputs_NI = grads_NO, inputs_NI
        self._product_OI: Tensor | None = None
        own = tuple(rows.of(segment) for segment in range(rows.count))
        self._of_grads, self._of_inputs = own, own
        half = grads_NO.device.type == "cpu" and grads_NO.dtype in (torch.bfloat16, torch.float16)
        windows = Windows.of(rows) if half else None
        if windows is None:
            return
        if grads_NO.shape[1] < inputs_NI.shape[1]:
            self._grads_NO = copies.copy(grads_NO, rows, windows)
            self._of_grads, self._of_inputs = windows.copies, windows.originals
        else:
            self._inputs_NI = copies.copy(inputs_NI, rows, windows)
            self._of_grads, self._of_inputs = windows.originals, windows.copies

    def product(self, segment: int) -> Tensor:
        """Return G_sᵀ X_s, [O, I]. The next call overwrites the result."""
        left, right = self._grads_NO[self._of_grads[segment]].t(), self._inputs_NI[self._of_inputs[segment]]
        if self._product_OI is None:
            self._product_OI = left @ right
            return self._product_OI
        return torch.mm(left, right, out=self._product_OI)
