"""Where a step's segments of images come from: the end task's splits, and the objectives on its train images."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np

from aang_ray.data.digits import ImageTask, LabelledImages
from aang_ray.objectives import randomness
from aang_ray.objectives.images.outputs import build, segment
from aang_ray.objectives.images.segment import ImageSegment, Int64
from aang_ray.objectives.sampling import Readings, SourceSettings
from aang_ray.objectives.source import DEV_HEAD, END_TASK_HEAD, SegmentBatch, StepSource, head_name
from aang_ray.objectives.space import Space

ImageBatch = SegmentBatch[ImageSegment]


class ImageSource(StepSource[ImageSegment]):
    """Batches of images.

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

    def _dev(self, examples: Int64) -> ImageSegment:
        return self._labelled("dev", DEV_HEAD, self.dev, examples)

    def _end_task(self, examples: Int64) -> ImageSegment:
        return self._labelled("end-task", END_TASK_HEAD, self.train, examples)

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
        head = head_name(objective, self.settings.per_objective_heads)
        made = build(objective, head, self.train.take(examples), np.broadcast_to(keys, (len(examples),)).copy())
        return self._weighted(made) if objective.output == "end-task" else made

    def _weighted(self, plain: ImageSegment) -> ImageSegment:
        """Classes of the target weighted as `data.class_weights` says."""
        if self._weights_C is None or plain.classes_E is None:
            return plain
        weights_E = self._weights_C[plain.classes_E]
        return replace(plain, weights_E=weights_E, normaliser=float(weights_E.sum()))
