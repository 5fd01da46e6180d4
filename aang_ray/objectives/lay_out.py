"""The texts of segments as what an encoder reads: packed rows of tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from aang_ray.model.inputs import TokenInputs
from aang_ray.objectives.packing import Layout, pack
from aang_ray.objectives.segment import Segment
from aang_ray.objectives.texts import Int64

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
