"""Which rows of a tensor belong to which segment of a batch.

A batch is cut into *segments*: the dev batch, the end task's examples, the examples of each sampled
objective. Rows are laid out so that every segment is one contiguous range; what a row is depends on
the tensor: a token of the body, a labelled position of a vocabulary head, a text of a pooled head.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(frozen=True)
class SegmentRows:
    """Segment s owns rows `bounds[s]` to `bounds[s + 1]` of a tensor whose leading axes are flattened.

    `bounds` has S + 1 entries, starts at 0, never decreases; a segment may be empty. They are plain
    integers from the data thread, so that nothing on the device waits for them.
    """

    bounds: tuple[int, ...]

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
    """State to whom the rows belong that modules see inside the block.

    The single-pass gradients read it; without them it has no effect.
    """
    token = _current.set(rows)
    try:
        yield
    finally:
        _current.reset(token)


def current_segment_rows() -> SegmentRows | None:
    """The innermost statement made by `segment_rows`."""
    return _current.get()
