"""The examples of one segment of a step, corrupted, ranked and labelled: host arrays, texts end to end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from aang_ray.model.attention import TokenInputs
from aang_ray.objectives.texts import Float32, Float64, Int32, Int64, Vocabulary


@dataclass(frozen=True)
class Drawn:
    """Tokens in whose place the denoise head's samples are put, on the device. Suffix: G such tokens."""

    at_G: Int64
    """Indices into the segment's T axis, ascending; the ids there are the originals."""
    uniform_G: Float64
    """The number in [0, 1) that chooses each sample."""
    vocabulary: Vocabulary


def _nowhere() -> Int64:
    return np.zeros(0, dtype=np.int64)


def _no_labels() -> npt.NDArray[Any]:
    return np.zeros(0, dtype=np.int32)


def _no_noise() -> Float32:
    return np.zeros((0, 0), dtype=np.float32)


@dataclass(frozen=True)
class Segment:
    """A segment's texts. Suffixes: T tokens, E texts, M labelled positions, N noised tokens, W width of embeddings.

    Exactly one of (`targets_M`, `classes_E`) is the label: one a position, or one a text. Integer labels
    are classes or token ids, real ones are values.
    """

    name: str
    head: str
    """Which head reads it."""
    ids_T: Int32
    positions_T: Int64
    ranks_T: Int32
    key_ranks_T: Int32
    lengths_E: Int64
    labelled_M: Int64 = field(default_factory=_nowhere)
    """Labelled positions, as indices into the T axis, ascending."""
    targets_M: npt.NDArray[Any] = field(default_factory=_no_labels)
    """What is to be predicted there: [M] or [M, C]."""
    classes_E: npt.NDArray[Any] | None = None
    """Label of each text where the label is one of the text."""
    representation: str | None = None
    """R of the objective; None for the end task and dev, which have none."""
    normaliser: float = 0.0
    """Sum of the label weights over the whole segment at this step: the mean's denominator."""
    weighted: bool = True
    """Whether `classes_E` are the end task's classes, which may have weights."""
    noised_N: Int64 = field(default_factory=_nowhere)
    """Tokens whose embeddings get noise, as indices into the T axis, ascending."""
    noise_NW: Float32 = field(default_factory=_no_noise)
    drawn: Drawn | None = None

    @property
    def texts(self) -> int:
        return len(self.lengths_E)

    def part(self, start: int, stop: int) -> Segment:
        """Texts start to stop, with the whole segment's normaliser."""
        ends = np.concatenate(([0], np.cumsum(self.lengths_E)))
        tokens = slice(int(ends[start]), int(ends[stop]))
        labels = _between(self.labelled_M, tokens)
        noised = _between(self.noised_N, tokens)
        drawn = self.drawn
        if drawn is not None:
            chosen = _between(drawn.at_G, tokens)
            drawn = replace(drawn, at_G=drawn.at_G[chosen] - tokens.start, uniform_G=drawn.uniform_G[chosen])
        return replace(
            self,
            ids_T=self.ids_T[tokens],
            positions_T=self.positions_T[tokens],
            ranks_T=self.ranks_T[tokens],
            key_ranks_T=self.key_ranks_T[tokens],
            lengths_E=self.lengths_E[start:stop],
            labelled_M=self.labelled_M[labels] - tokens.start,
            targets_M=self.targets_M[labels],
            classes_E=None if self.classes_E is None else self.classes_E[start:stop],
            noised_N=self.noised_N[noised] - tokens.start,
            noise_NW=self.noise_NW[noised],
            drawn=drawn,
        )


def label_weight(segment: Segment, class_weights_C: npt.NDArray[np.float32] | None) -> float:
    """Sum of the label weights of a segment, or of part of one: its normaliser where it is whole."""
    if segment.classes_E is None:
        return float(len(segment.labelled_M))
    if class_weights_C is None or not segment.weighted:
        return float(segment.texts)
    return float(class_weights_C[segment.classes_E].sum())


def _between(indices: Int64, tokens: slice) -> slice:
    """Which of ascending indices lie in a range."""
    first, last = np.searchsorted(indices, (tokens.start, tokens.stop))
    return slice(int(first), int(last))


# --- objectives.packing: Lay texts out in rows so that little is padding and every segment is one contiguous range.
#
# Rows are read one after another. Inside a segment texts are placed best-fit decreasing; the last row
# of a segment, the one with most room, may be continued by the next segment. So flattened positions
# [R * L] stay contiguous per segment, and the waste is a few per cent.


@dataclass(frozen=True)
class Layout:
    """Where each text goes. Texts are numbered over all segments, in their order."""

    width: int
    rows: int
    row_E: Int64
    column_E: Int64
    bounds: tuple[int, ...]
    """Flattened position at which each segment begins, and the end: S + 1 entries."""


def pack(lengths: Sequence[Int64], width: int, multiple: int = 1) -> Layout:
    """Place the texts of each segment (their lengths in tokens) into rows of `width` tokens.

    The number of rows is rounded up to a multiple.

    Raises:
        ValueError: if a text is longer than a row.
    """
    places: list[tuple[Int64, Int64]] = []
    bounds = [0]
    open_row, used = 0, 0  # the row that the next segment may continue, and what is taken of it
    for lengths_E in lengths:
        row_E, column_E, open_row, used = _place(lengths_E, width, open_row, used)
        places.append((row_E, column_E))
        bounds.append(open_row * width + used)
    rows = -(-(open_row + (1 if used else 0)) // multiple) * multiple
    # Padding at the very end belongs to the last segment that has texts.
    bounds = [rows * width if bound == bounds[-1] else bound for bound in bounds]
    return Layout(
        width,
        rows,
        np.concatenate([row for row, _ in places]),
        np.concatenate([column for _, column in places]),
        tuple(bounds),
    )


def one_per_row(lengths: Sequence[Int64], width: int) -> Layout:
    """Every text in a row of its own."""
    counts = [len(lengths_E) for lengths_E in lengths]
    total = sum(counts)
    bounds = np.concatenate(([0], np.cumsum(counts))) * width
    return Layout(
        width, total, np.arange(total), np.zeros(total, dtype=np.int64), tuple(int(bound) for bound in bounds)
    )


def _place(lengths_E: Int64, width: int, first_row: int, used: int) -> tuple[Int64, Int64, int, int]:
    """Best-fit decreasing from `first_row`, of which `used` tokens are taken.

    Returns rows, columns, and the last row with what is taken of it.
    """
    if len(lengths_E) and int(lengths_E.max()) > width:
        raise ValueError(f"a text of {int(lengths_E.max())} tokens does not fit into a row of {width}")
    taken = [used]
    row_E = np.zeros(len(lengths_E), dtype=np.int64)
    column_E = np.zeros(len(lengths_E), dtype=np.int64)
    for text in np.argsort(-lengths_E, kind="stable"):
        length = int(lengths_E[text])
        best = -1
        for row, fill in enumerate(taken):
            if fill + length <= width and (best < 0 or fill > taken[best]):
                best = row
        if best < 0:
            best = len(taken)
            taken.append(0)
        row_E[text], column_E[text] = best, taken[best]
        taken[best] += length
    # The continued row stays first; of the new ones the emptiest goes last, to be continued in turn.
    if len(taken) > 2:
        last = 1 + int(np.argmin(taken[1:]))
        order = np.arange(len(taken))
        order[last], order[-1] = len(taken) - 1, last
        row_E = order[row_E]
        taken[last], taken[-1] = taken[-1], taken[last]
    return row_E + first_row, column_E, first_row + len(taken) - 1, taken[-1]


# --- objectives.lay_out: The texts of segments as what an encoder reads: packed rows of tokens.


SHORTEST_ROW = 64
"""Rows narrower than this waste more at their ends than attention saves."""
ROWS_MULTIPLE = 4
"""Rows are rounded up to it with some that weigh nothing: half-precision kernels on a CPU are generated, and kept,
for every new shape that they meet."""


def row_width(longest: int) -> int:
    """A width that holds the longest text, of few that are possible: four to a doubling."""
    step = max(16, 1 << max(0, longest.bit_length() - 3))
    return max(SHORTEST_ROW, -(-longest // step) * step)


def packed(lengths: Sequence[Int64]) -> Layout:
    """Rows for the texts of each segment, given their lengths in tokens."""
    longest = max((int(length.max()) for length in lengths if len(length)), default=1)
    return pack(lengths, row_width(longest), ROWS_MULTIPLE)


def lay_out(segments: Sequence[Segment], layout: Layout, pad_id: int) -> tuple[TokenInputs, Int64]:
    """Scatter all tokens to their places; also returns each token's flattened position [R * L]."""
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

    noised_N, noise_NW = _noise(segments, flat_T)
    inputs = TokenInputs(
        ids_RL=scatter(joined("ids_T"), pad_id, np.int64),
        positions_RL=scatter(joined("positions_T"), 0, np.int64),
        ranks_RL=scatter(joined("ranks_T"), 0, np.int32),
        key_ranks_RL=scatter(joined("key_ranks_T"), 0, np.int32),
        texts_RL=scatter(np.repeat(np.arange(len(lengths_E)), lengths_E), -1, np.int32),
        first_E=torch.from_numpy(first_E.astype(np.int64)),
        lengths_E=torch.from_numpy(lengths_E.astype(np.int64)),
        noised_N=noised_N,
        noise_NW=noise_NW,
    )
    return inputs, flat_T


def starts(segments: Sequence[Segment]) -> Int64:
    """Where each segment's tokens begin among those of all."""
    return np.concatenate(([0], np.cumsum([len(segment.ids_T) for segment in segments])))


def _noise(segments: Sequence[Segment], flat_T: Int64) -> tuple[Tensor | None, Tensor | None]:
    noisy = [(start, s) for start, s in zip(starts(segments), segments, strict=False) if len(s.noised_N)]
    if not noisy:
        return None, None
    at_N = np.concatenate([flat_T[segment.noised_N + start] for start, segment in noisy])
    return torch.from_numpy(at_N), torch.from_numpy(np.concatenate([segment.noise_NW for _, segment in noisy]))
