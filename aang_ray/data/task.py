"""An end task as the rest of the program sees it: tokens, labels, metric, splits, unlabelled text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Metric = Literal["accuracy", "macro_f1"]
Corpus = Literal["in_domain", "out_of_domain", "neural_lm"]


@dataclass(frozen=True)
class Ragged:
    """N token sequences of different lengths, memory-mapped and read-only.

    Sequence i is `values[offsets[i]:offsets[i + 1]]`; special tokens are included.
    """

    values: npt.NDArray[np.int32]
    offsets: npt.NDArray[np.int64]
    capitals: npt.NDArray[np.bool_] | None = None
    """Of every value: whether its first letter in the raw text is upper-case, whatever the tokenizer makes of it."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> npt.NDArray[np.int32]:
        return self.values[self.offsets[index] : self.offsets[index + 1]]

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        return np.diff(self.offsets)

    def take(self, indices: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
        """The chosen sequences end to end, and their lengths."""
        return self.values[self._places(indices)], self.offsets[indices + 1] - self.offsets[indices]

    def take_capitals(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_] | None:
        """`capitals` of the chosen sequences end to end."""
        return None if self.capitals is None else self.capitals[self._places(indices)]

    def _places(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        starts = self.offsets[indices]
        lengths = self.offsets[indices + 1] - starts
        ends = np.cumsum(lengths)
        within = np.arange(int(ends[-1]) if len(ends) else 0) - np.repeat(ends - lengths, lengths)
        places: npt.NDArray[np.int64] = np.repeat(starts, lengths) + within
        return places


@dataclass(frozen=True)
class Labelled:
    """A split: tokens and the index of each text's label in the sorted label set."""

    tokens: Ragged
    labels: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: npt.NDArray[np.int64]) -> Labelled:
        """The chosen texts, in memory."""
        values, lengths = self.tokens.take(indices)
        ragged = Ragged(values, np.concatenate(([0], np.cumsum(lengths))), self.tokens.take_capitals(indices))
        return Labelled(ragged, self.labels[indices])


@dataclass(frozen=True)
class External:
    """Another data set, whose labels serve as an auxiliary objective."""

    label_names: tuple[str, ...]
    train: Labelled


@dataclass(frozen=True)
class EndTask:
    """Everything that a run reads of its end task."""

    name: str
    label_names: tuple[str, ...]
    """The sorted label set, frozen in the manifest and stated to the metric."""
    metric: Metric
    train: Labelled
    dev: Labelled
    test: Labelled
    test_clean: npt.NDArray[np.int64]
    """Indices of the test texts that occur neither in train nor in dev."""
    corpora: Mapping[Corpus, Ragged]
    """Unlabelled text by kind; a kind that was not given is absent."""
    class_weights: npt.NDArray[np.float32] | None
    """Weight of each class in the end-task loss, or None for equal ones."""
    external: Mapping[str, External] = field(default_factory=dict)
    """Other data sets by name."""
    manifest: Mapping[str, Any] = field(default_factory=dict)
    """What was read, how it was split, what was truncated: JSON values."""
