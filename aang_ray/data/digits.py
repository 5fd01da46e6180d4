"""Superimposed digits: which digit stands at the upper left, or at the lower right, of two that overlap.

As MultiMNIST (Sabour et al. 2017; with two labels Sener and Koltun 2018), made from the 1,797 handwritten digits of
8 x 8 pixels that scikit-learn ships (Alpaydin and Kaynak 1998, UCI). The digits are split first and paired within
their split, so that no digit image stands in two splits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Final, Self

import numpy as np
import numpy.typing as npt

from aang_ray.config import DataConfig
from aang_ray.data.cache import content_key
from aang_ray.data.load import balanced_weights
from aang_ray.data.read import SPLITS, Split
from aang_ray.data.splits import Indices, nested_subset, split_one
from aang_ray.data.tasks import Metric, card_named

# --- data.images: An end task of images as the rest of the program sees it.


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


# Counts in the fingerprint: to be raised when anything below changes what comes out.
RECIPE = 1
CANVAS: Final = 12
"""Height and width in pixels: digits of 8 x 8 at opposite corners overlap in 4 x 4 pixels or more."""
JITTER: Final = 1
"""A digit stands up to so many pixels nearer to the middle, down and across."""
PAIRS: Final[dict[Split, int]] = {"train": 2048, "dev": 1024, "test": 2048}
_METHOD = "digits stratified by class and split by SHA-256(seed, image); pairs drawn within each split"


def load_digit_pairs(data: DataConfig) -> ImageTask:
    """The task that `data.task` names: `digits-left` or `digits-right`.

    `split_seed`, `dev_fraction` and `test_fraction` split the digits, `train_size` keeps so many train pairs.

    Raises:
        UserError: for fractions or a `train_size` that are not possible.
    """
    card = card_named(data.task)
    if card is None or not card.images:
        raise ValueError(f"{data.task} is no task of digits")
    splits = _pairs(data.dev_fraction, data.test_fraction, data.split_seed)
    if card.name == "digits-right":
        splits = {name: LabelledImages(split.pixels_NHW, split.others, split.labels) for name, split in splits.items()}
    if data.train_size is not None:
        train = splits["train"]
        splits = splits | {"train": train.take(nested_subset(train.labels, data.train_size, data.split_seed))}
    test = splits["test"]
    weights = balanced_weights(splits["train"].labels, 10) if data.class_weights == "balanced" else None
    return ImageTask(
        name=card.name,
        label_names=tuple(str(digit) for digit in range(10)),
        metric=data.metric or card.metric,
        train=splits["train"],
        dev=splits["dev"],
        test=test,
        test_clean=np.arange(len(test)),  # its digits are in no other split
        class_weights=weights,
        manifest={"split": {"method": _METHOD, "seed": data.split_seed}, "source": "sklearn.datasets.load_digits"},
    )


def digits_fingerprint(data: DataConfig) -> str:
    """Hash of the digits that scikit-learn ships, of the recipe, and of the task's name."""
    pixels_NHW, labels_N = _digits()
    card = card_named(data.task)
    digest = hashlib.sha256(pixels_NHW.tobytes() + labels_N.tobytes()).hexdigest()
    return content_key({"kind": "digits", "card": card.name if card else None, "made": [digest, RECIPE]})


def superimpose(left_NHW: Pixels, right_NHW: Pixels, shifts_N4: npt.NDArray[np.int64]) -> Pixels:
    """Each left digit at the upper left corner and each right one at the lower right, the brighter pixel seen.

    `shifts_N4`: how far the left digit is moved down and right, and the right one up and left.
    """
    count, size = len(left_NHW), left_NHW.shape[1]
    canvas_NHW = np.zeros((count, CANVAS, CANVAS), dtype=np.float32)
    place = np.arange(size)
    image = np.arange(count)[:, None, None]
    far = CANVAS - size
    for digits_NHW, rows_N, columns_N in (
        (left_NHW, shifts_N4[:, 0], shifts_N4[:, 1]),
        (right_NHW, far - shifts_N4[:, 2], far - shifts_N4[:, 3]),
    ):
        at = (image, rows_N[:, None, None] + place[:, None], columns_N[:, None, None] + place)
        canvas_NHW[at] = np.maximum(canvas_NHW[at], digits_NHW)
    return canvas_NHW


def split_digits(dev_fraction: float, test_fraction: float, seed: int) -> dict[Split, Indices]:
    """Indices of the digits of each split."""
    pixels_NHW, labels_N = _digits()
    keys = [image.tobytes().hex() for image in pixels_NHW]
    parts = split_one(keys, [str(label) for label in labels_N], dev_fraction, test_fraction, seed)
    return dict(zip(SPLITS, parts, strict=True))


@lru_cache(maxsize=1)
def _digits() -> tuple[Pixels, npt.NDArray[np.int64]]:
    from sklearn.datasets import load_digits  # here: it takes a second to import

    digits = load_digits()
    return (digits.images / 16).astype(np.float32), digits.target.astype(np.int64)


@lru_cache(maxsize=4)
def _pairs(dev_fraction: float, test_fraction: float, seed: int) -> dict[Split, LabelledImages]:
    """Labels are the left digits; runs of one process share the arrays, which nothing writes to."""
    pixels_NHW, labels_N = _digits()
    parts = split_digits(dev_fraction, test_fraction, seed)
    splits: dict[Split, LabelledImages] = {}
    for number, split in enumerate(SPLITS):
        rng = np.random.default_rng([seed, number])
        left_N, right_N = rng.choice(parts[split], (2, PAIRS[split]))
        shifts_N4 = rng.integers(0, JITTER, (PAIRS[split], 4), endpoint=True)
        canvas_NHW = superimpose(pixels_NHW[left_N], pixels_NHW[right_N], shifts_N4)
        splits[split] = LabelledImages(canvas_NHW, labels_N[left_N], labels_N[right_N])
    return splits
