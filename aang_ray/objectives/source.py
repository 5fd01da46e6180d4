"""Where a step's segments come from: the end task's splits, its corpora, and the objectives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from aang_ray.data.task import EndTask, Labelled, Ragged
from aang_ray.errors import UserError
from aang_ray.objectives import outputs, randomness
from aang_ray.objectives.allocation import published_shares
from aang_ray.objectives.objective import Objective
from aang_ray.objectives.outputs import OutputSettings
from aang_ray.objectives.sampling import Cursors, epoch_examples
from aang_ray.objectives.segment import Segment
from aang_ray.objectives.space import Space
from aang_ray.objectives.transforms import Int64, Texts, Vocabulary

DEV, END_TASK, FIRST_OBJECTIVE = 0, 1, 2
"""Numbers of the segments of a step."""
DEV_HEAD, END_TASK_HEAD, LABEL_HEAD, DENOISE_HEAD = "dev", "end-task", "label", "denoise"
"""phi*, phi_E, and the heads of the outputs `end-task` and `denoise`."""

_END_TASK_CODE = -1


@dataclass(frozen=True)
class SourceSettings:
    """Sizes and switches of the batches."""

    end_task: int
    auxiliary: int
    dev: int
    dev_head: int
    seed: int
    per_objective_heads: bool = False
    head_from_train: bool = False
    """The dev head's examples come from train (`published`) instead of dev."""
    head_refit_every: int = 1
    meta_dev_fraction: float = 0.0
    published_allocation: bool = False


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
        self.cursors = Cursors(len(space), n, settings.auxiliary, settings.seed) if space is not None else None
        self._meta_dev, self._score_dev = self._split_dev()
        # Head and dev batch are disjoint. The head's sample comes first; where dev is no larger, it takes half.
        meta = len(self._meta_dev)
        self._head_size = settings.dev_head if settings.dev_head < meta else meta // 2

    @property
    def score_dev(self) -> Int64:
        """Dev examples that decide which checkpoint is kept."""
        return self._score_dev

    def draw(self, step: int) -> tuple[int, ...]:
        """S of a step; empty without auxiliary objectives."""
        return self.cursors.draw(step) if self.cursors is not None else ()

    def step(
        self, step: int, with_dev: bool, factors: Mapping[str, npt.NDArray[np.float64]] | None = None
    ) -> StepBatch:
        """The segments of a step.

        `factors` (by factor letter, aligned with `Space.factors()`) are needed for `published` allocation only.
        """
        settings = self.settings
        examples = epoch_examples(
            len(self.task.train), step * settings.end_task, settings.end_task, settings.seed, _END_TASK_CODE
        )
        end_task = self._labelled("end-task", END_TASK_HEAD, self.task.train, examples)
        dev_examples = self._dev_batch(step) if with_dev else np.zeros(0, dtype=np.int64)
        dev = self._labelled("dev", DEV_HEAD, self.task.dev, dev_examples)
        segments, shares, sampled = [dev, end_task], [], []
        for index, examples_k, keys_k, share in self._auxiliary(step, factors):
            segments.append(self._objective(index, examples_k, keys_k))
            shares.append(share)
            sampled.append(index)
        return StepBatch(step, tuple(sampled), tuple(segments), tuple(shares))

    def dev_head_examples(self, step: int) -> Segment:
        """The examples that phi* is fitted on at this step, disjoint from the step's dev batch."""
        settings = self.settings
        refit = step - step % settings.head_refit_every
        if settings.head_from_train:
            size = len(self.task.train)
            order = randomness.generator(settings.seed, refit, randomness.DEV_HEAD).permutation(size)
            return self._labelled("dev-head", DEV_HEAD, self.task.train, order[: settings.dev_head])
        return self._labelled("dev-head", DEV_HEAD, self.task.dev, self._dev_order(refit)[: self._head_size])

    def _dev_order(self, step: int) -> Int64:
        order = randomness.generator(self.settings.seed, step, randomness.DEV_HEAD).permutation(len(self._meta_dev))
        return self._meta_dev[order]

    def _dev_batch(self, step: int) -> Int64:
        """At most `dev` examples of dev that the step's head was not fitted on."""
        settings = self.settings
        candidates = self._meta_dev
        if not settings.head_from_train:
            head = self._dev_order(step - step % settings.head_refit_every)[: self._head_size]
            candidates = np.setdiff1d(candidates, head)
        order = randomness.generator(settings.seed, step, randomness.DEV).permutation(len(candidates))
        chosen: Int64 = candidates[order][: settings.dev]
        return chosen

    def _split_dev(self) -> tuple[Int64, Int64]:
        everything = np.arange(len(self.task.dev))
        if self.settings.meta_dev_fraction == 0.0:
            return everything, everything
        order = randomness.generator(self.settings.seed, randomness.DEV).permutation(len(everything))
        if len(everything) < 3:
            raise UserError(f"method.meta_dev_fraction: dev has {len(everything)} texts, too few to set some aside")
        count = min(max(2, round(self.settings.meta_dev_fraction * len(everything))), len(everything) - 1)
        return np.sort(everything[order[:count]]), np.sort(everything[order[count:]])

    def _labelled(self, name: str, head: str, split: Labelled, examples: Int64) -> Segment:
        ids, lengths = split.tokens.take(examples)
        texts = Texts(ids, lengths, np.zeros(len(examples), dtype=np.uint64))
        return self._weighted(outputs.plain(name, head, texts, split.labels[examples]))

    def _auxiliary(
        self, step: int, factors: Mapping[str, npt.NDArray[np.float64]] | None
    ) -> list[tuple[int, Int64, randomness.U64, float]]:
        """(objective, examples, keys of randomness, b / B) for each sampled objective."""
        if self.cursors is None or self.space is None:
            return []
        settings, objectives = self.settings, self.space.objectives
        if settings.published_allocation:
            if factors is None:
                raise ValueError("published allocation needs the factors")
            sampled = self.cursors.draw(step)
            sizes = {data: len(self._texts_of(data)) for data in {objectives[k].data for k in sampled}}
            return published_shares(self.space, sampled, factors, sizes, settings.auxiliary, settings.seed, step)
        rows = []
        for index, start, count in self.cursors.at(step):
            code = objectives[index].code
            size = len(self._texts_of(objectives[index].data))
            examples = epoch_examples(size, start, count, settings.seed, code)
            # An example that is read twice at a step, in a tiny data set, gets a key for each reading.
            reading = np.arange(start, start + count) // size
            keys = randomness.keys(settings.seed, step, code, examples, reading)
            rows.append((index, examples, keys, 1.0))
        return rows

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
