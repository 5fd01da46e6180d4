"""The examples of one segment of a step, corrupted, ranked and labelled: host arrays, texts end to end."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from aang_ray.objectives.texts import Float32, Float64, Int32, Int64, Vocabulary


@dataclass(frozen=True)
class Drawn:
    """Tokens in whose place the denoise head's samples are put, on the device. Suffix: G such tokens."""

    at_G: Int64
    """Indices into the segment's T axis, ascending; the ids there are the originals."""
    uniform_G: Float64
    """The number in [0, 1) that chooses each sample."""
    vocabulary: Vocabulary


def _nowhere() -> Int64:
    return np.zeros(0, dtype=np.int64)


def _no_labels() -> npt.NDArray[Any]:
    return np.zeros(0, dtype=np.int32)


def _no_noise() -> Float32:
    return np.zeros((0, 0), dtype=np.float32)


@dataclass(frozen=True)
class Segment:
    """A segment's texts. Suffixes: T tokens, E texts, M labelled positions, N noised tokens, W width of embeddings.

    Exactly one of (`targets_M`, `classes_E`) is the label: one a position, or one a text. Integer labels
    are classes or token ids, real ones are values.
    """

    name: str
    head: str
    """Which head reads it."""
    ids_T: Int32
    positions_T: Int64
    ranks_T: Int32
    key_ranks_T: Int32
    lengths_E: Int64
    labelled_M: Int64 = field(default_factory=_nowhere)
    """Labelled positions, as indices into the T axis, ascending."""
    targets_M: npt.NDArray[Any] = field(default_factory=_no_labels)
    """What is to be predicted there: [M] or [M, C]."""
    classes_E: npt.NDArray[Any] | None = None
    """Label of each text where the label is one of the text."""
    representation: str | None = None
    """R of the objective; None for the end task and dev, which have none."""
    normaliser: float = 0.0
    """Sum of the label weights over the whole segment at this step: the mean's denominator."""
    weighted: bool = True
    """Whether `classes_E` are the end task's classes, which may have weights."""
    noised_N: Int64 = field(default_factory=_nowhere)
    """Tokens whose embeddings get noise, as indices into the T axis, ascending."""
    noise_NW: Float32 = field(default_factory=_no_noise)
    drawn: Drawn | None = None

    @property
    def texts(self) -> int:
        return len(self.lengths_E)

    def part(self, start: int, stop: int) -> Segment:
        """Texts start to stop, with the whole segment's normaliser."""
        ends = np.concatenate(([0], np.cumsum(self.lengths_E)))
        tokens = slice(int(ends[start]), int(ends[stop]))
        labels = _between(self.labelled_M, tokens)
        noised = _between(self.noised_N, tokens)
        drawn = self.drawn
        if drawn is not None:
            chosen = _between(drawn.at_G, tokens)
            drawn = replace(drawn, at_G=drawn.at_G[chosen] - tokens.start, uniform_G=drawn.uniform_G[chosen])
        return replace(
            self,
            ids_T=self.ids_T[tokens],
            positions_T=self.positions_T[tokens],
            ranks_T=self.ranks_T[tokens],
            key_ranks_T=self.key_ranks_T[tokens],
            lengths_E=self.lengths_E[start:stop],
            labelled_M=self.labelled_M[labels] - tokens.start,
            targets_M=self.targets_M[labels],
            classes_E=None if self.classes_E is None else self.classes_E[start:stop],
            noised_N=self.noised_N[noised] - tokens.start,
            noise_NW=self.noise_NW[noised],
            drawn=drawn,
        )


def label_weight(segment: Segment, class_weights_C: npt.NDArray[np.float32] | None) -> float:
    """Sum of the label weights of a segment, or of part of one: its normaliser where it is whole."""
    if segment.classes_E is None:
        return float(len(segment.labelled_M))
    if class_weights_C is None or not segment.weighted:
        return float(segment.texts)
    return float(class_weights_C[segment.classes_E].sum())


def _between(indices: Int64, tokens: slice) -> slice:
    """Which of ascending indices lie in a range."""
    first, last = np.searchsorted(indices, (tokens.start, tokens.stop))
    return slice(int(first), int(last))
