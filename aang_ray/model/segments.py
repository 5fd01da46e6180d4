"""Assignment of a tensor's rows to the segments of a batch.

A batch is divided into *segments*: the dev batch, the end task's examples, and the examples of each sampled
objective. The rows of every segment are contiguous. What a row is depends on the tensor: a token for the body, a
labelled position for a vocabulary head, a text for a head on pooled vectors.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(frozen=True)
class SegmentRows:
    """Segment s has the rows from `bounds[s]` up to `bounds[s + 1]` of a tensor whose leading axes are flattened."""

    bounds: tuple[int, ...]
    """S + 1 integers that start at 0 and never decrease; a segment may be empty. They are Python integers from the data
    thread, so that nothing waits for a value from the device."""

    def __post_init__(self) -> None:
        if self.bounds[0] != 0 or any(b < a for a, b in zip(self.bounds, self.bounds[1:], strict=False)):
            raise ValueError(f"segment bounds must start at 0 and never decrease, got {self.bounds}")

    @property
    def count(self) -> int:
        """The number of segments, S."""
        return len(self.bounds) - 1

    @property
    def rows(self) -> int:
        """The number of rows of all segments."""
        return self.bounds[-1]

    def of(self, segment: int) -> slice:
        """Return the rows of a segment."""
        return slice(self.bounds[segment], self.bounds[segment + 1])


_current: ContextVar[SegmentRows | None] = ContextVar("segment_rows", default=None)


@contextmanager
def segment_rows(rows: SegmentRows) -> Iterator[None]:
    """Set the segment of every row for the modules called inside the block.

    Heads are called in such a block. Only the single-pass engine uses the setting.
    """
    token = _current.set(rows)
    try:
        yield
    finally:
        _current.reset(token)


def current_segment_rows() -> SegmentRows | None:
    """Return the rows that the innermost `segment_rows` block has set; None outside of any block."""
    return _current.get()
