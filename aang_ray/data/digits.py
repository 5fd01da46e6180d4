"""End tasks of superimposed digits: which digit is at the upper left, or at the lower right, of two that overlap.

They are made like MultiMNIST (Sabour et al. 2017; with two labels Sener and Koltun 2018) from the 1,797 handwritten
digits of 8 x 8 pixels that scikit-learn ships (Alpaydin and Kaynak 1998, UCI). The digits are split first and paired
within their split, so that no digit image is in two splits.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Final, Self

import numpy as np
import numpy.typing as npt

from aang_ray.config import DataConfig
from aang_ray.data.cache import content_key
from aang_ray.data.describe import count_table
from aang_ray.data.read import SPLITS, Split
from aang_ray.data.splits import Indices, nested_subset, split_one
from aang_ray.data.tasks import Card, Task, balanced_weights, card_named, content_digest, metric_of, register_cards

if TYPE_CHECKING:
    from rich.console import Console

Pixels = npt.NDArray[np.float32]

IMAGES: Final = "images"
"""The modality of end tasks whose examples are images."""
RECIPE = 1
"""Version of how the images are made; counts in the fingerprint. Raise it when a change makes other images."""
CANVAS: Final = 12
"""Height and width in pixels: the digits overlap in 4 x 4 pixels or more."""
JITTER: Final = 1
"""A digit is moved towards the middle by at most this many pixels, down and across."""
PAIRS: Final[dict[Split, int]] = {"train": 2048, "dev": 1024, "test": 2048}
_METHOD = "digits stratified by class and split by SHA-256(seed, image); pairs drawn within each split"
# Printed images: a character for each brightness, and how many images.
_SHADES = " .:-=+*#%@"
_SHOWN = 4

register_cards(
    [
        Card(
            f"digits-{side}",
            "superimposed digits",
            "accuracy",
            10,
            "Alpaydin & Kaynak 1998 (UCI), paired as in MultiMNIST",
            "made from the digits that scikit-learn ships",
            batch_end_task=256,
            modality=IMAGES,
        )
        for side in ("left", "right")
    ],
    {"digits": "digits-left"},
)


@dataclass(frozen=True)
class LabelledImages:
    """A split of N grey images with two classes each: that of the end task, and that of the other digit."""

    pixels_NHW: Pixels
    """From 0 to 1."""
    labels: npt.NDArray[np.int64]
    others: npt.NDArray[np.int64]
    """Class of the other digit: the label of the auxiliary output `other-digit`, [N]."""

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: npt.NDArray[np.int64]) -> Self:
        return type(self)(self.pixels_NHW[indices], self.labels[indices], self.others[indices])

    def digests(self, indices: npt.NDArray[np.int64]) -> list[str]:
        """Return a hash of the pixels of each chosen image."""
        return [content_digest(pixels) for pixels in self.pixels_NHW[indices]]


@dataclass(frozen=True)
class ImageTask(Task[LabelledImages]):
    """Everything that a run reads of an end task of images."""

    unlabelled: LabelledImages
    """Train images that `data.train_size` leaves out. Their labels are not there: all are -1."""

    @property
    def height(self) -> int:
        return int(self.train.pixels_NHW.shape[1])

    @property
    def width(self) -> int:
        return int(self.train.pixels_NHW.shape[2])


def load_digit_pairs(data: DataConfig) -> ImageTask:
    """Make the task that `data.task` names: `digits-left` or `digits-right`.

    Raises:
        UserError: if the fractions of the splits or `data.train_size` are not possible.
    """
    card = card_named(data.task)
    assert card is not None
    splits = _pairs(data.dev_fraction, data.test_fraction, data.split_seed)
    if card.name == "digits-right":
        splits = {name: LabelledImages(split.pixels_NHW, split.others, split.labels) for name, split in splits.items()}
    train = splits["train"]
    kept = np.arange(len(train))
    if data.train_size is not None:
        kept = nested_subset(train.labels, data.train_size, data.split_seed)
        splits = splits | {"train": train.take(kept)}
    left_NHW = train.pixels_NHW[np.setdiff1d(np.arange(len(train)), kept)]
    no_label = np.full(len(left_NHW), -1, dtype=np.int64)
    test = splits["test"]
    weights = balanced_weights(splits["train"].labels, 10) if data.class_weights == "balanced" else None
    return ImageTask(
        name=card.name,
        label_names=tuple(str(digit) for digit in range(10)),
        metric=metric_of(data),
        train=splits["train"],
        dev=splits["dev"],
        test=test,
        test_clean=np.arange(len(test)),  # its digits are in no other split
        class_weights=weights,
        unlabelled=LabelledImages(left_NHW, no_label, no_label),
        manifest={"split": {"method": _METHOD, "seed": data.split_seed}, "source": "sklearn.datasets.load_digits"},
    )


def digits_fingerprint(data: DataConfig) -> str:
    """Return a hash of the digits that scikit-learn ships, of the recipe, and of the task's name."""
    pixels_NHW, labels_N = _digits()
    card = card_named(data.task)
    digest = hashlib.sha256(pixels_NHW.tobytes() + labels_N.tobytes()).hexdigest()
    return content_key({"kind": "digits", "card": card.name if card else None, "made": [digest, RECIPE]})


@lru_cache(maxsize=1)
def _digits() -> tuple[Pixels, npt.NDArray[np.int64]]:
    from sklearn.datasets import load_digits  # late: takes a second to import

    digits = load_digits()
    return (digits.images / 16).astype(np.float32), digits.target.astype(np.int64)


@lru_cache(maxsize=4)
def _pairs(dev_fraction: float, test_fraction: float, seed: int) -> dict[Split, LabelledImages]:
    """Return the pairs of each split, labelled by the left digits; runs of one process share them, read only."""
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


def split_digits(dev_fraction: float, test_fraction: float, seed: int) -> dict[Split, Indices]:
    """Return the indices of the digits of each split; arguments as of `split_one`."""
    pixels_NHW, labels_N = _digits()
    keys = [image.tobytes().hex() for image in pixels_NHW]
    parts = split_one(keys, [str(label) for label in labels_N], dev_fraction, test_fraction, seed)
    return dict(zip(SPLITS, parts, strict=True))


def superimpose(left_NHW: Pixels, right_NHW: Pixels, shifts_N4: npt.NDArray[np.int64]) -> Pixels:
    """Draw pairs of digits on one canvas each, [N, `CANVAS`, `CANVAS`]; where they overlap, the brighter pixel counts.

    Shifts tell by how many pixels the left digit is moved down and right, and the right digit up and left.
    """
    count, size = len(left_NHW), left_NHW.shape[1]
    canvas_NHW = np.zeros((count, CANVAS, CANVAS), dtype=np.float32)
    within = np.arange(size)
    image = np.arange(count)[:, None, None]
    far = CANVAS - size
    for digits_NHW, rows_N, columns_N in (
        (left_NHW, shifts_N4[:, 0], shifts_N4[:, 1]),
        (right_NHW, far - shifts_N4[:, 2], far - shifts_N4[:, 3]),
    ):
        at = (image, rows_N[:, None, None] + within[:, None], columns_N[:, None, None] + within)
        canvas_NHW[at] = np.maximum(canvas_NHW[at], digits_NHW)
    return canvas_NHW


def print_image_task(task: ImageTask, console: Console) -> None:
    """Print sizes and labels as a table, and the first train images side by side."""
    from rich.markup import escape

    manifest, names = task.manifest, task.label_names
    console.print(f"[bold]{escape(task.name)}[/bold] from {escape(manifest['source'])}, decided by {task.metric}")
    console.print(f"Splits: {manifest['split']['method']}")
    labels = {"train": task.train.labels, "dev": task.dev.labels, "test": task.test.labels}
    counts = {split: np.bincount(of_split, minlength=len(names)).tolist() for split, of_split in labels.items()}
    by_label = {split: dict(zip(names, of_split, strict=True)) for split, of_split in counts.items()}
    console.print(count_table(f"Images of {task.height} x {task.width} pixels", by_label))
    if len(task.unlabelled):
        console.print(f"Unlabelled: {len(task.unlabelled)} images that data.train_size leaves out.")
    split = task.train.take(np.arange(min(_SHOWN, len(task.train))))
    titles = [
        f"{names[label]} (other: {names[other]})".ljust(task.width)
        for label, other in zip(split.labels, split.others, strict=True)
    ]
    shades_NHW = (split.pixels_NHW * (len(_SHADES) - 1)).round().astype(int)
    drawn = [["".join(_SHADES[shade] for shade in row) for row in image] for image in shades_NHW]
    for row in (titles, *zip(*drawn, strict=True)):
        shown = "   ".join(part.ljust(len(titles[0])) for part in row).rstrip()
        console.print(shown, markup=False, highlight=False)
