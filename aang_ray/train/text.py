"""Text: packed rows of tokens through an encoder with per-example visibility."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from aang_ray.data.task import EndTask
from aang_ray.model.encoder import Encoder
from aang_ray.objectives.batch import BatchPiece, PublishedVisibility, collate, cut
from aang_ray.objectives.build import plain
from aang_ray.objectives.losses import segment_losses
from aang_ray.objectives.segment import Segment, label_weight
from aang_ray.objectives.source import END_TASK_HEAD, BatchSource, StepBatch
from aang_ray.objectives.texts import Int64, Texts
from aang_ray.train.evaluate import SplitReader
from aang_ray.train.parallel.placement import Range, parts_of


class TextDomain:
    """The domain of all tasks whose examples are texts."""

    def __init__(
        self, task: EndTask, encoder: Encoder, source: BatchSource, pad: int, seed: int, published_visibility: bool
    ) -> None:
        self._task, self._encoder, self.source, self._pad = task, encoder, source, pad
        self._seed, self._published = seed, published_visibility
        self.head_refit_every = source.settings.head_refit_every
        self.follows_factors = source.settings.published_allocation

    def batch(self, step: int, with_dev: bool, factors: Mapping[str, npt.NDArray[np.float64]] | None) -> StepBatch:
        return self.source.step(step, with_dev, factors)

    def costs(self, batch: StepBatch) -> tuple[Int64, ...]:
        return tuple(segment.lengths_E for segment in batch.segments)

    def entries_read(self, batch: StepBatch, ranges: Sequence[Range]) -> Int64:
        parts = parts_of(batch.segments, ranges)
        # Where the denoise head draws tokens, any may come.
        drawn = [s.drawn.vocabulary.ordinary_ids for s in parts if s.drawn is not None and len(s.drawn.at_G)]
        ids_T = np.concatenate([*(segment.ids_T for segment in parts), *drawn])
        # Padding is looked up, too, and has a gradient where an encoder's table does not exempt it.
        return np.unique(np.append(ids_T, self._pad) if len(ids_T) else ids_T).astype(np.int64)

    def chosen(self, number: int, end_task: bool, objectives: Sequence[int]) -> StepBatch:
        return self.source.chosen(number, end_task, objectives)

    def size(self, objective: int) -> int:
        return self.source.readings.size(objective)

    def pieces(
        self, batch: StepBatch, micro: int, per_segment: bool, ranges: Sequence[Range] | None = None
    ) -> tuple[BatchPiece, ...]:
        published = None
        if self._published:
            width = max(int(segment.lengths_E.max(initial=1)) for segment in batch.segments)
            published = PublishedVisibility(self._seed, batch.step, width)
        segments = batch.segments if ranges is None else parts_of(batch.segments, ranges)
        cuts = cut(segments, micro, per_segment)
        return tuple(collate(part, self._pad, self._task.class_weights, published) for part in cuts)

    def label_weights(self, segments: Sequence[Segment]) -> tuple[float, ...]:
        return tuple(label_weight(segment, self._task.class_weights) for segment in segments)

    def probe(self, batch: StepBatch, examples: int) -> BatchPiece:
        longest = max(batch.segments, key=lambda segment: int(segment.lengths_E.max(initial=0)))
        at = int(longest.lengths_E.argmax())
        return collate([longest.part(at, at + 1)] * examples, self._pad)

    def dev_head_piece(self, step: int) -> BatchPiece:
        return collate([self.source.dev_head_examples(step)], self._pad)

    def end_task_pieces(self, split: str, examples: Int64, micro: int) -> tuple[BatchPiece, ...]:
        labelled = self._task.train if split == "train" else self._task.dev
        ids, lengths = labelled.tokens.take(examples)
        texts = Texts(ids, lengths, np.zeros(len(examples), dtype=np.uint64))
        segment = plain(split, END_TASK_HEAD, texts, labelled.labels[examples])
        return tuple(collate(part, self._pad) for part in cut([segment], micro, per_segment=False))

    def losses(self, piece: BatchPiece, heads: Mapping[str, nn.Module]) -> Tensor:
        return segment_losses(self._encoder, heads, piece)

    def features(self, piece: BatchPiece) -> tuple[Tensor, Tensor]:
        features_EH = self._encoder.pool(self._encoder(piece.inputs), piece.inputs)
        return features_EH, piece.pooled[0].label_K[: len(features_EH)]  # what follows is padding

    def reader(self, split: str, first: int = 0, every: int = 1) -> SplitReader:
        if split == "dev":
            return SplitReader(self._task.dev, self.source.readings.score_dev[first::every], self._pad)
        return SplitReader(self._task.test, np.arange(first, len(self._task.test), every), self._pad)
