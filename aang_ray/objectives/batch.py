"""n objectives, the end task and the dev batch become one batch, and a batch becomes pieces that fit.

Shape suffixes: R rows, L columns, E texts, M labelled positions, S segments.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from aang_ray.model.inputs import TokenInputs
from aang_ray.model.segments import SegmentRows
from aang_ray.objectives.images.segment import ImageSegment
from aang_ray.objectives.packing import Layout, one_per_row, pack
from aang_ray.objectives.segment import Segment
from aang_ray.objectives.visibility import published_matrix

SHORTEST_ROW = 64
"""Rows narrower than this waste more at their ends than attention saves."""
ROWS_MULTIPLE, LABELS_MULTIPLE, TEXTS_MULTIPLE = 4, 64, 16
"""Sizes are rounded up to these with rows that weigh nothing: half-precision kernels on a CPU are generated, and
kept, for every new shape that they meet."""


def row_width(longest: int) -> int:
    """A width that holds the longest text, of few that are possible: four to a doubling."""
    step = max(16, 1 << max(0, longest.bit_length() - 3))
    return max(SHORTEST_ROW, -(-longest // step) * step)


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

    def to(self, device: torch.device) -> Targets:
        """The same targets on a device."""
        moved: dict[str, Any] = {
            f.name: value.to(device, non_blocking=True)
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        return replace(self, **moved)


Part = TypeVar("Part", TokenInputs, Targets)
Cuttable = TypeVar("Cuttable", Segment, ImageSegment)


def pinned(part: Part) -> Part:
    """The same tensors in page-locked memory."""
    moved: dict[str, Any] = {
        f.name: value.pin_memory() for f in fields(part) if isinstance(value := getattr(part, f.name), Tensor)
    }
    return replace(part, **moved)


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

    def to(self, device: torch.device) -> BatchPiece:
        """The same piece on a device."""
        return replace(
            self,
            inputs=self.inputs.to(device),
            vocabulary=tuple(targets.to(device) for targets in self.vocabulary),
            pooled=tuple(targets.to(device) for targets in self.pooled),
        )

    def pin(self) -> BatchPiece:
        """The same piece in page-locked memory, from which copies to a GPU do not block."""
        return replace(
            self,
            inputs=pinned(self.inputs),
            vocabulary=tuple(pinned(targets) for targets in self.vocabulary),
            pooled=tuple(pinned(targets) for targets in self.pooled),
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
    if published is None:
        longest = max((int(length.max()) for length in lengths if len(length)), default=1)
        layout = pack(lengths, row_width(longest), ROWS_MULTIPLE)
    else:
        layout = one_per_row(lengths, published.width)
    inputs, flat_T = _inputs(segments, layout, pad_id)
    if published is not None:
        inputs = replace(inputs, visible_RLL=_published(segments, inputs, published))
    return BatchPiece(
        inputs=inputs,
        tokens=SegmentRows(layout.bounds),
        vocabulary=tuple(_token_targets(segments, flat_T)),
        pooled=tuple(_text_targets(segments, class_weights)),
        segments=len(segments),
        real_tokens=len(flat_T),
    )


def _inputs(segments: Sequence[Segment], layout: Layout, pad_id: int) -> tuple[TokenInputs, np.ndarray]:
    """Scatter all tokens to their places; also returns each token's flattened position."""
    lengths_E = np.concatenate([segment.lengths_E for segment in segments])
    first_E = layout.row_E * layout.width + layout.column_E
    within_T = np.arange(int(lengths_E.sum())) - np.repeat(np.cumsum(lengths_E) - lengths_E, lengths_E)
    flat_T = np.repeat(first_E, lengths_E) + within_T

    def scatter(values_T: np.ndarray, fill: int, dtype: type[np.signedinteger]) -> Tensor:
        result = np.full(layout.rows * layout.width, fill, dtype=dtype)
        result[flat_T] = values_T
        return torch.from_numpy(result.reshape(layout.rows, layout.width))

    def joined(name: str) -> np.ndarray:
        return np.concatenate([getattr(segment, name) for segment in segments])

    inputs = TokenInputs(
        ids_RL=scatter(joined("ids_T"), pad_id, np.int64),
        positions_RL=scatter(joined("positions_T"), 0, np.int64),
        ranks_RL=scatter(joined("ranks_T"), 0, np.int32),
        key_ranks_RL=scatter(joined("key_ranks_T"), 0, np.int32),
        texts_RL=scatter(np.repeat(np.arange(len(lengths_E)), lengths_E), -1, np.int32),
        first_E=torch.from_numpy(first_E.astype(np.int64)),
        lengths_E=torch.from_numpy(lengths_E.astype(np.int64)),
    )
    return inputs, flat_T


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
    sizes = [len(segment.ids_T) for segment in segments]
    offsets = np.concatenate(([0], np.cumsum(sizes)))
    heads = dict.fromkeys(s.head for s in segments if s.classes_E is None and len(s.labelled_M))
    for head in heads:
        chosen = [
            (number, flat_T[segment.labelled_M + offsets[number]], segment.targets_M, 1.0 / segment.normaliser)
            for number, segment in enumerate(segments)
            if segment.head == head and segment.classes_E is None and len(segment.labelled_M)
        ]
        weights = [np.full(len(labels), weight, dtype=np.float32) for _, _, labels, weight in chosen]
        labelled = [(n, i, t, w) for (n, i, t, _), w in zip(chosen, weights, strict=True)]
        yield _targets(head, len(segments), labelled, LABELS_MULTIPLE)


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
            if class_weights is not None:
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
        return torch.from_numpy(np.pad(values, (0, padding)).astype(dtype))

    return Targets(
        head=head,
        index_K=joined(1, np.int64),
        label_K=joined(2, np.int64),
        weight_K=joined(3, np.float32),
        segment_K=torch.from_numpy(np.repeat(np.arange(segments), counts)),
        rows=SegmentRows(tuple(int(bound) for bound in bounds)),
    )
