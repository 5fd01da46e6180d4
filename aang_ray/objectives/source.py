"""Where the segments of a step come from: the end task's splits, and the objectives on their data.

`build` makes the segment of an objective, `BatchSource` the batch of any step from a text task.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, Literal, TypeVar

import numpy as np
import numpy.typing as npt

from aang_ray.config.sections import Semantics
from aang_ray.data.tasks import EndTask, Ragged
from aang_ray.objectives import randomness
from aang_ray.objectives.objective import EXTERNAL, Objective
from aang_ray.objectives.outputs import Head, Labels, View
from aang_ray.objectives.packing import Drawn, Segment, label_weight
from aang_ray.objectives.primitives import BUILT_IN, Primitives, check_targets, corrupt, label, order_of
from aang_ray.objectives.sampling import NO_EXAMPLES, ExampleSchedule, Share, SourceSettings
from aang_ray.objectives.space import Space
from aang_ray.objectives.texts import Int32, Int64, Texts, Vocabulary
from aang_ray.objectives.transforms import Noise, remaining
from aang_ray.objectives.visibility import HIGHEST, LOWEST

DEV, END_TASK, FIRST_OBJECTIVE = 0, 1, 2
"""Numbers of the segments of a step."""
DEV_HEAD, END_TASK_HEAD, LABEL_HEAD = "dev", "end-task", "label"
"""Names of heads: phi*, phi_E, and the head of the output `end-task`. Other outputs' heads have the output's name."""


@dataclass(frozen=True)
class OutputSettings:
    """Settings that decide inputs and labels."""

    mask_rate: float
    labels: Semantics
    pooling: str
    """How a text head reads a text: `first` or `mean`."""
    noise: Noise | None = None
    """For noised embeddings."""


def unkeyed(tokens: Ragged, examples: Int64) -> Texts:
    """Return the chosen texts for use without a transform, so that they need no random keys."""
    ids_T, lengths_E = tokens.take(examples)
    return Texts(ids_T, lengths_E, np.zeros(len(examples), dtype=np.uint64), types_T=tokens.take_types(examples))


def plain(name: str, head: str, texts: Texts, classes_E: Int64) -> Segment:
    """Return a segment of uncorrupted texts with their classes: the end task itself, or dev."""
    ranks_T = np.zeros(len(texts.ids_T), dtype=np.int32)
    normaliser = float(len(texts.lengths_E))
    return replace(_unlabelled(name, head, texts, ranks_T), classes_E=classes_E, normaliser=normaliser)


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
    """Return the segment of an objective: its inputs, ranks and labels. (docs/semantics.md, sections 2.4 to 2.6)

    Args:
        objective: the names of the primitives.
        head: name of the head that predicts the labels.
        texts: before the transform.
        classes_E: class of each text in its data set, if that has classes.
        vocabulary: of the tokenizer.
        settings: decide inputs and labels.
        primitives: what the names stand for.
        fitted: what the output's `fit` returned.

    Raises:
        UserError: if a primitive of a user's file returns something invalid.
    """
    output, real_T = primitives.outputs[objective.output], vocabulary.real(texts.ids_T)
    selected_T, corrupted = corrupt(primitives.transforms[objective.transform], texts, vocabulary, settings.mask_rate)
    kept_T = np.ones(len(real_T), dtype=np.bool_) if corrupted.kept_T is None else corrupted.kept_T
    view = View(objective, texts, real_T, selected_T, kept_T, vocabulary, settings.labels, classes_E, fitted)
    labels = label(output, view)
    read = remaining(texts, corrupted)
    first_token: int | None = LOWEST
    if output.head.kind == "text":
        first_token = HIGHEST if settings.pooling == "first" else None
    order_T = order_of(primitives.representations[objective.representation], read)
    segment = _unlabelled(objective.key, head, read, _ranks(order_T, read, first_token))
    segment = replace(segment, representation=objective.representation)
    if corrupted.noised_T is not None:
        assert settings.noise is not None
        noised_T = corrupted.noised_T & kept_T
        segment = replace(segment, noised_N=view.row_T[noised_T], noise_NW=settings.noise.draw(texts, noised_T))
    if labels.drawn_T is not None:
        # The original tokens stand where samples of the denoise head will, which are made on the device.
        drawn_T = labels.drawn_T & kept_T
        at_G, ids_T = view.row_T[drawn_T], segment.ids_T.copy()
        ids_T[at_G] = texts.ids_T[drawn_T]
        drawn = Drawn(at_G, texts.uniform_T(randomness.REPLACEMENT)[drawn_T], vocabulary)
        segment = replace(segment, ids_T=ids_T, drawn=drawn)
    if labels.by_queries:
        return _with_queries(segment, labels, vocabulary)
    normaliser = float(len(labels.targets))
    if labels.at_M is None:
        weighted = objective.output == "end-task"
        return replace(segment, classes_E=labels.targets, normaliser=normaliser, weighted=weighted)
    return replace(segment, labelled_M=labels.at_M, targets_M=labels.targets, normaliser=normaliser)


def _unlabelled(name: str, head: str, texts: Texts, ranks_T: Int32) -> Segment:
    return Segment(name, head, texts.ids_T, texts.positions_T, ranks_T, ranks_T, texts.lengths_E, types_T=texts.types_T)


def _ranks(order_T: Int32 | None, texts: Texts, first_token: int | None) -> Int32:
    """Return the ranks of the tokens; the first token of each text ranks `first_token`, None leaves it its place."""
    if order_T is None:
        return np.zeros(len(texts.ids_T), dtype=np.int32)
    ranks_T = order_T * np.int32(2)  # even, so that a query fits in just below any token
    if first_token is not None:
        ranks_T[texts.starts_E] = first_token
    return ranks_T


def _with_queries(segment: Segment, labels: Labels, vocabulary: Vocabulary) -> Segment:
    """Append to each text one mask-token query for each target, with the target's position.

    A query sees the first token, itself, and tokens of a strictly lower rank than its target; no other token sees it.
    Ranks of tokens are even, so (rank of the target) - 1 lies strictly between two of them.
    """
    targets = labels.at_M
    if targets is None or len(segment.noised_N) or segment.drawn is not None:
        raise ValueError("queries can be used with intact texts only")
    text_T = np.repeat(np.arange(segment.examples), segment.lengths_E)
    text_M = text_T[targets]
    order = np.argsort(np.concatenate((text_T, text_M)), kind="stable")  # each text's tokens, then its queries

    def interleave(tokens: np.ndarray, queries: np.ndarray | int) -> np.ndarray:
        return np.concatenate((tokens, np.broadcast_to(queries, len(targets))))[order].astype(tokens.dtype)

    types_T = segment.types_T
    return replace(
        segment,
        ids_T=interleave(segment.ids_T, vocabulary.mask_id),
        positions_T=interleave(segment.positions_T, segment.positions_T[targets]),
        ranks_T=interleave(segment.ranks_T, segment.ranks_T[targets] - 1),
        key_ranks_T=interleave(segment.key_ranks_T, HIGHEST),
        types_T=None if types_T is None else interleave(types_T, types_T[targets]),
        lengths_E=segment.lengths_E + np.bincount(text_M, minlength=segment.examples),
        labelled_M=np.flatnonzero(order >= len(text_T)),
        targets_M=labels.targets,
        normaliser=float(len(targets)),
    )


# Steps


SegmentT = TypeVar("SegmentT")
Split = Literal["train", "dev"]


@dataclass(frozen=True)
class SegmentBatch(Generic[SegmentT]):
    """All segments of a step: dev (empty unless asked for), end task, sampled objectives."""

    step: int
    sampled: tuple[int, ...]
    """Indices of the sampled objectives in the space."""
    segments: tuple[SegmentT, ...]
    shares: tuple[float, ...]
    """`Share.fraction` of each sampled objective."""


class StepSource(ABC, Generic[SegmentT]):
    """Makes the batch of any step as a pure function of (seed, step), for one domain."""

    schedule: ExampleSchedule
    """Which examples it reads."""
    settings: SourceSettings

    def step(
        self, step: int, with_dev: bool, factors: Mapping[str, npt.NDArray[np.float64]] | None = None
    ) -> SegmentBatch[SegmentT]:
        """Make the segments of a step; `factors` as in `ExampleSchedule.auxiliary`."""
        dev = self.schedule.dev_batch(step) if with_dev else NO_EXAMPLES
        return self._batch(step, dev, self.schedule.end_task(step), self.schedule.auxiliary(step, factors))

    def batch_of(self, number: int, end_task: bool, objectives: Sequence[int]) -> SegmentBatch[SegmentT]:
        """Make batch `number` of the given objectives, with or without the end task (`ExampleSchedule.shares_of`)."""
        examples = self.schedule.end_task(number) if end_task else NO_EXAMPLES
        return self._batch(number, NO_EXAMPLES, examples, self.schedule.shares_of(number, objectives))

    def _batch(self, step: int, dev: Int64, end_task: Int64, auxiliary: Sequence[Share]) -> SegmentBatch[SegmentT]:
        segments = [
            self.labelled("dev", DEV_HEAD, "dev", dev),
            self.labelled("end-task", END_TASK_HEAD, "train", end_task),
            *(self.objective(share) for share in auxiliary),
        ]
        sampled, fractions = tuple(share.objective for share in auxiliary), tuple(s.fraction for s in auxiliary)
        return SegmentBatch(step, sampled, tuple(segments), fractions)

    def dev_head_examples(self, step: int) -> SegmentT:
        """Return the examples that phi* is fitted on at this step, disjoint from the step's dev batch."""
        split: Split = "train" if self.settings.head_from_train else "dev"
        return self.labelled("dev-head", DEV_HEAD, split, self.schedule.dev_head(step))

    @abstractmethod
    def labelled(self, name: str, head: str, split: Split, examples: Int64) -> SegmentT:
        """Return examples of a split (indices) with their labels, for a head; `name` is the segment's, for logs."""

    @abstractmethod
    def objective(self, share: Share) -> SegmentT:
        """Return examples of an objective's data, corrupted and labelled."""


StepBatch = SegmentBatch[Segment]


class BatchSource(StepSource[Segment]):
    """Batches of texts: of an end task, and n objectives of a space. `output` decides inputs and labels."""

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
        self.schedule = ExampleSchedule(
            len(task.train), len(task.dev), lambda data: len(self._texts_of(data)[0]), space, n, settings
        )
        self._heads = space_heads(space, task, settings.per_objective_heads)
        self._fitted: dict[str, Any] = {}
        if space is not None:
            for name in dict.fromkeys(k.output for k in space.objectives):
                if (fit := space.primitives.outputs[name].fit) is not None:
                    self._fitted[name] = fit(task.train.tokens, vocabulary)

    def labelled(self, name: str, head: str, split: Split, examples: Int64) -> Segment:
        read = self.task.train if split == "train" else self.task.dev
        segment = plain(name, head, unkeyed(read.tokens, examples), read.labels[examples])
        return replace(segment, normaliser=label_weight(segment, self.task.class_weights))

    def _texts_of(self, data: str) -> tuple[Ragged, Int64 | None]:
        """Return the texts of a kind of data, and their classes if they have any."""
        if data == "end-task":
            return self.task.train.tokens, self.task.train.labels
        if data.startswith(EXTERNAL):
            train = self.task.external[data.removeprefix(EXTERNAL)].train
            return train.tokens, train.labels
        return {kind.replace("_", "-"): texts for kind, texts in self.task.corpora.items()}[data], None

    def objective(self, share: Share) -> Segment:
        assert self.space is not None
        objective, examples = self.space.objectives[share.objective], share.examples
        tokens, classes = self._texts_of(objective.data)
        ids, lengths = tokens.take(examples)
        texts = Texts(ids, lengths, share.keys, tokens.take_capitals(examples), tokens.take_types(examples))
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
        return replace(segment, normaliser=label_weight(segment, self.task.class_weights))


def head_name(objective: Objective, per_objective: bool) -> str:
    """Name the head of an objective: its output's (for labels of other data sets, one for each set), or its own."""
    if per_objective:
        return objective.key
    if objective.output == "end-task":
        return LABEL_HEAD
    return f"{objective.output}/{objective.data}" if objective.output == "supervised" else objective.output


def space_heads(space: Space | None, task: EndTask, per_objective: bool) -> dict[str, Head]:
    """Return the heads that a space needs, by name, with their sizes; vocabulary heads come first."""
    heads: dict[str, Head] = {}
    if space is None:
        return heads
    for objective in space.objectives:
        head = space.primitives.outputs[objective.output].head
        if head.kind != "vocabulary" and head.size is None:
            external = objective.data.startswith(EXTERNAL)
            labelled = task.external[objective.data.removeprefix(EXTERNAL)] if external else task
            head = replace(head, size=len(labelled.label_names))
        heads[head_name(objective, per_objective)] = head
    return dict(sorted(heads.items(), key=lambda item: item[1].kind != "vocabulary"))
