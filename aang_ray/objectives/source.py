"""Where a step's segments come from: the end task's splits, its corpora, and the objectives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from aang_ray.data.task import EndTask, Labelled, Ragged
from aang_ray.objectives import outputs, randomness
from aang_ray.objectives.allocation import Share
from aang_ray.objectives.objective import Objective
from aang_ray.objectives.outputs import OutputSettings
from aang_ray.objectives.readings import NOTHING, Readings, SourceSettings
from aang_ray.objectives.segment import Segment
from aang_ray.objectives.space import Space
from aang_ray.objectives.transforms import Int64, Texts, Vocabulary

DEV, END_TASK, FIRST_OBJECTIVE = 0, 1, 2
"""Numbers of the segments of a step."""
DEV_HEAD, END_TASK_HEAD, LABEL_HEAD, DENOISE_HEAD = "dev", "end-task", "label", "denoise"
"""phi*, phi_E, and the heads of the outputs `end-task` and `denoise`."""


@dataclass(frozen=True)
class StepBatch:
    """All segments of a step: dev (empty unless asked for), end task, sampled objectives."""

    step: int
    sampled: tuple[int, ...]
    segments: tuple[Segment, ...]
    shares: tuple[float, ...]
    """b / B of each sampled objective; 1 each in equal allocation, where they do not enter the loss."""


class BatchSource:
    """Makes the batch of any step as a pure function of (seed, step)."""

    def __init__(
        self,
        task: EndTask,
        space: Space | None,
        n: int,
        vocabulary: Vocabulary,
        output: OutputSettings,
        settings: SourceSettings,
    ) -> None:
        self.task, self.space, self.vocabulary, self.output, self.settings = task, space, vocabulary, output, settings
        self.readings = Readings(
            len(task.train), len(task.dev), lambda data: len(self._texts_of(data)), space, n, settings
        )

    def step(
        self, step: int, with_dev: bool, factors: Mapping[str, npt.NDArray[np.float64]] | None = None
    ) -> StepBatch:
        """The segments of a step.

        `factors` (by factor letter, aligned with `Space.factors()`) are needed for `published` allocation only.
        """
        dev = self.readings.dev_batch(step) if with_dev else NOTHING
        return self._batch(step, dev, self.readings.end_task(step), self.readings.auxiliary(step, factors))

    def chosen(self, number: int, end_task: bool, objectives: Sequence[int]) -> StepBatch:
        """Batch number so-and-so of these objectives, with the end task or without it: see `Readings.chosen`."""
        examples = self.readings.end_task(number) if end_task else NOTHING
        return self._batch(number, NOTHING, examples, self.readings.chosen(number, objectives))

    def _batch(self, step: int, dev: Int64, end_task: Int64, auxiliary: Sequence[Share]) -> StepBatch:
        segments = [
            self._labelled("dev", DEV_HEAD, self.task.dev, dev),
            self._labelled("end-task", END_TASK_HEAD, self.task.train, end_task),
        ]
        segments += [self._objective(index, examples, keys) for index, examples, keys, _ in auxiliary]
        sampled, shares = tuple(index for index, *_ in auxiliary), tuple(share for *_, share in auxiliary)
        return StepBatch(step, sampled, tuple(segments), shares)

    def dev_head_examples(self, step: int) -> Segment:
        """The examples that phi* is fitted on at this step, disjoint from the step's dev batch."""
        split = self.task.train if self.settings.head_from_train else self.task.dev
        return self._labelled("dev-head", DEV_HEAD, split, self.readings.dev_head(step))

    def _labelled(self, name: str, head: str, split: Labelled, examples: Int64) -> Segment:
        ids, lengths = split.tokens.take(examples)
        texts = Texts(ids, lengths, np.zeros(len(examples), dtype=np.uint64))
        return self._weighted(outputs.plain(name, head, texts, split.labels[examples]))

    def _texts_of(self, data: str) -> Ragged:
        if data == "end-task":
            return self.task.train.tokens
        return self.task.corpora["in_domain" if data == "in-domain" else "out_of_domain"]

    def _objective(self, index: int, examples: Int64, keys: randomness.U64) -> Segment:
        if self.space is None:
            raise ValueError("no space")
        objective: Objective = self.space.objectives[index]
        ids, lengths = self._texts_of(objective.data).take(examples)
        texts = Texts(ids, lengths, np.broadcast_to(keys, (len(examples),)).copy())
        head = LABEL_HEAD if objective.output == "end-task" else DENOISE_HEAD
        if self.settings.per_objective_heads:
            head = objective.key
        classes = self.task.train.labels[examples] if objective.output == "end-task" else None
        return self._weighted(outputs.build(objective, head, texts, classes, self.vocabulary, self.output))

    def _weighted(self, segment: Segment) -> Segment:
        """With class weights the mean's denominator is the sum of the weights."""
        weights = self.task.class_weights
        if weights is None or segment.classes_E is None:
            return segment
        return replace(segment, normaliser=float(weights[segment.classes_E].sum()))


def head_names(space: Space | None, per_objective: bool) -> dict[str, Sequence[str]]:
    """Heads that a space needs, by kind: `token` and `label`."""
    if space is None:
        return {"token": (), "label": ()}
    tokens = [k.key if per_objective else DENOISE_HEAD for k in space.objectives if k.output == "denoise"]
    labels = [k.key if per_objective else LABEL_HEAD for k in space.objectives if k.output == "end-task"]
    return {"token": tuple(dict.fromkeys(tokens)), "label": tuple(dict.fromkeys(labels))}
