"""The examples of one segment of a step, corrupted, ranked and labelled: host arrays, texts end to end."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from aang_ray.objectives.transforms import Int32, Int64


@dataclass(frozen=True)
class Segment:
    """A segment's texts. Suffixes: T tokens, E texts, M labelled positions.

    Exactly one of (`targets_M`, `classes_E`) is the label: tokens of the vocabulary at positions, or
    one class for each text.
    """

    name: str
    head: str
    """Which head reads it."""
    ids_T: Int32
    positions_T: Int64
    ranks_T: Int32
    key_ranks_T: Int32
    lengths_E: Int64
    labelled_M: Int64
    """Labelled positions, as indices into the T axis, ascending."""
    targets_M: Int32
    """Token ids to be predicted there."""
    classes_E: Int64 | None
    """Class of each text where the label is one of the text."""
    representation: str | None = None
    """R of the objective; None for the end task and dev, which have none."""
    normaliser: float = 0.0
    """Sum of the label weights over the whole segment at this step: the mean's denominator."""

    @property
    def texts(self) -> int:
        return len(self.lengths_E)

    def part(self, start: int, stop: int) -> Segment:
        """Texts start to stop, with the whole segment's normaliser."""
        ends = np.concatenate(([0], np.cumsum(self.lengths_E)))
        tokens = slice(int(ends[start]), int(ends[stop]))
        chosen = (self.labelled_M >= tokens.start) & (self.labelled_M < tokens.stop)
        return replace(
            self,
            ids_T=self.ids_T[tokens],
            positions_T=self.positions_T[tokens],
            ranks_T=self.ranks_T[tokens],
            key_ranks_T=self.key_ranks_T[tokens],
            lengths_E=self.lengths_E[start:stop],
            labelled_M=self.labelled_M[chosen] - tokens.start,
            targets_M=self.targets_M[chosen],
            classes_E=None if self.classes_E is None else self.classes_E[start:stop],
        )


def label_weight(segment: Segment, class_weights_C: npt.NDArray[np.float32] | None) -> float:
    """Sum of the label weights of a segment, or of part of one: its normaliser where it is whole."""
    if segment.classes_E is None:
        return float(len(segment.labelled_M))
    return float(segment.texts if class_weights_C is None else class_weights_C[segment.classes_E].sum())
