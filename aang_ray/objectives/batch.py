"""n objectives, the end task and the dev batch become one batch, and a batch becomes pieces that fit.

Shape suffixes: R rows, L columns, E texts, M labelled positions, S segments.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from aang_ray.model.attention import TokenInputs
from aang_ray.model.encoder import Encoder
from aang_ray.model.segments import SegmentRows
from aang_ray.objectives.images.segment import ImageSegment
from aang_ray.objectives.packing import Drawn, Segment, lay_out, one_per_row, packed, starts
from aang_ray.objectives.texts import Int64
from aang_ray.objectives.visibility import published_matrix

# --- objectives.tensors: Tensors of a batch on their way to the device.


Part = TypeVar("Part", bound=Any)
"""A frozen dataclass; fields that are tensors take part."""


def moved(part: Part, device: torch.device) -> Part:
    """The same tensors on a device; the copy does not block where the memory is pinned."""
    return _replaced(part, {name: value.to(device, non_blocking=True) for name, value in _tensors(part).items()})


def pinned(part: Part) -> Part:
    """The same tensors in page-locked memory."""
    return _replaced(part, {name: value.pin_memory() for name, value in _tensors(part).items()})


def _tensors(part: Any) -> dict[str, Tensor]:
    values = {f.name: getattr(part, f.name) for f in fields(part)}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def _replaced(part: Part, tensors: dict[str, Any]) -> Part:
    result: Part = replace(part, **tensors)
    return result


# --- objectives.replacements: Replaced tokens that the model makes itself: samples of the denoise head, drawn without gradient.
#
# As in ELECTRA (Clark et al. 2020), with the run's own body and denoise head as the generator. The texts go through
# the body once more, their drawn tokens masked and everything visible, dropout off; a sample is the inverse of the
# predicted distribution at a number that is a function of (seed, step, objective, example). So at given parameters
# it is a pure function, too, whatever the accumulation (but where rounding moves a boundary across that number).
#
# Shape suffixes: G drawn tokens, R rows, L columns, V vocabulary.


_BELOW_ONE = 1.0 - 2.0**-40
"""Keeps a sample inside its distribution whatever is rounded."""


@dataclass(frozen=True)
class Replacements:
    """What the generator reads, and where its samples go."""

    inputs: TokenInputs
    """The texts with their drawn tokens masked, in rows of their own."""
    index_G: Tensor
    """Where to read in them, flattened; int64."""
    place_G: Tensor
    """Where the samples go in the piece, flattened; int64."""
    uniform_G: Tensor
    """The number in [0, 1) that chooses each sample, float64."""
    special: Tensor
    """Ids that are never drawn, int64."""
    size: int
    """Ids of the tokenizer: the table may have more rows."""

    def to(self, device: torch.device) -> Replacements:
        """The same on a device."""
        return replace(moved(self, device), inputs=self.inputs.to(device))

    def pin(self) -> Replacements:
        """The same in page-locked memory."""
        return replace(pinned(self), inputs=pinned(self.inputs))


def collate_replacements(segments: Sequence[Segment], flat_T: Int64, pad_id: int) -> Replacements | None:
    """The drawn tokens of a piece; `flat_T`: where the piece has each token. None if there are none."""
    drawing = [
        (start, segment, segment.drawn)
        for start, segment in zip(starts(segments), segments, strict=False)
        if segment.drawn is not None and len(segment.drawn.at_G)
    ]
    if not drawing:
        return None
    masked = [_masked(segment, drawn) for _, segment, drawn in drawing]
    inputs, own_T = lay_out(masked, packed([segment.lengths_E for segment in masked]), pad_id)
    vocabulary = drawing[0][2].vocabulary
    index = [own_T[drawn.at_G + start] for start, (_, _, drawn) in zip(starts(masked), drawing, strict=False)]
    return Replacements(
        inputs=inputs,
        index_G=torch.from_numpy(np.concatenate(index)),
        place_G=torch.from_numpy(np.concatenate([flat_T[drawn.at_G + start] for start, _, drawn in drawing])),
        uniform_G=torch.from_numpy(np.concatenate([drawn.uniform_G for _, _, drawn in drawing])),
        special=torch.tensor(vocabulary.special_ids, dtype=torch.int64),
        size=vocabulary.size,
    )


def _masked(segment: Segment, drawn: Drawn) -> Segment:
    ids_T = segment.ids_T.copy()
    ids_T[drawn.at_G] = drawn.vocabulary.mask_id
    visible_T = np.zeros_like(segment.ranks_T)
    return replace(segment, ids_T=ids_T, ranks_T=visible_T, key_ranks_T=visible_T, drawn=None)


@torch.no_grad()
def draw(encoder: Encoder, denoise: nn.Module, wanted: Replacements) -> Tensor:
    """The samples, [G]."""
    training = encoder.training
    encoder.eval()
    hidden_RLH = encoder(wanted.inputs)
    encoder.train(training)
    logits_GV = denoise(hidden_RLH.flatten(0, 1).index_select(0, wanted.index_G))[:, : wanted.size]
    logits_GV = logits_GV.double().index_fill(1, wanted.special, -torch.inf)
    cumulated_GV = logits_GV.softmax(1).cumsum(1)
    at_G1 = wanted.uniform_G[:, None] * _BELOW_ONE * cumulated_GV[:, -1:]
    return torch.searchsorted(cumulated_GV, at_G1, right=True).squeeze(1)


def replaced(inputs: TokenInputs, wanted: Replacements, samples_G: Tensor) -> tuple[TokenInputs, Tensor]:
    """The piece's inputs with the samples in place, and which flattened positions changed, [R * L]."""
    before_T = inputs.ids_RL.flatten()
    after_T = before_T.index_copy(0, wanted.place_G, samples_G)
    return replace(inputs, ids_RL=after_T.view_as(inputs.ids_RL)), after_T != before_T


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
