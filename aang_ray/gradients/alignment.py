"""Products of row ranges of any length, at the rate that a matrix unit has for round lengths.

Shape suffixes: N rows, I inputs, O outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Self

import torch
from torch import Tensor

from aang_ray.model.segments import SegmentRows

MULTIPLE = 64
"""Half-precision kernels on a CPU are generated for each length of the summed axis: about 2 ms for each
new one, far more than the product itself. Lengths are rounded up to a multiple, so that few are met."""


@dataclass(frozen=True)
class Windows:
    """Segments with lengths rounded up, in a copy with gaps and in the original, read past the segment's end."""

    copies: tuple[slice, ...]
    originals: tuple[slice, ...]
    starts: tuple[int, ...]
    """Where the segment's own rows begin in the copy."""

    @classmethod
    def of(cls, rows: SegmentRows) -> Self | None:
        """None where a rounded length exceeds the number of rows."""
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


class Padded:
    """Copies with zeros in the gaps; the last one is kept, as projections of one input follow each other."""

    def __init__(self) -> None:
        self._last: tuple[Tensor, int, SegmentRows, Tensor] | None = None

    def copy(self, source_NC: Tensor, rows: SegmentRows, windows: Windows) -> Tensor:
        """The rows of each segment, followed (or preceded) by zeros up to its rounded length."""
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


class Aligned:
    """Computes G_sᵀ X_s for segment after segment.

    Where lengths are rounded up, the narrower factor is copied with zeros in the gaps; the other is read
    past the segment's end (its rows there are multiplied by those zeros, and finite).
    """

    def __init__(self, grads_NO: Tensor, inputs_NI: Tensor, rows: SegmentRows, padded: Padded) -> None:
        self._grads_NO, self._inputs_NI = grads_NO, inputs_NI
        self._product_OI: Tensor | None = None
        own = tuple(rows.of(segment) for segment in range(rows.count))
        self._of_grads, self._of_inputs = own, own
        half = grads_NO.device.type == "cpu" and grads_NO.dtype in (torch.bfloat16, torch.float16)
        windows = Windows.of(rows) if half else None
        if windows is None:
            return
        if grads_NO.shape[1] < inputs_NI.shape[1]:
            self._grads_NO = padded.copy(grads_NO, rows, windows)
            self._of_grads, self._of_inputs = windows.copies, windows.originals
        else:
            self._inputs_NI = padded.copy(inputs_NI, rows, windows)
            self._of_grads, self._of_inputs = windows.originals, windows.copies

    def product(self, segment: int) -> Tensor:
        """The segment's G_sᵀ X_s, [O, I]; overwritten by the next one's."""
        left, right = self._grads_NO[self._of_grads[segment]].t(), self._inputs_NI[self._of_inputs[segment]]
        if self._product_OI is None:
            self._product_OI = left @ right
            return self._product_OI
        return torch.mm(left, right, out=self._product_OI)
