"""Assignment of a tensor's rows to the segments of a batch, and dataclasses of tensors that move to a device.

A batch is divided into *segments*: the dev batch, the end task's examples, and the examples of each sampled
objective. What a row is depends on the tensor: a token for the body, a labelled position for a vocabulary head, a
text for a head on pooled vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor


class Movable:
    """A dataclass whose fields hold tensors, other dataclasses of tensors, and tuples of these."""

    def to(self, device: torch.device) -> Self:
        """Return a copy on a device. Copying from pinned memory does not block."""
        copy: Self = _with_tensors(self, lambda tensor: tensor.to(device, non_blocking=True))
        return copy

    def pin(self) -> Self:
        """Return a copy in page-locked memory."""
        copy: Self = _with_tensors(self, Tensor.pin_memory)
        return copy


def _with_tensors(part: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(part, Tensor):
        return change(part)
    if isinstance(part, tuple):
        return tuple(_with_tensors(item, change) for item in part)
    if is_dataclass(part) and not isinstance(part, type):
        return replace(part, **{f.name: _with_tensors(getattr(part, f.name), change) for f in fields(part)})
    return part


@dataclass(frozen=True)
class SegmentRows:
    """Segment s has the rows from `bounds[s]` up to `bounds[s + 1]` of a tensor whose leading axes are flattened."""

    bounds: tuple[int, ...]
    """S + 1 Python integers that start at 0 and never decrease, so that nothing waits for a value from the device."""

    def __post_init__(self) -> None:
        if self.bounds[0] != 0 or any(b < a for a, b in zip(self.bounds, self.bounds[1:], strict=False)):
            raise ValueError(f"segment bounds must start at 0 and never decrease, got {self.bounds}")

    @property
    def count(self) -> int:
        return len(self.bounds) - 1

    @property
    def rows(self) -> int:
        return self.bounds[-1]

    def of(self, segment: int) -> slice:
        return slice(self.bounds[segment], self.bounds[segment + 1])


_current: ContextVar[SegmentRows | None] = ContextVar("segment_rows", default=None)


@contextmanager
def segment_rows(rows: SegmentRows) -> Iterator[None]:
    """Set the segment of every row for the modules called inside the block: heads, for the single-pass engine."""
    token = _current.set(rows)
    try:
        yield
    finally:
        _current.reset(token)


def current_segment_rows() -> SegmentRows | None:
    """Return the rows that the innermost `segment_rows` block has set; None outside of any block."""
    return _current.get()
