"""Segments of texts, and how the texts of all segments are laid out in rows for the encoder.

A *segment* is the part of a step's batch that has one loss: the dev batch, the end task, or a sampled objective. Its
flattened positions [R * L] are contiguous, because the single-pass gradients are taken segment by segment.

Shape suffixes: T tokens, E texts, M labelled tokens, N noised tokens, G generated tokens, W width of the embeddings,
R rows, L columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from aang_ray.model.attention import TokenInputs
from aang_ray.objectives.texts import Float32, Float64, Int8, Int32, Int64, Vocabulary


@dataclass(frozen=True)
class Drawn:
    """The tokens of a segment that samples of the denoise head will replace, on the device."""

    at_G: Int64
    """Indices into the segment's T axis, ascending. Until then the original tokens stand there."""
    uniform_G: Float64
    """The number in [0, 1) that determines each sample."""
    vocabulary: Vocabulary


@dataclass(frozen=True)
class Segment:
    """The texts of one segment, corrupted, ranked and labelled: `classes_E`, or `labelled_M` and `targets_M`."""

    name: str
    head: str
    """The head that predicts the labels."""
    ids_T: Int32
    positions_T: Int64
    """Position of each token in its text, from 0."""
    ranks_T: Int32
    """What a token sees (`visibility.py`)."""
    key_ranks_T: Int32
    """Which tokens see it."""
    lengths_E: Int64
    labelled_M: Int64 = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    """Labelled tokens, as indices into the T axis, ascending."""
    targets_M: npt.NDArray[Any] = field(default_factory=lambda: np.zeros(0, dtype=np.int32))
    """Their labels: ids, [M], or real numbers, [M, C]."""
    classes_E: npt.NDArray[Any] | None = None
    """Labels of whole texts."""
    representation: str | None = None
    """None for the end task and dev."""
    normaliser: float = 0.0
    """Sum of the label weights over the whole segment at this step: the denominator of its mean loss."""
    weighted: bool = True
    """Whether `classes_E` are classes of the end task, which may have weights."""
    noised_N: Int64 = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    """Tokens whose embeddings get noise, as indices into the T axis, ascending."""
    noise_NW: Float32 = field(default_factory=lambda: np.zeros((0, 0), dtype=np.float32))
    drawn: Drawn | None = None
    types_T: Int8 | None = None
    """Token type of each token of text pairs; None: all are 0."""

    @property
    def examples(self) -> int:
        return len(self.lengths_E)

    def part(self, start: int, stop: int) -> Segment:
        """Texts `start` to `stop`, with the normaliser of the whole segment."""
        ends = np.concatenate(([0], np.cumsum(self.lengths_E)))
        tokens = slice(int(ends[start]), int(ends[stop]))

        def inside(ascending: Int64) -> slice:
            return slice(*np.searchsorted(ascending, (tokens.start, tokens.stop)).tolist())

        labelled, noised, drawn = inside(self.labelled_M), inside(self.noised_N), self.drawn
        if drawn is not None:
            here = inside(drawn.at_G)
            drawn = replace(drawn, at_G=drawn.at_G[here] - tokens.start, uniform_G=drawn.uniform_G[here])
        return replace(
            self,
            ids_T=self.ids_T[tokens],
            positions_T=self.positions_T[tokens],
            ranks_T=self.ranks_T[tokens],
            key_ranks_T=self.key_ranks_T[tokens],
            types_T=None if self.types_T is None else self.types_T[tokens],
            lengths_E=self.lengths_E[start:stop],
            labelled_M=self.labelled_M[labelled] - tokens.start,
            targets_M=self.targets_M[labelled],
            classes_E=None if self.classes_E is None else self.classes_E[start:stop],
            noised_N=self.noised_N[noised] - tokens.start,
            noise_NW=self.noise_NW[noised],
            drawn=drawn,
        )


def label_weight(segment: Segment, class_weights_C: Float32 | None) -> float:
    """Return the sum of the label weights of a segment or of a part of one; of a whole segment it is the normaliser."""
    if segment.classes_E is None:
        return float(len(segment.labelled_M))
    if class_weights_C is None or not segment.weighted:
        return float(segment.examples)
    return float(class_weights_C[segment.classes_E].sum())


def token_starts(segments: Sequence[Segment]) -> Int64:
    """Return the index of each segment's first token among those of all, and the number of tokens: S + 1 entries."""
    return np.concatenate(([0], np.cumsum([len(segment.ids_T) for segment in segments])))


# Rows: texts of a segment are placed best-fit decreasing, and the next segment continues the emptiest row.

SHORTEST_ROW = 64
"""Narrower rows waste more at their ends than they save in attention."""
ROWS_MULTIPLE = 4
"""The number of rows is rounded up to a multiple of this, with rows that weigh nothing: half-precision kernels on a CPU
are generated, and cached, for every new shape."""


@dataclass(frozen=True)
class Layout:
    """The place of each text. Texts are numbered over all segments, in their order."""

    width: int
    rows: int
    row_E: Int64
    column_E: Int64
    bounds: tuple[int, ...]
    """Flattened position at which each segment begins, and the end: S + 1 entries."""


def packed(lengths: Sequence[Int64]) -> Layout:
    """Pack the texts of each segment into rows. The width has few possible values, so that few shapes occur."""
    longest = max((int(lengths_E.max()) for lengths_E in lengths if len(lengths_E)), default=1)
    step = max(16, 1 << max(0, longest.bit_length() - 3))
    return pack(lengths, max(SHORTEST_ROW, -(-longest // step) * step), ROWS_MULTIPLE)


def pack(lengths: Sequence[Int64], width: int, multiple: int = 1) -> Layout:
    """Pack the texts of each segment into rows of a given width; their number is rounded up to a multiple.

    Raises:
        ValueError: if a text is longer than a row.
    """
    places: list[tuple[Int64, Int64]] = []
    bounds = [0]
    open_row, used = 0, 0  # the row that the next segment may continue, and how many of its tokens are taken
    for lengths_E in lengths:
        row_E, column_E, open_row, used = _place(lengths_E, width, open_row, used)
        places.append((row_E, column_E))
        bounds.append(open_row * width + used)
    rows = -(-(open_row + (1 if used else 0)) // multiple) * multiple
    # The padding at the very end belongs to the last segment that has texts.
    bounds = [rows * width if bound == bounds[-1] else bound for bound in bounds]
    row_E, column_E = (np.concatenate(part) for part in zip(*places, strict=True))
    return Layout(width, rows, row_E, column_E, tuple(bounds))


def one_per_row(lengths: Sequence[Int64], width: int) -> Layout:
    """Place every text in a row of its own."""
    ends = [0, *np.cumsum([len(lengths_E) for lengths_E in lengths]).tolist()]
    total = ends[-1]
    bounds = tuple(end * width for end in ends)
    return Layout(width, total, np.arange(total), np.zeros(total, dtype=np.int64), bounds)


def _place(lengths_E: Int64, width: int, first_row: int, used: int) -> tuple[Int64, Int64, int, int]:
    """Place texts best-fit decreasing. Return rows, columns, the last row, and how many of its tokens are taken."""
    if len(lengths_E) and int(lengths_E.max()) > width:
        raise ValueError(f"a text of {int(lengths_E.max())} tokens does not fit into a row of {width}")
    taken = [used]
    row_E = np.zeros(len(lengths_E), dtype=np.int64)
    column_E = np.zeros(len(lengths_E), dtype=np.int64)
    for text in np.argsort(-lengths_E, kind="stable"):
        length = int(lengths_E[text])
        fitting = [row for row, fill in enumerate(taken) if fill + length <= width]
        if not fitting:
            fitting = [len(taken)]
            taken.append(0)
        best = max(fitting, key=taken.__getitem__)  # the first of the fullest
        row_E[text], column_E[text] = best, taken[best]
        taken[best] += length
    # The continued row stays first. The emptiest of the new ones moves to the end, where the next segment continues it.
    if len(taken) > 2:
        last = 1 + int(np.argmin(taken[1:]))
        order = np.arange(len(taken))
        order[last], order[-1] = len(taken) - 1, last
        row_E = order[row_E]
        taken[last], taken[-1] = taken[-1], taken[last]
    return row_E + first_row, column_E, first_row + len(taken) - 1, taken[-1]


def lay_out(segments: Sequence[Segment], layout: Layout, pad_id: int) -> tuple[TokenInputs, Int64]:
    """Move all tokens to their places; return what the encoder reads, and each token's flattened position, [T]."""
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

    noised_N = noise_NW = None
    noisy = [(start, s) for start, s in zip(token_starts(segments), segments, strict=False) if len(s.noised_N)]
    if noisy:
        noised_N = torch.from_numpy(np.concatenate([flat_T[segment.noised_N + start] for start, segment in noisy]))
        noise_NW = torch.from_numpy(np.concatenate([segment.noise_NW for _, segment in noisy]))
    types_RL = None
    if any(segment.types_T is not None for segment in segments):
        types = [np.zeros(len(s.ids_T), dtype=np.int8) if s.types_T is None else s.types_T for s in segments]
        types_RL = scatter(np.concatenate(types), 0, np.int64)
    inputs = TokenInputs(
        ids_RL=scatter(joined("ids_T"), pad_id, np.int64),
        positions_RL=scatter(joined("positions_T"), 0, np.int64),
        ranks_RL=scatter(joined("ranks_T"), 0, np.int32),
        key_ranks_RL=scatter(joined("key_ranks_T"), 0, np.int32),
        texts_RL=scatter(np.repeat(np.arange(len(lengths_E)), lengths_E), -1, np.int32),
        first_E=torch.from_numpy(first_E.astype(np.int64)),
        lengths_E=torch.from_numpy(lengths_E.astype(np.int64)),
        types_RL=types_RL,
        noised_N=noised_N,
        noise_NW=noise_NW,
    )
    return inputs, flat_T
