"""The domain of images: taxonomy, corruptions, labels, batches and losses.

| stage | primitives |
|---|---|
| data | end-task: the train images · in-domain: those that `data.train_size` leaves out, without their labels |
| transform | no-op · rotate: by 0, 90, 180 or 270 degrees, each as likely · noise: `NOISE` * N(0, 1) on every pixel |
| representation | whole: the body sees all of the image |
| output | other-digit: class of the digit that is not the target · rotation: how often the image was turned · |
| | denoise: the pixels before the noise · end-task: class of the target |

An image is one row of the body. Pixels are standardised, so that the noise and the loss of denoising have the scale of
the train images' own spread.

Shape suffixes: E images, H height, W width, P = H * W pixels, K images that a head reads, S segments, C classes.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Self

import numpy as np
import numpy.typing as npt
import torch
from scipy.special import ndtri
from torch import Tensor, nn

from aang_ray.config.sections import Semantics
from aang_ray.data.digits import ImageTask, LabelledImages
from aang_ray.model.segments import Movable, SegmentRows
from aang_ray.objectives import randomness
from aang_ray.objectives.batch import HeadLabels, Targets, head_targets
from aang_ray.objectives.losses import head_losses
from aang_ray.objectives.objective import Objective, Rule
from aang_ray.objectives.sampling import ExampleSchedule, Share, SourceSettings
from aang_ray.objectives.source import SegmentBatch, Split, StepSource, head_name
from aang_ray.objectives.space import Space
from aang_ray.objectives.texts import Float32, Int64

NOISE: Final = 1.0
"""Standard deviation of the noise, in units of the standard deviation of the train images' pixels."""
TURNS: Final = 4
"""Quarter turns that an image can have made."""

PRIMITIVES: Final[dict[str, tuple[str, ...]]] = {
    "data": ("end-task", "in-domain"),
    "transform": ("no-op", "rotate", "noise"),
    "representation": ("whole",),
    "output": ("other-digit", "rotation", "denoise", "end-task"),
}
RULES: Final = (
    Rule(
        "in-domain images have no labels of digits",
        lambda k: k.data == "in-domain" and k.output in {"other-digit", "end-task"},
    ),
    Rule(
        "the rotation of an image can be predicted only if it was rotated",
        lambda k: k.output == "rotation" and k.transform != "rotate",
    ),
    Rule(
        "rotation moves the digits to other corners, so their labels no longer fit",
        lambda k: k.transform == "rotate" and k.output in {"other-digit", "end-task"},
    ),
    Rule(
        "rotation destroys nothing that denoising could restore",
        lambda k: (k.transform, k.output) == ("rotate", "denoise"),
    ),
    Rule(
        "denoising an uncorrupted image is copying",
        lambda k: (k.transform, k.output) == ("no-op", "denoise"),
        published=False,
    ),
)


class ImageTaxonomy:
    """The names and rules above, as spaces ask for them (`space.Taxonomy`)."""

    def names(self, stage: str) -> tuple[str, ...]:
        return PRIMITIVES[stage]

    def rules(self, objective: Objective) -> Sequence[Rule]:
        return RULES

    def conflicts(self, objectives: Collection[Objective], labels: Semantics) -> dict[Objective, str]:
        return {}


TAXONOMY: Final = ImageTaxonomy()


# Segments


@dataclass(frozen=True)
class ImageSegment:
    """The images of one segment of a step, corrupted and labelled: host arrays."""

    name: str
    head: str
    """The head that predicts the labels."""
    pixels_EHW: Float32
    """What the body sees."""
    labels: npt.NDArray[Any]
    """A class of each image, [E], or its pixels before they were corrupted, [E, P]."""
    weights_E: Float32
    """Weight of each image in the mean loss of the segment."""
    normaliser: float
    """Sum of `weights_E` over the whole segment at this step: the denominator of its mean loss."""

    @property
    def examples(self) -> int:
        return len(self.pixels_EHW)

    @property
    def lengths_E(self) -> Int64:
        """Return the rows of the body for each image."""
        return np.ones(self.examples, dtype=np.int64)

    def part(self, start: int, stop: int) -> Self:
        """Images `start` to `stop`, with the normaliser of the whole segment."""
        return replace(
            self,
            pixels_EHW=self.pixels_EHW[start:stop],
            labels=self.labels[start:stop],
            weights_E=self.weights_E[start:stop],
        )


def segment(name: str, head: str, pixels_EHW: Float32, labels: npt.NDArray[Any]) -> ImageSegment:
    """Return a whole segment in which every image weighs 1."""
    ones_E = np.ones(len(pixels_EHW), dtype=np.float32)
    return ImageSegment(name, head, pixels_EHW, labels, ones_E, float(len(pixels_EHW)))


def build(objective: Objective, head: str, images: LabelledImages, keys_E: randomness.U64) -> ImageSegment:
    """Return the segment of an objective, given the images before the transform and a random key for each of them."""
    pixels_EHW, turns_E = images.pixels_NHW, np.zeros(len(images), dtype=np.int64)
    match objective.transform:
        case "rotate":
            pixels_EHW, turns_E = rotate(pixels_EHW, keys_E)
        case "noise":
            pixels_EHW = add_noise(pixels_EHW, keys_E)
    labels: dict[str, npt.NDArray[Any]] = {
        "other-digit": images.others,
        "rotation": turns_E,
        "denoise": images.pixels_NHW.reshape(len(images), -1),
        "end-task": images.labels,
    }
    return segment(objective.key, head, pixels_EHW, labels[objective.output])


def rotate(pixels_EHW: Float32, keys_E: randomness.U64) -> tuple[Float32, Int64]:
    """Turn each image, which must be square, counterclockwise by 0 to 3 quarters, as its key determines.

    Returns:
        The turned images, [E, H, W], and the quarter turns of each, [E].
    """
    if pixels_EHW.shape[1] != pixels_EHW.shape[2]:
        raise ValueError(f"images of {pixels_EHW.shape[1]} x {pixels_EHW.shape[2]} pixels cannot be turned")
    turns_E = (TURNS * randomness.uniform(keys_E.view(np.int64), randomness.OPERATION)).astype(np.int64)
    turned_EHW = np.empty_like(pixels_EHW)
    for turns in range(TURNS):
        here = turns_E == turns
        turned_EHW[here] = np.rot90(pixels_EHW[here], turns, axes=(1, 2))
    return turned_EHW, turns_E


def add_noise(pixels_EHW: Float32, keys_E: randomness.U64) -> Float32:
    """Add independent normal noise to every pixel, drawn by inversion of the normal distribution function."""
    pixels = np.arange(pixels_EHW[0].size if len(pixels_EHW) else 0)
    uniform_EP = randomness.uniform(keys_E.view(np.int64)[:, None], randomness.REPLACEMENT, pixels)
    # The first of the 2^53 possible numbers is 0, whose normal quantile is infinite: take the middle of each interval.
    noise_EP = ndtri(uniform_EP + 2.0**-54)
    noisy_EHW: Float32 = (pixels_EHW + NOISE * noise_EP.reshape(pixels_EHW.shape)).astype(np.float32)
    return noisy_EHW


# Steps

ImageBatch = SegmentBatch[ImageSegment]


class ImageSource(StepSource[ImageSegment]):
    """Batches of images, with pixels standardised by their mean and deviation over all train images."""

    def __init__(self, task: ImageTask, space: Space | None, n: int, settings: SourceSettings) -> None:
        self.space, self.settings = space, settings
        self._weights_C = task.class_weights
        pixels = task.train.pixels_NHW
        mean, deviation = pixels.mean(dtype=np.float64), pixels.std(dtype=np.float64)

        def standardised(split: LabelledImages) -> LabelledImages:
            return replace(split, pixels_NHW=((split.pixels_NHW - mean) / deviation).astype(np.float32))

        self.train, self.dev, self.test = (standardised(split) for split in (task.train, task.dev, task.test))
        self._data = {"end-task": self.train, "in-domain": standardised(task.unlabelled)}
        sizes = {name: len(images) for name, images in self._data.items()}
        self.schedule = ExampleSchedule(len(task.train), len(task.dev), sizes.__getitem__, space, n, settings)

    def labelled(self, name: str, head: str, split: Split, examples: Int64) -> ImageSegment:
        images = (self.train if split == "train" else self.dev).take(examples)
        return self._weighted(segment(name, head, images.pixels_NHW, images.labels))

    def objective(self, share: Share) -> ImageSegment:
        assert self.space is not None
        objective, examples = self.space.objectives[share.objective], share.examples
        head = head_name(objective, self.settings.per_objective_heads)
        made = build(objective, head, self._data[objective.data].take(examples), share.keys)
        return self._weighted(made) if objective.output == "end-task" else made

    def _weighted(self, plain: ImageSegment) -> ImageSegment:
        """Return the segment with the weights of the end task's classes, if there are any."""
        if self._weights_C is None:
            return plain
        weights_E = self._weights_C[plain.labels]
        return replace(plain, weights_E=weights_E, normaliser=float(weights_E.sum()))


# Batches and losses


@dataclass(frozen=True)
class ImagePiece(Movable):
    """What goes through the model in one forward pass."""

    pixels_E1HW: Tensor
    tokens: SegmentRows
    """The segment of every image."""
    targets: tuple[Targets, ...]
    """Targets of each head. Labels that are pixels have shape [K, P]."""

    @property
    def real_tokens(self) -> int:
        return self.tokens.rows


def collate_images(segments: Sequence[ImageSegment]) -> ImagePiece:
    """Turn one piece of a batch, the segments with its images, into tensors in host memory."""
    bounds = [0, *np.cumsum([one.examples for one in segments]).tolist()]
    found = [
        HeadLabels(one.head, number, np.arange(start, stop), one.labels, one.weights_E / np.float32(one.normaliser))
        for number, (one, (start, stop)) in enumerate(zip(segments, itertools.pairwise(bounds), strict=True))
        if one.examples
    ]
    pixels_EHW = np.concatenate([one.pixels_EHW for one in segments])
    return ImagePiece(
        torch.from_numpy(np.ascontiguousarray(pixels_EHW)).unsqueeze(1),
        SegmentRows(tuple(bounds)),
        tuple(head_targets(found, len(segments))),
    )


def image_losses(body: nn.Module, heads: Mapping[str, nn.Module], piece: ImagePiece) -> Tensor:
    """Return a piece's share of every segment's unweighted mean loss, [S], differentiable."""
    return head_losses(heads, body(piece.pixels_E1HW), piece.targets, piece.tokens.count)
