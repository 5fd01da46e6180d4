"""What the loop must know about the kind of data it learns from: text, images, or another.

A domain makes the batch of any step, puts a batch through the body and its heads, and reads splits to be scored.
The steps, the methods, the store and the tables are the same for all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from aang_ray.model.segments import SegmentRows
from aang_ray.train.evaluate import Reader


class DomainSegment(Protocol):
    """One segment's examples in a step's batch."""

    @property
    def name(self) -> str:
        """As losses are logged."""
        ...

    @property
    def texts(self) -> int:
        """Examples."""
        ...

    @property
    def normaliser(self) -> float:
        """Labels (or the sum of their weights) that the segment's mean loss is divided by."""
        ...


class DomainBatch(Protocol):
    """All segments of a step: dev (empty unless asked for), end task, sampled objectives."""

    @property
    def step(self) -> int: ...

    @property
    def sampled(self) -> tuple[int, ...]:
        """Indices into the space."""
        ...

    @property
    def shares(self) -> tuple[float, ...]:
        """b / B of each sampled objective in `published` allocation, else 1."""
        ...

    @property
    def segments(self) -> tuple[Any, ...]:
        """`DomainSegment`s."""
        ...


class DomainPiece(Protocol):
    """A part of a batch that goes through the body in one forward pass."""

    @property
    def tokens(self) -> SegmentRows:
        """Whose are the rows that the body computes."""
        ...

    @property
    def real_tokens(self) -> int:
        """Rows that are no padding."""
        ...

    def to(self, device: torch.device) -> Self: ...

    def pin(self) -> Self: ...


class Domain(Protocol):
    """Batches and passes of one end task."""

    head_refit_every: int
    """Steps between fits of the dev head."""
    follows_factors: bool
    """Whether `batch` needs the method's factors."""

    def batch(self, step: int, with_dev: bool, factors: Mapping[str, npt.NDArray[np.float64]] | None) -> DomainBatch:
        """The segments of a step: a pure function of (seed, step, factors)."""
        ...

    def pieces(self, batch: Any, micro: int, per_segment: bool) -> tuple[Any, ...]:
        """A batch cut along its segments into pieces of at most `micro` examples, dev first."""
        ...

    def probe(self, batch: Any, examples: int) -> Any:
        """A piece of so many copies of the batch's largest example, to measure memory with."""
        ...

    def dev_head_piece(self, step: int) -> Any:
        """The examples that phi* is fitted on at this step."""
        ...

    def losses(self, piece: Any, heads: Mapping[str, nn.Module]) -> Tensor:
        """The piece's share of every segment's unweighted mean loss, [S]."""
        ...

    def features(self, piece: Any) -> tuple[Tensor, Tensor]:
        """What the end-task head reads, [E, H], and the labels [E], of a `dev_head_piece` on the device."""
        ...

    def reader(self, split: str) -> Reader:
        """`dev` (the examples that decide) or `test`, to be scored many times."""
        ...
