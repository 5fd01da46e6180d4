"""The interface between training and a kind of data, such as text or images.

A domain makes the batch of any step, computes the losses of a batch, and reads the splits that are scored. To add one,
write a module with a `DomainKind` named `DOMAIN` and add a line to `DOMAINS`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from aang_ray.config.run import RunConfig
from aang_ray.config.sections import DataConfig
from aang_ray.data.modalities import modality_of
from aang_ray.data.tasks import Int64, LabelledSplit, Task
from aang_ray.errors import UserError
from aang_ray.model.segments import SegmentRows
from aang_ray.objectives.sampling import SourceSettings
from aang_ray.objectives.source import SegmentBatch, StepSource
from aang_ray.objectives.space import Space
from aang_ray.train.evaluate import Reader

DOMAINS = {"text": "aang_ray.train.text", "images": "aang_ray.train.images"}
"""The module of each domain, by the modality of its tasks. It is imported when a task of the domain is used."""

DomainBatch = SegmentBatch[Any]
"""The segments of a step: dev (empty unless asked for), end task, sampled objectives.

Every segment has a `name` (the key of its loss in the log), `examples` (its size), `lengths_E` (number of
rows in the body of each example), `normaliser` (number of labels, or sum of their weights, by which the loss is
divided) and `part(start, stop)` (the segment with these examples only).
"""


class DomainPiece(Protocol):
    """A part of a batch that goes through the body in one forward pass."""

    @property
    def tokens(self) -> SegmentRows:
        """The segment of each row that the body computes."""
        ...

    @property
    def real_tokens(self) -> int:
        """Number of rows that are not padding."""
        ...

    def to(self, device: torch.device) -> Self: ...

    def pin(self) -> Self: ...


class Domain(ABC):
    """Batches and forward passes of one end task. `source` makes the segments of each step."""

    def __init__(self, source: StepSource[Any], settings: SourceSettings) -> None:
        self.source = source
        self.head_refit_every = settings.head_refit_every
        """Steps between two fits of the dev head."""
        self.follows_factors = settings.published_allocation
        """Whether `batch` needs the method's factors."""

    def batch(self, step: int, with_dev: bool, factors: Mapping[str, npt.NDArray[np.float64]] | None) -> DomainBatch:
        """Return the segments of a step, a pure function of (seed, step, factors)."""
        return self.source.step(step, with_dev, factors)

    def tokens(self, batch: DomainBatch) -> int:
        """Return the number of rows in the body of all examples, without padding."""
        return sum(int(segment.lengths_E.sum()) for segment in batch.segments)

    @abstractmethod
    def pieces(
        self, batch: DomainBatch, micro: int, per_segment: bool, ranges: Sequence[tuple[int, int]] | None = None
    ) -> tuple[Any, ...]:
        """Cut a batch into pieces, each for one forward pass. Segments keep their order, dev first.

        Args:
            batch: The segments of a step.
            micro: Maximum number of examples in a piece.
            per_segment: Whether a piece holds examples of one segment only.
            ranges: The examples [start, stop) of each segment to use, [S]; None for all.
        """

    @abstractmethod
    def entries_read(self, batch: DomainBatch, ranges: Sequence[tuple[int, int]]) -> Int64:
        """Return the distinct entries that examples look up in a table that is also used as decoder."""

    @abstractmethod
    def label_weights(self, segments: Sequence[Any]) -> tuple[float, ...]:
        """Return the sum of the label weights of each segment or part of a segment."""

    @abstractmethod
    def probe(self, batch: DomainBatch, examples: int) -> Any:
        """Return a piece of `examples` copies of the batch's largest example, for measuring memory."""

    @abstractmethod
    def dev_head_piece(self, step: int) -> Any:
        """Return a piece with the examples on which the dev head phi* is fitted at this step."""

    @abstractmethod
    def end_task_pieces(self, split: str, examples: Int64, micro: int) -> tuple[Any, ...]:
        """Return examples of `train` or `dev` with labels as pieces of at most `micro` examples for `features`."""

    @abstractmethod
    def losses(self, piece: Any, heads: Mapping[str, nn.Module]) -> Tensor:
        """Return the part of a piece on the device of every segment's mean loss, [S], before the method's weights."""

    @abstractmethod
    def features(self, piece: Any) -> tuple[Tensor, Tensor]:
        """Return the features [E, H] for the end-task head and the labels [E] of a piece on the device."""

    @abstractmethod
    def reader(self, split: str, first: int = 0, every: int = 1) -> Reader:
        """Return a reader of `dev` (the examples for model selection) or of `test`: of every `every`-th example."""


StageParts = Callable[[RunConfig], tuple[Space | None, Domain]]
"""Returns space and domain for the configuration of another stage, with the same task and body."""


@dataclass
class DomainParts:
    """The parts of a run that its domain makes."""

    task: Task[LabelledSplit]
    encoder: nn.Module
    """The shared body, on the device."""
    head_of: dict[str, nn.Module]
    """phi_E and the heads of the outputs, by name."""
    space: Space | None
    """None for a method that trains on the end task alone."""
    domain: Domain
    stage: StageParts


@dataclass(frozen=True)
class DomainKind:
    """How runs of a domain are checked, named and built."""

    build: Callable[[RunConfig, torch.device], DomainParts]
    """Loads the task and makes body, heads and batches of a resolved configuration."""
    check: Callable[[RunConfig], None]
    """Raises `UserError` for settings that mean nothing in this domain."""
    encoder_fingerprint: Callable[[RunConfig], str]
    """Returns a hash of the body that a run starts from."""
    examples: Callable[[RunConfig], int]
    """Returns the number of examples in an epoch: train examples plus in-domain texts."""
    encoders: frozenset[str] = frozenset()
    """Values of `encoder.name` that select a body of this domain."""
    exports: bool = False
    """Whether `train.export` can write its classifiers."""


def domain_of(data: DataConfig) -> DomainKind:
    """Return the domain of an end task."""
    return _kind(modality_of(data))


def check_domain(config: RunConfig) -> None:
    """Raise `UserError` if encoder or settings do not fit the domain of the end task."""
    own = modality_of(config.data)
    for other in DOMAINS:
        if other != own and config.encoder.name in _kind(other).encoders:
            task = config.data.task
            raise UserError(f"encoder.name: {config.encoder.name} reads {other}; {task} is a task of {own}")
    _kind(own).check(config)


def _kind(modality: str) -> DomainKind:
    kind: DomainKind = import_module(DOMAINS[modality]).DOMAIN
    return kind
