"""Assignment of a tensor's rows to the segments of a batch, and dataclasses of tensors that move to a device.

A batch is divided into *segments*: the dev batch, the end task's examples, and the examples of each sampled
objective. What a row is depends on the tensor: a token for the body, a labelled position for a vocabulary head, a
text for a head on pooled vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor, nn


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


def per_row(values_S: Tensor, rows: SegmentRows) -> Tensor:
    """Return for each row the value of its segment, [N], without waiting for the device."""
    lengths = torch.tensor([b - a for a, b in zip(rows.bounds, rows.bounds[1:], strict=False)])
    return values_S.repeat_interleave(lengths.to(values_S.device, non_blocking=True), output_size=rows.rows)


@dataclass(frozen=True)
class PassUpdate:
    """What the backward pass that follows is for: it adds sum_s c_s g_s to `.grad`.

    A module that knows this in the forward pass can compute its own part of that sum there (`heads.Decoder`).
    """

    coefficients_S: Tensor
    """c_s."""
    hooked: Container[nn.Parameter] | None = None
    """The parameters of which hooks need nothing but that sum. They take it from the graph's node, while autograd
    leaves these parameters out. None: autograd computes the sum."""

    def sums(self, tensor: Tensor) -> bool:
        """Return whether a module should compute the sum of one of its tensors."""
        if self.hooked is None:
            return tensor.requires_grad
        return not tensor.requires_grad and tensor in self.hooked


_update: ContextVar[PassUpdate | None] = ContextVar("pass_update", default=None)


@contextmanager
def pass_update(update: PassUpdate) -> Iterator[None]:
    """Announce to modules that are called inside the block what the backward pass will add up."""
    token = _update.set(update)
    try:
        yield
    finally:
        _update.reset(token)


def current_pass_update() -> PassUpdate | None:
    """Return what the innermost `pass_update` block announces; None outside of any block."""
    return _update.get()
