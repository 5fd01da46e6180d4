"""What the loop must know about the kind of data it learns from: text, images, or another.

A domain makes the batch of any step, puts a batch through the body and its heads, and reads splits to be scored.
The steps, the methods, the store and the tables are the same for all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from aang_ray.config.run import RunConfig
from aang_ray.data.tasks import Metric
from aang_ray.model.segments import SegmentRows
from aang_ray.objectives.space import Space
from aang_ray.train.evaluate import Reader


class LabelledSplit(Protocol):
    """Examples with a class each."""

    @property
    def labels(self) -> npt.NDArray[np.int64]: ...

    def __len__(self) -> int: ...


class Task(Protocol):
    """An end task, whatever its examples are."""

    @property
    def name(self) -> str: ...

    @property
    def label_names(self) -> tuple[str, ...]: ...

    @property
    def metric(self) -> Metric: ...

    @property
    def train(self) -> LabelledSplit: ...

    @property
    def dev(self) -> LabelledSplit: ...

    @property
    def test(self) -> LabelledSplit: ...

    @property
    def test_clean(self) -> npt.NDArray[np.int64]:
        """Indices of the test examples that occur neither in train nor in dev."""
        ...

    @property
    def class_weights(self) -> npt.NDArray[np.float32] | None:
        """Weight of each class in the end-task loss, or None for equal ones."""
        ...


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

    def costs(self, batch: Any) -> tuple[npt.NDArray[np.int64], ...]:
        """Rows of the body that each example of each segment takes."""
        ...

    def chosen(self, number: int, end_task: bool, objectives: Sequence[int]) -> DomainBatch:
        """Batch number so-and-so of objectives (indices into the space) that are read in turn: see `ExampleSchedule.chosen`.

        Without the end task its segment is empty; the dev segment always is.
        """
        ...

    def size(self, objective: int) -> int:
        """Examples of the data that an objective of the space reads."""
        ...

    def pieces(
        self, batch: Any, micro: int, per_segment: bool, ranges: Sequence[tuple[int, int]] | None = None
    ) -> tuple[Any, ...]:
        """A batch cut along its segments into pieces of at most `micro` examples, dev first.

        With `ranges`, [S], only these examples of each segment; what a piece holds stays what it is in the whole batch.
        """
        ...

    def entries_read(self, batch: Any, ranges: Sequence[tuple[int, int]]) -> npt.NDArray[np.int64]:
        """Entries that these examples of each segment look up in a table that heads use as decoder, each once."""
        ...

    def label_weights(self, segments: Sequence[Any]) -> tuple[float, ...]:
        """Sum of the label weights of the examples that each segment, or part of one, holds."""
        ...

    def probe(self, batch: Any, examples: int) -> Any:
        """A piece of so many copies of the batch's largest example, to measure memory with."""
        ...

    def dev_head_piece(self, step: int) -> Any:
        """The examples that phi* is fitted on at this step."""
        ...

    def end_task_pieces(self, split: str, examples: npt.NDArray[np.int64], micro: int) -> tuple[Any, ...]:
        """Examples of `train` or `dev` with their labels, as `features` reads them, at most `micro` in a piece."""
        ...

    def losses(self, piece: Any, heads: Mapping[str, nn.Module]) -> Tensor:
        """The piece's share of every segment's unweighted mean loss, [S]."""
        ...

    def features(self, piece: Any) -> tuple[Tensor, Tensor]:
        """What the end-task head reads, [E, H], and the labels [E], of a piece of labelled examples on the device."""
        ...

    def reader(self, split: str, first: int = 0, every: int = 1) -> Reader:
        """`dev` (the examples that decide) or `test`, or every so many of their examples, to be scored many times."""
        ...


StageParts = Callable[[RunConfig], tuple[Space | None, Domain]]
"""Space and domain of another stage of the same run: the same task and body under another configuration."""


@dataclass(frozen=True)
class DomainParts:
    """What a kind of data brings to a run."""

    task: Task
    encoder: nn.Module
    """The shared body, on the device."""
    head_of: dict[str, nn.Module]
    """phi_E and the heads of the outputs, by name."""
    space: Space | None
    domain: Domain
    stage: StageParts
