"""Where a step's segments come from: the end task's splits, its corpora, and the objectives."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from aang_ray.config.sections import Semantics
from aang_ray.data.tasks import EndTask, Labelled, Ragged
from aang_ray.objectives import randomness, visibility
from aang_ray.objectives.contracts import check_corrupted, check_labels, check_selected, check_targets
from aang_ray.objectives.objective import EXTERNAL, Objective
from aang_ray.objectives.outputs import Head, Labels, View
from aang_ray.objectives.packing import Drawn, Segment
from aang_ray.objectives.primitives import BUILT_IN, Primitives
from aang_ray.objectives.sampling import NOTHING, Readings, Share, SourceSettings
from aang_ray.objectives.space import Space
from aang_ray.objectives.texts import Bool, Int32, Int64, Texts, Vocabulary
from aang_ray.objectives.transforms import Corrupted, Noise, remaining

# --- objectives.build: From an objective and its texts to a segment: corrupted inputs, ranks, labels. (semantics sections 2.4 to 2.6)


@dataclass(frozen=True)
class OutputSettings:
    """Switches that decide inputs and labels."""

    mask_rate: float
    labels: Semantics
    pooling: str
    """`first` or `mean`: whether the first token carries the text's label."""
    noise: Noise | None = None
    """For noised embeddings."""


def plain(name: str, head: str, texts: Texts, classes_E: Int64) -> Segment:
    """Uncorrupted texts with their classes: the end task itself, and the dev batch."""
    return replace(_unlabelled(name, head, texts), classes_E=classes_E, normaliser=float(len(texts.lengths_E)))


def build(
    objective: Objective,
    head: str,
    texts: Texts,
    classes_E: Int64 | None,
    vocabulary: Vocabulary,
    settings: OutputSettings,
    primitives: Primitives = BUILT_IN,
    fitted: Any = None,
) -> Segment:
    """The objective's inputs and labels on these texts; `fitted`: what its output's `fit` returned.

    Raises:
        UserError: if a primitive breaks its contract: those of a user's file are not of this program.
    """
    transform = primitives.transforms[objective.transform]
    representation = primitives.representations[objective.representation]
    output = primitives.outputs[objective.output]
    real_T = vocabulary.real(texts.ids_T)
    selected_T = transform.select(texts, real_T, settings.mask_rate)
    check_selected(transform, selected_T, len(real_T))
    corrupted = transform.corrupt(texts, selected_T, vocabulary)
    check_corrupted(transform, corrupted, real_T, vocabulary.size)
    kept_T = np.ones(len(real_T), dtype=np.bool_) if corrupted.kept_T is None else corrupted.kept_T
    view = View(objective, texts, real_T, selected_T, kept_T, vocabulary, settings.labels, classes_E, fitted)
    labels = output.label(view)
    check_labels(output, labels, view)
    read = remaining(texts, corrupted)
    first: int | None = visibility.LOWEST
    if output.head.kind == "text":
        first = visibility.HIGHEST if settings.pooling == "first" else None
    ranks_T = visibility.ranks(representation, read, first)
    segment = _unlabelled(objective.key, head, read, ranks_T, objective.representation)
    segment = _noised(segment, view, corrupted, settings.noise)
    if labels.drawn_T is not None:
        segment = _drawn(segment, view, labels.drawn_T & kept_T)
    if labels.by_queries:
        return _with_queries(segment, labels, vocabulary)
    return _labelled(segment, labels, of_end_task=objective.output == "end-task")


def _labelled(segment: Segment, labels: Labels, of_end_task: bool) -> Segment:
    normaliser = float(len(labels.targets))
    if labels.at_M is None:
        return replace(segment, classes_E=labels.targets, normaliser=normaliser, weighted=of_end_task)
    return replace(segment, labelled_M=labels.at_M, targets_M=labels.targets, normaliser=normaliser)


def _noised(segment: Segment, view: View, corrupted: Corrupted, noise: Noise | None) -> Segment:
    if corrupted.noised_T is None:
        return segment
    if noise is None:
        raise ValueError("the settings say nothing of noise")
    noised_T = corrupted.noised_T & view.kept_T
    return replace(segment, noised_N=view.row_T[noised_T], noise_NW=noise.draw(view.original, noised_T))


def _drawn(segment: Segment, view: View, drawn_T: Bool) -> Segment:
    """Leave the originals in place; the samples and the labels are made on the device."""
    at_G = view.row_T[drawn_T]
    ids_T = segment.ids_T.copy()
    ids_T[at_G] = view.original.ids_T[drawn_T]
    uniform_G = view.original.uniform_T(randomness.REPLACEMENT)[drawn_T]
    return replace(segment, ids_T=ids_T, drawn=Drawn(at_G, uniform_G, view.vocabulary))


def _with_queries(segment: Segment, labels: Labels, vocabulary: Vocabulary) -> Segment:
    """Append to each text one mask-token query a target, with the target's position.

    A query sees the first token, itself and content of strictly lower rank than its target; nobody
    sees it. Content ranks are even, so target rank - 1 lies strictly between.
    """
    targets = labels.at_M
    if targets is None or len(segment.noised_N) or segment.drawn is not None:
        raise ValueError("queries ask for tokens of intact texts")
    text_T = np.repeat(np.arange(segment.texts), segment.lengths_E)
    text_M = text_T[targets]
    order = np.argsort(np.concatenate((text_T, text_M)), kind="stable")  # content first, then its queries

    def interleave(content: Int32, queries: Int32) -> Int32:
        return np.concatenate((content, queries))[order].astype(np.int32)

    is_query = np.concatenate((np.zeros(len(text_T), dtype=np.bool_), np.ones(len(targets), dtype=np.bool_)))[order]
    highest_M = np.full(len(targets), visibility.HIGHEST, dtype=np.int32)
    return replace(
        segment,
        ids_T=interleave(segment.ids_T, np.full(len(targets), vocabulary.mask_id, dtype=np.int32)),
        positions_T=np.concatenate((segment.positions_T, segment.positions_T[targets]))[order],
        ranks_T=interleave(segment.ranks_T, segment.ranks_T[targets] - 1),
        key_ranks_T=interleave(segment.key_ranks_T, highest_M),
        lengths_E=segment.lengths_E + np.bincount(text_M, minlength=segment.texts),
        labelled_M=np.flatnonzero(is_query),
        targets_M=labels.targets,
        normaliser=float(len(targets)),
    )


def _unlabelled(
    name: str, head: str, texts: Texts, ranks_T: Int32 | None = None, representation: str | None = None
) -> Segment:
    if ranks_T is None:
        ranks_T = np.zeros(len(texts.ids_T), dtype=np.int32)
    return Segment(
        name=name,
        head=head,
        ids_T=texts.ids_T,
        positions_T=texts.positions_T,
        ranks_T=ranks_T,
        key_ranks_T=ranks_T,
        lengths_E=texts.lengths_E,
        representation=representation,
    )


# --- objectives.step_source: The segments of a step, whatever the examples are: what texts and images share.


SegmentT = TypeVar("SegmentT")


@dataclass(frozen=True)
class SegmentBatch(Generic[SegmentT]):
    """All segments of a step: dev (empty unless asked for), end task, sampled objectives."""

    step: int
    sampled: tuple[int, ...]
    segments: tuple[SegmentT, ...]
    shares: tuple[float, ...]
    """b / B of each sampled objective; 1 each in equal allocation, where they do not enter the loss."""


class StepSource(ABC, Generic[SegmentT]):
    """Makes the batch of any step as a pure function of (seed, step)."""

    readings: Readings
    """Which examples it reads."""

    def step(
        self, step: int, with_dev: bool, factors: Mapping[str, npt.NDArray[np.float64]] | None = None
    ) -> SegmentBatch[SegmentT]:
        """The segments of a step.

        `factors` (by factor letter, aligned with `Space.factors()`) are needed for `published` allocation only.
        """
        dev = self.readings.dev_batch(step) if with_dev else NOTHING
        return self._batch(step, dev, self.readings.end_task(step), self.readings.auxiliary(step, factors))

    def chosen(self, number: int, end_task: bool, objectives: Sequence[int]) -> SegmentBatch[SegmentT]:
        """Batch number so-and-so of these objectives, with the end task or without it: see `Readings.chosen`."""
        examples = self.readings.end_task(number) if end_task else NOTHING
        return self._batch(number, NOTHING, examples, self.readings.chosen(number, objectives))

    def _batch(self, step: int, dev: Int64, end_task: Int64, auxiliary: Sequence[Share]) -> SegmentBatch[SegmentT]:
        segments = [self._dev(dev), self._end_task(end_task)]
        segments += [self._objective(index, examples, keys) for index, examples, keys, _ in auxiliary]
        sampled, shares = tuple(index for index, *_ in auxiliary), tuple(share for *_, share in auxiliary)
        return SegmentBatch(step, sampled, tuple(segments), shares)

    @abstractmethod
    def _dev(self, examples: Int64) -> SegmentT:
        """The dev batch."""

    @abstractmethod
    def _end_task(self, examples: Int64) -> SegmentT:
        """Train examples with their labels."""

    @abstractmethod
    def _objective(self, index: int, examples: Int64, keys: randomness.U64) -> SegmentT:
        """Examples of an objective's data, corrupted and labelled."""


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
