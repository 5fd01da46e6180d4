"""n objectives, the end task and the dev batch become one batch, and a batch becomes pieces that fit.

Shape suffixes: R rows, L columns, E texts, M labelled positions, S segments.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from aang_ray.model.inputs import TokenInputs
from aang_ray.model.segments import SegmentRows
from aang_ray.objectives.images.segment import ImageSegment
from aang_ray.objectives.lay_out import lay_out, packed, starts
from aang_ray.objectives.packing import one_per_row
from aang_ray.objectives.replacements import Replacements, collate_replacements
from aang_ray.objectives.segment import Segment
from aang_ray.objectives.tensors import moved, pinned
from aang_ray.objectives.visibility import published_matrix

LABELS_MULTIPLE, TEXTS_MULTIPLE = 64, 16
"""Sizes are rounded up to these with labels that weigh nothing, as rows are (`lay_out`)."""

Cuttable = TypeVar("Cuttable", Segment, ImageSegment)


@dataclass(frozen=True)
class Targets:
    """What one head has to predict. K rows: labelled positions [M] or texts [E]."""

    head: str
    index_K: Tensor
    """Where to read: flattened position [R * L] for a token head, text for a pooled head; int64."""
    label_K: Tensor
    """Token id or class, int64; or numbers to be predicted, fp32, [K, C]."""
    weight_K: Tensor
    """1 / (labels of its segment at this step): shares of the segment's mean loss."""
    segment_K: Tensor
    """Segment of each row, int64."""
    rows: SegmentRows
    of_replacements: bool = False
    """The labels are whether the tokens read were replaced by others, and are made with the replacements."""


@dataclass(frozen=True)
class BatchPiece:
    """What goes through the model in one forward pass."""

    inputs: TokenInputs
    tokens: SegmentRows
    vocabulary: tuple[Targets, ...]
    """One entry for each token head."""
    pooled: tuple[Targets, ...]
    """One entry for each head that reads whole texts."""
    segments: int
    real_tokens: int
    replacements: Replacements | None = None
    """Tokens that the denoise head is to draw before the pass."""

    def to(self, device: torch.device) -> BatchPiece:
        """The same piece on a device."""
        return replace(
            self,
            inputs=self.inputs.to(device),
            vocabulary=tuple(moved(targets, device) for targets in self.vocabulary),
            pooled=tuple(moved(targets, device) for targets in self.pooled),
            replacements=None if self.replacements is None else self.replacements.to(device),
        )

    def pin(self) -> BatchPiece:
        """The same piece in page-locked memory, from which copies to a GPU do not block."""
        return replace(
            self,
            inputs=pinned(self.inputs),
            vocabulary=tuple(pinned(targets) for targets in self.vocabulary),
            pooled=tuple(pinned(targets) for targets in self.pooled),
            replacements=None if self.replacements is None else self.replacements.pin(),
        )


@dataclass(frozen=True)
class PublishedVisibility:
    """Coordinates of the released code's visibility: one matrix for each representation of a step."""

    seed: int
    step: int
    width: int
    """Longest text of the step: every piece is as wide, whatever it holds."""


def cut(segments: Sequence[Cuttable], micro: int | None, per_segment: bool) -> Iterator[list[Cuttable]]:
    """Cut a batch along its segments into pieces of at most `micro` texts, in order, dev first.

    Every piece has all S segments, most of them empty: segments keep their numbers. With
    `per_segment` a piece holds texts of one segment only.
    """
    limit = micro or max(1, sum(segment.texts for segment in segments))
    piece = [segment.part(0, 0) for segment in segments]
    room = limit
    for number, segment in enumerate(segments):
        start = 0
        while start < segment.texts:
            stop = min(segment.texts, start + room)
            piece[number] = segment.part(start, stop)
            room -= stop - start
            start = stop
            if room == 0 or (per_segment and start == segment.texts):
                yield piece
                piece, room = [s.part(0, 0) for s in segments], limit
    if room < limit:
        yield piece


def collate(
    segments: Sequence[Segment],
    pad_id: int,
    class_weights: np.ndarray[tuple[int], np.dtype[np.float32]] | None = None,
    published: PublishedVisibility | None = None,
) -> BatchPiece:
    """One piece of a batch as tensors in host memory.

    Texts are packed into rows; `published` visibility puts each text into a row of its own, because
    there padding is seen. It is a property of representations, so the end task and dev keep the sound one.
    """
    lengths = [segment.lengths_E for segment in segments]
    layout = packed(lengths) if published is None else one_per_row(lengths, published.width)
    inputs, flat_T = lay_out(segments, layout, pad_id)
    if published is not None:
        inputs = replace(inputs, visible_RLL=_published(segments, inputs, published))
    return BatchPiece(
        inputs=inputs,
        tokens=SegmentRows(layout.bounds),
        vocabulary=tuple(_token_targets(segments, flat_T)),
        pooled=tuple(_text_targets(segments, class_weights)),
        segments=len(segments),
        real_tokens=len(flat_T),
        replacements=collate_replacements(segments, flat_T, pad_id),
    )


def _published(segments: Sequence[Segment], inputs: TokenInputs, published: PublishedVisibility) -> Tensor:
    """The sound matrix with the objectives' rows replaced; a text is a row here."""
    visible_RLL = inputs.visibility_RLL().clone()
    row = 0
    for segment in segments:
        if segment.representation is not None:
            matrix = published_matrix(segment.representation, published.width, published.seed, published.step)
            visible_RLL[row : row + segment.texts] = torch.from_numpy(matrix.copy())
        row += segment.texts
    return visible_RLL


def _token_targets(segments: Sequence[Segment], flat_T: np.ndarray) -> Iterator[Targets]:
    """Labelled positions, head by head, segment after segment."""
    offsets = starts(segments)
    heads = dict.fromkeys(s.head for s in segments if s.classes_E is None and len(s.labelled_M))
    for head in heads:
        chosen = [
            (number, flat_T[segment.labelled_M + offsets[number]], segment.targets_M, 1.0 / segment.normaliser)
            for number, segment in enumerate(segments)
            if segment.head == head and segment.classes_E is None and len(segment.labelled_M)
        ]
        weights = [np.full(len(labels), weight, dtype=np.float32) for _, _, labels, weight in chosen]
        labelled = [(n, i, t, w) for (n, i, t, _), w in zip(chosen, weights, strict=True)]
        drawn = any(segment.head == head and segment.drawn is not None for segment in segments)
        yield replace(_targets(head, len(segments), labelled, LABELS_MULTIPLE), of_replacements=drawn)


def _text_targets(
    segments: Sequence[Segment], class_weights: np.ndarray[tuple[int], np.dtype[np.float32]] | None
) -> Iterator[Targets]:
    """Whole texts, head by head, segment after segment."""
    offsets = np.concatenate(([0], np.cumsum([segment.texts for segment in segments])))
    heads = dict.fromkeys(s.head for s in segments if s.classes_E is not None and s.texts)
    for head in heads:
        chosen = []
        for number, segment in enumerate(segments):
            if segment.head != head or segment.classes_E is None or not segment.texts:
                continue
            weight = np.ones(segment.texts, dtype=np.float32)
            if class_weights is not None and segment.weighted:
                weight = class_weights[segment.classes_E]
            index = np.arange(segment.texts) + offsets[number]
            chosen.append((number, index, segment.classes_E, (weight / segment.normaliser).astype(np.float32)))
        yield _targets(head, len(segments), chosen, TEXTS_MULTIPLE)


def _targets(
    head: str, segments: int, chosen: Sequence[tuple[int, np.ndarray, np.ndarray, np.ndarray]], multiple: int
) -> Targets:
    """One head's targets, rounded up with rows of weight 0 that count with the last segment that has any."""
    counts = np.zeros(segments, dtype=np.int64)
    for number, index, _, _ in chosen:
        counts[number] = len(index)
    padding = -int(counts.sum()) % multiple
    counts[chosen[-1][0]] += padding
    bounds = np.concatenate(([0], np.cumsum(counts)))

    def joined(column: int, dtype: type[np.generic]) -> Tensor:
        values = np.concatenate([np.asarray(row[column]) for row in chosen])
        nothing = np.zeros((padding, *values.shape[1:]), dtype=values.dtype)
        return torch.from_numpy(np.concatenate((values, nothing)).astype(dtype))

    real = np.issubdtype(np.asarray(chosen[0][2]).dtype, np.floating)

    return Targets(
        head=head,
        index_K=joined(1, np.int64),
        label_K=joined(2, np.float32 if real else np.int64),
        weight_K=joined(3, np.float32),
        segment_K=torch.from_numpy(np.repeat(np.arange(segments), counts)),
        rows=SegmentRows(tuple(int(bound) for bound in bounds)),
    )
