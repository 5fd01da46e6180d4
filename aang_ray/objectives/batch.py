"""The batch of a step as tensors: cut into pieces that fit into memory, each for one forward pass.

Shape suffixes: R rows, L columns, T tokens, E texts, G generated tokens, S segments, K targets of a head.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol, Self, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from aang_ray.model.attention import TokenInputs
from aang_ray.model.segments import Movable, SegmentRows
from aang_ray.objectives.packing import Segment, lay_out, one_per_row, packed, token_starts
from aang_ray.objectives.texts import Float32, Int64
from aang_ray.objectives.visibility import published_matrix

LABELS_MULTIPLE, TEXTS_MULTIPLE = 64, 16
"""The number of labels of a head is rounded up to a multiple with labels that weigh nothing (see `ROWS_MULTIPLE`)."""


class Cuttable(Protocol):
    """A segment of any domain."""

    @property
    def examples(self) -> int:
        """Number of examples."""

    def part(self, start: int, stop: int) -> Self:
        """Examples `start` to `stop`."""


CuttableT = TypeVar("CuttableT", bound=Cuttable)


@dataclass(frozen=True)
class Targets:
    """What one head predicts for a piece. K: labelled tokens, or texts, rounded up."""

    head: str
    index_K: Tensor
    """What the head reads: flattened position [R * L] for a token head, text for a text head; int64."""
    label_K: Tensor
    """Token ids or classes, int64; or numbers, fp32, [K, C]."""
    weight_K: Tensor
    """Label weight / (sum of the label weights of its segment at this step). 0 for what rounds up."""
    segment_K: Tensor
    """Segment of each target, int64."""
    rows: SegmentRows
    of_replacements: bool = False
    """Whether the labels are made with the replacements: did the token change?"""


@dataclass(frozen=True)
class Replacements:
    """What the denoise head reads to generate replaced tokens, and where its samples go."""

    inputs: TokenInputs
    """The texts with the tokens in question masked, in rows of their own, everything visible."""
    index_G: Tensor
    """Flattened position of each masked token in `inputs`, int64."""
    place_G: Tensor
    """Flattened position in the piece that each sample goes to, int64."""
    uniform_G: Tensor
    """The number in [0, 1) that determines each sample, float64."""
    special: Tensor
    """Token ids that are never drawn, int64."""
    size: int
    """Token ids of the tokenizer; the embedding table may have more rows."""


@dataclass(frozen=True)
class BatchPiece(Movable):
    """What goes through the model in one forward pass."""

    inputs: TokenInputs
    tokens: SegmentRows
    """The segment of every flattened position."""
    vocabulary: tuple[Targets, ...]
    """Targets of each head that reads tokens."""
    pooled: tuple[Targets, ...]
    """Targets of each head that reads whole texts."""
    real_tokens: int
    """Tokens that are not padding."""
    replacements: Replacements | None = None
    """Tokens to generate before the pass."""


@dataclass(frozen=True)
class PublishedVisibility:
    """Settings of the released code's visibility: one matrix for each representation and step, [width, width]."""

    seed: int
    step: int
    width: int
    """Tokens of the longest text of the step."""


def cut(segments: Sequence[CuttableT], micro: int | None, per_segment: bool) -> Iterator[list[CuttableT]]:
    """Cut a batch along its segments, in order, dev first.

    Args:
        segments: all segments of the step, of any domain.
        micro: largest number of examples in a piece; None: no limit.
        per_segment: whether a piece must hold examples of one segment only.

    Yields:
        Pieces of S segments each, most of them empty: a segment has the same number in every piece.
    """
    limit = micro or max(1, sum(segment.examples for segment in segments))
    piece = [segment.part(0, 0) for segment in segments]
    room = limit
    for number, segment in enumerate(segments):
        start = 0
        while start < segment.examples:
            stop = min(segment.examples, start + room)
            piece[number] = segment.part(start, stop)
            room -= stop - start
            start = stop
            if room == 0 or (per_segment and start == segment.examples):
                yield piece
                piece, room = [s.part(0, 0) for s in segments], limit
    if room < limit:
        yield piece


def collate(
    segments: Sequence[Segment],
    pad_id: int,
    class_weights: Float32 | None = None,
    published: PublishedVisibility | None = None,
) -> BatchPiece:
    """Turn one piece of a batch into tensors in host memory.

    Args:
        segments: all segments of the step, each with the texts of this piece.
        pad_id: the token id of padding.
        class_weights: weights of the end task's classes, [C]; None: equal ones.
        published: use the released code's visibility for the objectives. Padding is seen there, so each text has a row.
    """
    lengths = [segment.lengths_E for segment in segments]
    layout = packed(lengths) if published is None else one_per_row(lengths, published.width)
    inputs, flat_T = lay_out(segments, layout, pad_id)
    if published is not None:
        inputs = replace(inputs, visible_RLL=_published(segments, inputs, published))
    drawn = {segment.head for segment in segments if segment.drawn is not None}
    vocabulary = head_targets(_token_labels(segments, flat_T), len(segments), LABELS_MULTIPLE)
    return BatchPiece(
        inputs=inputs,
        tokens=SegmentRows(layout.bounds),
        vocabulary=tuple(replace(targets, of_replacements=targets.head in drawn) for targets in vocabulary),
        pooled=tuple(head_targets(_text_labels(segments, class_weights), len(segments), TEXTS_MULTIPLE)),
        real_tokens=len(flat_T),
        replacements=_replacements(segments, flat_T, pad_id),
    )


def _published(segments: Sequence[Segment], inputs: TokenInputs, published: PublishedVisibility) -> Tensor:
    """Return the visibility of a piece in which every text is a row, [R, L, L]."""
    visible_RLL = inputs.visibility_RLL().clone()
    row = 0
    for segment in segments:
        if segment.representation is not None:
            matrix = published_matrix(segment.representation, published.width, published.seed, published.step)
            visible_RLL[row : row + segment.examples] = torch.from_numpy(matrix.copy())
        row += segment.examples
    return visible_RLL


class HeadLabels(NamedTuple):
    """What a head reads of one segment, and the labels there."""

    head: str
    segment: int
    positions: Int64
    labels: npt.NDArray[Any]
    weights: Float32


def _token_labels(segments: Sequence[Segment], flat_T: Int64) -> Iterator[HeadLabels]:
    for number, (start, segment) in enumerate(zip(token_starts(segments), segments, strict=False)):
        if segment.classes_E is None and len(segment.labelled_M):
            weights = np.full(len(segment.targets_M), 1.0 / segment.normaliser, dtype=np.float32)
            yield HeadLabels(segment.head, number, flat_T[segment.labelled_M + start], segment.targets_M, weights)


def _text_labels(segments: Sequence[Segment], class_weights: Float32 | None) -> Iterator[HeadLabels]:
    start = 0
    for number, segment in enumerate(segments):
        stop = start + segment.examples
        if segment.classes_E is not None and segment.examples:
            weights = np.ones(segment.examples, dtype=np.float32)
            if class_weights is not None and segment.weighted:
                weights = class_weights[segment.classes_E]
            weights = (weights / segment.normaliser).astype(np.float32)
            yield HeadLabels(segment.head, number, np.arange(start, stop), segment.classes_E, weights)
        start = stop


def head_targets(found: Iterable[HeadLabels], segments: int, multiple: int = 1) -> Iterator[Targets]:
    """Yield what each head reads of the S segments.

    The number of a head's targets is rounded up to a multiple, with targets of weight 0 that count as its last
    segment's.
    """
    by_head: dict[str, list[HeadLabels]] = {}
    for one in found:
        by_head.setdefault(one.head, []).append(one)
    for head, parts in by_head.items():
        counts = np.zeros(segments, dtype=np.int64)
        counts[[part.segment for part in parts]] = [len(part.positions) for part in parts]
        padding = -int(counts.sum()) % multiple
        counts[parts[-1].segment] += padding

        def joined(arrays: list[npt.NDArray[Any]], dtype: type[np.generic], padding: int = padding) -> Tensor:
            values = np.concatenate(arrays)
            nothing = np.zeros((padding, *values.shape[1:]), dtype=values.dtype)
            return torch.from_numpy(np.concatenate((values, nothing)).astype(dtype))

        real = np.issubdtype(np.asarray(parts[0].labels).dtype, np.floating)
        yield Targets(
            head=head,
            index_K=joined([part.positions for part in parts], np.int64),
            label_K=joined([part.labels for part in parts], np.float32 if real else np.int64),
            weight_K=joined([part.weights for part in parts], np.float32),
            segment_K=torch.from_numpy(np.repeat(np.arange(segments), counts)),
            rows=SegmentRows((0, *np.cumsum(counts).tolist())),
        )


def _replacements(segments: Sequence[Segment], flat_T: Int64, pad_id: int) -> Replacements | None:
    """Return the tokens of a piece that the denoise head generates; `flat_T` is where the piece has each token."""
    drawing = [
        (start, segment, segment.drawn)
        for start, segment in zip(token_starts(segments), segments, strict=False)
        if segment.drawn is not None and len(segment.drawn.at_G)
    ]
    if not drawing:
        return None
    masked = []
    for _, segment, drawn in drawing:
        ids_T, visible_T = segment.ids_T.copy(), np.zeros_like(segment.ranks_T)
        ids_T[drawn.at_G] = drawn.vocabulary.mask_id
        masked.append(replace(segment, ids_T=ids_T, ranks_T=visible_T, key_ranks_T=visible_T, drawn=None))
    inputs, own_T = lay_out(masked, packed([segment.lengths_E for segment in masked]), pad_id)
    index = [own_T[drawn.at_G + start] for start, (_, _, drawn) in zip(token_starts(masked), drawing, strict=False)]
    vocabulary = drawing[0][2].vocabulary
    return Replacements(
        inputs=inputs,
        index_G=torch.from_numpy(np.concatenate(index)),
        place_G=torch.from_numpy(np.concatenate([flat_T[drawn.at_G + start] for start, _, drawn in drawing])),
        uniform_G=torch.from_numpy(np.concatenate([drawn.uniform_G for _, _, drawn in drawing])),
        special=torch.tensor(vocabulary.special_ids, dtype=torch.int64),
        size=vocabulary.size,
    )
