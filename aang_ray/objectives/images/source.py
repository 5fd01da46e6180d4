"""Where a step's segments of images come from: the end task's splits, and the objectives on its train images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from aang_ray.data.images import ImageTask, LabelledImages
from aang_ray.objectives import randomness
from aang_ray.objectives.allocation import Share
from aang_ray.objectives.images.outputs import build, segment
from aang_ray.objectives.images.segment import ImageSegment, Int64
from aang_ray.objectives.readings import NOTHING, Readings, SourceSettings
from aang_ray.objectives.source import DEV_HEAD, END_TASK_HEAD, LABEL_HEAD
from aang_ray.objectives.space import Space


@dataclass(frozen=True)
class ImageBatch:
    """All segments of a step: dev (empty unless asked for), end task, sampled objectives."""

    step: int
    sampled: tuple[int, ...]
    segments: tuple[ImageSegment, ...]
    shares: tuple[float, ...]
    """1 for each sampled objective."""


class ImageSource:
    """Makes the batch of any step as a pure function of (seed, step).

    The body sees standardised pixels: less their mean over all train images, divided by their deviation.
    """

    def __init__(self, task: ImageTask, space: Space | None, n: int, settings: SourceSettings) -> None:
        self.space, self.settings = space, settings
        self._weights_C = task.class_weights
        pixels = task.train.pixels_NHW
        mean, deviation = pixels.mean(dtype=np.float64), pixels.std(dtype=np.float64)

        def standardised(split: LabelledImages) -> LabelledImages:
            return replace(split, pixels_NHW=((split.pixels_NHW - mean) / deviation).astype(np.float32))

        self.train, self.dev, self.test = (standardised(split) for split in (task.train, task.dev, task.test))
        self.readings = Readings(len(task.train), len(task.dev), lambda data: len(task.train), space, n, settings)

    def step(self, step: int, with_dev: bool, factors: Mapping[str, npt.NDArray[np.float64]] | None) -> ImageBatch:
        """The segments of a step; `factors` for `published` allocation only."""
        dev = self.readings.dev_batch(step) if with_dev else NOTHING
        return self._batch(step, dev, self.readings.end_task(step), self.readings.auxiliary(step, factors))

    def chosen(self, number: int, end_task: bool, objectives: Sequence[int]) -> ImageBatch:
        """Batch number so-and-so of these objectives, with the end task or without it: see `Readings.chosen`."""
        examples = self.readings.end_task(number) if end_task else NOTHING
        return self._batch(number, NOTHING, examples, self.readings.chosen(number, objectives))

    def _batch(self, step: int, dev: Int64, end_task: Int64, auxiliary: Sequence[Share]) -> ImageBatch:
        segments = [
            self._labelled("dev", DEV_HEAD, self.dev, dev),
            self._labelled("end-task", END_TASK_HEAD, self.train, end_task),
        ]
        segments += [self._objective(index, examples, keys) for index, examples, keys, _ in auxiliary]
        sampled, shares = tuple(index for index, *_ in auxiliary), tuple(share for *_, share in auxiliary)
        return ImageBatch(step, sampled, tuple(segments), shares)

    def dev_head_examples(self, step: int) -> ImageSegment:
        """The examples that phi* is fitted on at this step, disjoint from the step's dev batch."""
        split = self.train if self.settings.head_from_train else self.dev
        return self._labelled("dev-head", DEV_HEAD, split, self.readings.dev_head(step))

    def labelled(self, split: Literal["train", "dev"], examples: Int64) -> ImageSegment:
        """Examples of a split with their labels, for the end task's head."""
        return self._labelled(split, END_TASK_HEAD, self.train if split == "train" else self.dev, examples)

    def _labelled(self, name: str, head: str, split: LabelledImages, examples: Int64) -> ImageSegment:
        images = split.take(examples)
        return self._weighted(segment(name, head, images.pixels_NHW, images.labels))

    def _objective(self, index: int, examples: Int64, keys: randomness.U64) -> ImageSegment:
        if self.space is None:
            raise ValueError("no space")
        objective = self.space.objectives[index]
        head = objective.key if self.settings.per_objective_heads else output_head(objective.output)
        made = build(objective, head, self.train.take(examples), np.broadcast_to(keys, (len(examples),)).copy())
        return self._weighted(made) if objective.output == "end-task" else made

    def _weighted(self, plain: ImageSegment) -> ImageSegment:
        """Classes of the target weighted as `data.class_weights` says."""
        if self._weights_C is None or plain.classes_E is None:
            return plain
        weights_E = self._weights_C[plain.classes_E]
        return replace(plain, weights_E=weights_E, normaliser=float(weights_E.sum()))


def output_head(output: str) -> str:
    """The name of the head that all objectives with this output share; the end task's own is another one."""
    return LABEL_HEAD if output == "end-task" else output
