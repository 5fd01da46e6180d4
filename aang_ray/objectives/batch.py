"""The batch of a step as tensors: cut into pieces that fit into memory, each for one forward pass.

Shape suffixes: R rows, L columns, T tokens, E texts, G generated tokens, S segments, K targets of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Protocol, Self, TypeVar

import numpy as np
import torch
from torch import Tensor

from aang_ray.model.attention import TokenInputs
from aang_ray.model.segments import SegmentRows
from aang_ray.objectives.packing import Segment, lay_out, one_per_row, packed, token_starts
from aang_ray.objectives.texts import Float32, Int64
from aang_ray.objectives.visibility import published_matrix

LABELS_MULTIPLE, TEXTS_MULTIPLE = 64, 16
"""The number of labels of a head is rounded up to a multiple with labels that weigh nothing (see `ROWS_MULTIPLE`)."""


class Cuttable(Protocol):
    """A segment of any domain."""

    @property
    def texts(self) -> int:
        """Number of examples."""
        ...

    def part(self, start: int, stop: int) -> Self:
        """Examples `start` to `stop`."""
        ...


CuttableT = TypeVar("CuttableT", bound=Cuttable)
PartT = TypeVar("PartT")


def moved(part: PartT, device: torch.device) -> PartT:
    """Return a copy of a dataclass with all its tensors on a device. Copying from pinned memory does not block."""
    copy: PartT = _with_tensors(part, lambda tensor: tensor.to(device, non_blocking=True))
    return copy


def pinned(part: PartT) -> PartT:
    """Return a copy of a dataclass with all its tensors in page-locked memory."""
    copy: PartT = _with_tensors(part, Tensor.pin_memory)
    return copy


def _with_tensors(part: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Change the tensors in the fields of a dataclass, in dataclasses among them, and in tuples of these."""
    if isinstance(part, Tensor):
        return change(part)
    if isinstance(part, tuple):
        return tuple(_with_tensors(item, change) for item in part)
    if is_dataclass(part) and not isinstance(part, type):
        return replace(part, **{f.name: _with_tensors(getattr(part, f.name), change) for f in fields(part)})
    return part


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
    """Whether the labels are made together with the replacements: did the token change?"""


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
class BatchPiece:
    """What goes through the model in one forward pass."""

    inputs: TokenInputs
    tokens: SegmentRows
    """The segment of every flattened position."""
    vocabulary: tuple[Targets, ...]
    """Targets of each head that reads tokens."""
    pooled: tuple[Targets, ...]
    """Targets of each head that reads whole texts."""
    segments: int
    real_tokens: int
    """Tokens that are not padding."""
    replacements: Replacements | None = None
    """Tokens to generate before the pass."""

    def to(self, device: torch.device) -> BatchPiece:
        """The same piece on a device."""
        return moved(self, device)

    def pin(self) -> BatchPiece:
        """The same piece in page-locked memory, from which copies to a GPU do not block."""
        return pinned(self)


@dataclass(frozen=True)
class PublishedVisibility:
    """Settings of the released code's visibility, which is one matrix for each representation and step."""

    seed: int
    step: int
    width: int
    """Tokens of the longest text of the step: the width of every piece."""


def cut(segments: Sequence[CuttableT], micro: int | None, per_segment: bool) -> Iterator[list[CuttableT]]:
    """Cut a batch along its segments, in order, dev first.

    Args:
        segments: all segments of the step, of any domain.
        micro: largest number of examples in a piece; None: no limit.
        per_segment: whether a piece must hold examples of one segment only.

    Yields:
        Pieces of S segments each, most of them empty: a segment has the same number in every piece.
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
    class_weights: Float32 | None = None,
    published: PublishedVisibility | None = None,
) -> BatchPiece:
    """Turn one piece of a batch into tensors in host memory.

    Args:
        segments: all segments of the step, each with the texts of this piece.
        pad_id: the token id of padding.
        class_weights: weights of the end task's classes, [C]; None: equal ones.
        published: use the released code's visibility for the objectives. Padding is seen there, so each text has a row
            of its own. The end task and dev, which have no representation, keep the sound visibility.

    Returns:
        The piece.
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
        replacements=_replacements(segments, flat_T, pad_id),
    )


def _published(segments: Sequence[Segment], inputs: TokenInputs, published: PublishedVisibility) -> Tensor:
    """The visibility of a piece in which every text is a row, [R, L, L]."""
    visible_RLL = inputs.visibility_RLL().clone()
    row = 0
    for segment in segments:
        if segment.representation is not None:
            matrix = published_matrix(segment.representation, published.width, published.seed, published.step)
            visible_RLL[row : row + segment.texts] = torch.from_numpy(matrix.copy())
        row += segment.texts
    return visible_RLL


Chosen = tuple[int, np.ndarray, np.ndarray, np.ndarray]
"""Of one segment that a head reads: its number, indices, labels and weights."""


def _token_targets(segments: Sequence[Segment], flat_T: Int64) -> Iterator[Targets]:
    """Targets of the labelled tokens, head by head, segment after segment."""
    read: dict[str, list[Chosen]] = {}
    for number, (start, segment) in enumerate(zip(token_starts(segments), segments, strict=False)):
        if segment.classes_E is None and len(segment.labelled_M):
            weights = np.full(len(segment.targets_M), 1.0 / segment.normaliser, dtype=np.float32)
            chosen = (number, flat_T[segment.labelled_M + start], segment.targets_M, weights)
            read.setdefault(segment.head, []).append(chosen)
    for head, parts in read.items():
        drawn = any(segment.head == head and segment.drawn is not None for segment in segments)
        yield replace(head_targets(head, len(segments), parts, LABELS_MULTIPLE), of_replacements=drawn)


def _text_targets(segments: Sequence[Segment], class_weights: Float32 | None) -> Iterator[Targets]:
    """Targets of the labelled texts, head by head, segment after segment."""
    read: dict[str, list[Chosen]] = {}
    start = 0
    for number, segment in enumerate(segments):
        if segment.classes_E is not None and segment.texts:
            weights = np.ones(segment.texts, dtype=np.float32)
            if class_weights is not None and segment.weighted:
                weights = class_weights[segment.classes_E]
            weights = (weights / segment.normaliser).astype(np.float32)
            chosen = (number, np.arange(start, start + segment.texts), segment.classes_E, weights)
            read.setdefault(segment.head, []).append(chosen)
        start += segment.texts
    for head, parts in read.items():
        yield head_targets(head, len(segments), parts, TEXTS_MULTIPLE)


def head_targets(head: str, segments: int, chosen: Sequence[Chosen], multiple: int = 1) -> Targets:
    """Join what one head reads of each segment.

    Args:
        head: name of the head.
        segments: S.
        chosen: segments that the head reads, in order.
        multiple: the number of targets is rounded up to a multiple of this, with targets of weight 0 that count as the
            last segment's.
    """
    counts = np.zeros(segments, dtype=np.int64)
    for number, index, _, _ in chosen:
        counts[number] = len(index)
    padding = -int(counts.sum()) % multiple
    counts[chosen[-1][0]] += padding
    bounds = np.concatenate(([0], np.cumsum(counts)))

    def joined(column: int, dtype: type[np.generic]) -> Tensor:
        values = np.concatenate([np.asarray(part[column]) for part in chosen])
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


def _replacements(segments: Sequence[Segment], flat_T: Int64, pad_id: int) -> Replacements | None:
    """The tokens of a piece that the denoise head generates, or None; `flat_T` is where the piece has each token."""
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
