"""Lay texts out in rows so that little is padding and every segment is one contiguous range.

Rows are read one after another. Inside a segment texts are placed best-fit decreasing; the last row
of a segment, the one with most room, may be continued by the next segment. So flattened positions
[R * L] stay contiguous per segment, and the waste is a few per cent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from aang_ray.objectives.texts import Int64


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
