"""Where a step's segments come from: the end task's splits, its corpora, and the objectives."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from aang_ray.data.task import EndTask, Labelled, Ragged
from aang_ray.objectives import randomness
from aang_ray.objectives.build import OutputSettings, build, plain
from aang_ray.objectives.contracts import check_targets
from aang_ray.objectives.legality import EXTERNAL
from aang_ray.objectives.objective import Objective
from aang_ray.objectives.outputs import Head
from aang_ray.objectives.readings import Readings, SourceSettings
from aang_ray.objectives.segment import Segment
from aang_ray.objectives.space import Space
from aang_ray.objectives.step_source import SegmentBatch, StepSource
from aang_ray.objectives.texts import Int64, Texts, Vocabulary

DEV, END_TASK, FIRST_OBJECTIVE = 0, 1, 2
"""Numbers of the segments of a step."""
DEV_HEAD, END_TASK_HEAD, LABEL_HEAD = "dev", "end-task", "label"
"""phi*, phi_E, and the head of the output `end-task`; other outputs' heads have the output's name."""


StepBatch = SegmentBatch[Segment]


class BatchSource(StepSource[Segment]):
    """Batches of texts."""

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
        self._fitted = {} if space is None else self._fit(space)
        self._heads = space_heads(space, task, settings.per_objective_heads)

    def _fit(self, space: Space) -> dict[str, Any]:
        """What the outputs of a space need to know of train."""
        outputs = {name: space.primitives.outputs[name] for name in dict.fromkeys(k.output for k in space.objectives)}
        train = self.task.train.tokens
        return {name: output.fit(train, self.vocabulary) for name, output in outputs.items() if output.fit is not None}

    def _dev(self, examples: Int64) -> Segment:
        return self._labelled("dev", DEV_HEAD, self.task.dev, examples)

    def _end_task(self, examples: Int64) -> Segment:
        return self._labelled("end-task", END_TASK_HEAD, self.task.train, examples)

    def dev_head_examples(self, step: int) -> Segment:
        """The examples that phi* is fitted on at this step, disjoint from the step's dev batch."""
        split = self.task.train if self.settings.head_from_train else self.task.dev
        return self._labelled("dev-head", DEV_HEAD, split, self.readings.dev_head(step))

    def _labelled(self, name: str, head: str, split: Labelled, examples: Int64) -> Segment:
        ids, lengths = split.tokens.take(examples)
        texts = Texts(ids, lengths, np.zeros(len(examples), dtype=np.uint64))
        return self._weighted(plain(name, head, texts, split.labels[examples]))

    def _texts_of(self, data: str) -> Ragged:
        if data == "end-task":
            return self.task.train.tokens
        if data.startswith(EXTERNAL):
            return self.task.external[data.removeprefix(EXTERNAL)].train.tokens
        return {kind.replace("_", "-"): texts for kind, texts in self.task.corpora.items()}[data]

    def _classes_of(self, data: str) -> Int64 | None:
        if data == "end-task":
            return self.task.train.labels
        if data.startswith(EXTERNAL):
            return self.task.external[data.removeprefix(EXTERNAL)].train.labels
        return None

    def _objective(self, index: int, examples: Int64, keys: randomness.U64) -> Segment:
        if self.space is None:
            raise ValueError("no space")
        objective = self.space.objectives[index]
        tokens, classes = self._texts_of(objective.data), self._classes_of(objective.data)
        ids, lengths = tokens.take(examples)
        keys_E = np.broadcast_to(keys, (len(examples),)).copy()
        texts = Texts(ids, lengths, keys_E, tokens.take_capitals(examples))
        head = head_name(objective, self.settings.per_objective_heads)
        segment = build(
            objective,
            head,
            texts,
            None if classes is None else classes[examples],
            self.vocabulary,
            self.output,
            self.space.primitives,
            self._fitted.get(objective.output),
        )
        targets = segment.targets_M if segment.classes_E is None else segment.classes_E
        check_targets(objective.output, targets, self._heads[head], self.vocabulary.size)
        return self._weighted(segment)

    def _weighted(self, segment: Segment) -> Segment:
        """With class weights the mean's denominator is the sum of the weights."""
        weights = self.task.class_weights
        if weights is None or segment.classes_E is None or not segment.weighted:
            return segment
        return replace(segment, normaliser=float(weights[segment.classes_E].sum()))


def head_name(objective: Objective, per_objective: bool) -> str:
    """The head that answers for an objective: its output's, or its own; labels of other data sets have one a set."""
    if per_objective:
        return objective.key
    if objective.output == "end-task":
        return LABEL_HEAD
    return f"{objective.output}/{objective.data}" if objective.output == "supervised" else objective.output


def space_heads(space: Space | None, task: EndTask, per_objective: bool) -> dict[str, Head]:
    """The heads that a space needs, vocabulary heads first, with their sizes."""
    heads: dict[str, Head] = {}
    if space is None:
        return heads
    for objective in space.objectives:
        head = space.primitives.outputs[objective.output].head
        if head.kind != "vocabulary" and head.size is None:
            head = replace(head, size=len(_label_names(task, objective.data)))
        heads[head_name(objective, per_objective)] = head
    return dict(sorted(heads.items(), key=lambda item: item[1].kind != "vocabulary"))


def _label_names(task: EndTask, data: str) -> tuple[str, ...]:
    return task.external[data.removeprefix(EXTERNAL)].label_names if data.startswith(EXTERNAL) else task.label_names
