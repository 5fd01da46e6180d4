"""Rows hold every token once, texts whole, segments contiguous."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aang_ray.objectives.packing import Layout, one_per_row, pack

segments = st.lists(st.lists(st.integers(1, 64), max_size=12), min_size=1, max_size=6)


def check(layout: Layout, lengths: list[list[int]]) -> None:
    owner = np.full((layout.rows, layout.width), -1)
    everything = [(number, length) for number, segment in enumerate(lengths) for length in segment]
    for text, (number, length) in enumerate(everything):
        place = (layout.row_E[text], slice(layout.column_E[text], layout.column_E[text] + length))
        assert layout.column_E[text] + length <= layout.width
        assert (owner[place] == -1).all()
        owner[place] = number
    flat = owner.reshape(-1)
    assert len(layout.bounds) == len(lengths) + 1
    assert layout.bounds[0] == 0
    assert layout.bounds[-1] == layout.rows * layout.width
    for number in range(len(lengths)):
        inside = flat[layout.bounds[number] : layout.bounds[number + 1]]
        assert set(inside.tolist()) <= {-1, number}


@given(segments)
def test_packed_rows(lengths: list[list[int]]) -> None:
    check(pack([np.asarray(s, dtype=np.int64) for s in lengths], 64), lengths)


@given(segments)
def test_a_row_each(lengths: list[list[int]]) -> None:
    check(one_per_row([np.asarray(s, dtype=np.int64) for s in lengths], 64), lengths)


def test_little_is_wasted() -> None:
    rng = np.random.default_rng(0)
    lengths = [np.clip(rng.normal(30, 12, size=10).astype(np.int64), 5, 64) for _ in range(26)]
    layout = pack(lengths, 64)
    used = sum(int(length.sum()) for length in lengths)
    assert used / (layout.rows * layout.width) > 0.85


def test_a_text_longer_than_a_row_is_refused() -> None:
    with pytest.raises(ValueError, match="does not fit"):
        pack([np.array([65])], 64)


@given(segments, st.integers(1, 8))
def test_the_number_of_rows_is_rounded_up(lengths: list[list[int]], multiple: int) -> None:
    arrays = [np.asarray(s, dtype=np.int64) for s in lengths]
    layout = pack(arrays, 64, multiple)
    check(layout, lengths)
    assert layout.rows % multiple == 0
    assert layout.rows - pack(arrays, 64).rows < multiple
