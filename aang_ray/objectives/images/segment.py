"""The images of one segment of a step, corrupted and labelled: host arrays."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import numpy.typing as npt

Int64 = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class ImageSegment:
    """A segment's images. Suffixes: E images, H height, W width.

    Exactly one of (`classes_E`, `clean_EHW`) is the label: one class for each image, or its pixels.
    """

    name: str
    head: str
    """Which head reads it."""
    pixels_EHW: Floats
    """What the body sees."""
    classes_E: Int64 | None
    weights_E: Floats
    """Weight of each label in the segment's mean loss."""
    clean_EHW: Floats | None = None
    """The pixels before they were corrupted, to be restored."""
    normaliser: float = 0.0
    """Sum of `weights_E` over the whole segment at this step: the mean's denominator."""

    @property
    def texts(self) -> int:
        """Images: what a text is to a segment of texts."""
        return len(self.pixels_EHW)

    @property
    def lengths_E(self) -> Int64:
        """Rows of the body of each image: one."""
        return np.ones(self.texts, dtype=np.int64)

    def part(self, start: int, stop: int) -> Self:
        """Images start to stop, with the whole segment's normaliser."""
        return replace(
            self,
            pixels_EHW=self.pixels_EHW[start:stop],
            classes_E=None if self.classes_E is None else self.classes_E[start:stop],
            weights_E=self.weights_E[start:stop],
            clean_EHW=None if self.clean_EHW is None else self.clean_EHW[start:stop],
        )
