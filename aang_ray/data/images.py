"""An end task of images as the rest of the program sees it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from aang_ray.data.task import Metric

Pixels = npt.NDArray[np.float32]


@dataclass(frozen=True)
class LabelledImages:
    """A split of N grey images with two classes each: the end task's, and another that the image also shows."""

    pixels_NHW: Pixels
    """From 0 to 1."""
    labels: npt.NDArray[np.int64]
    others: npt.NDArray[np.int64]
    """The other class: the label of the auxiliary output `other-digit`."""

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: npt.NDArray[np.int64]) -> Self:
        """The chosen images."""
        return type(self)(self.pixels_NHW[indices], self.labels[indices], self.others[indices])


@dataclass(frozen=True)
class ImageTask:
    """Everything that a run reads of its end task."""

    name: str
    label_names: tuple[str, ...]
    metric: Metric
    train: LabelledImages
    dev: LabelledImages
    test: LabelledImages
    test_clean: npt.NDArray[np.int64]
    """Indices of the test images that occur neither in train nor in dev."""
    class_weights: npt.NDArray[np.float32] | None
    """Weight of each class in the end-task loss, or None for equal ones."""
    manifest: Mapping[str, Any] = field(default_factory=dict)
    """How the images were made: JSON values."""

    @property
    def height(self) -> int:
        return int(self.train.pixels_NHW.shape[1])

    @property
    def width(self) -> int:
        return int(self.train.pixels_NHW.shape[2])
