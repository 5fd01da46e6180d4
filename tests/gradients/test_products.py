"""Inner products of long vectors keep their digits; products of padded row ranges equal those of the ranges."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from aang_ray.gradients.products import MULTIPLE, RUN, PaddedCopies, SegmentProducts, Windows, products
from aang_ray.model.segments import SegmentRows


@pytest.mark.parametrize("size", [1, RUN - 1, RUN, 3 * RUN + 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_to_one_product_in_double_precision(size: int, dtype: torch.dtype) -> None:
    torch.manual_seed(size)
    rows, others = torch.randn(4, size, dtype=dtype), torch.randn(3, size, dtype=dtype)
    found = products(rows, others)
    assert found.dtype == dtype
    torch.testing.assert_close(found, (rows.double() @ others.double().t()).to(dtype), rtol=1e-5, atol=1e-3)


def test_long_sums_keep_their_digits() -> None:
    # 5e6 entries of 1 + 2^-12 each: the square is 1 + 2^-11 + 2^-24 times 5e6. Summed one by one in fp32 it would be
    # off by more than 1e-4.
    size = 5_000_000
    row = torch.full((1, size), 1 + 2.0**-12)
    assert products(row, row).item() == pytest.approx(size * (1 + 2.0**-12) ** 2, rel=1e-6)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 150), min_size=1, max_size=6).filter(any), st.booleans())
@example([MULTIPLE, 0, 1, 2 * MULTIPLE], True)
@example([3], False)
def test_products_of_rounded_ranges(lengths: list[int], wide_inputs: bool) -> None:
    bounds = tuple(sum(lengths[:i]) for i in range(len(lengths) + 1))
    rows = SegmentRows(bounds)
    generator = torch.Generator().manual_seed(0)
    # Small integers: bf16 holds them, their products and, in fp32, their sums exactly.
    grads = torch.randint(-2, 3, (bounds[-1], 4), generator=generator).bfloat16()
    inputs = torch.randint(-2, 3, (bounds[-1], 6 if wide_inputs else 3), generator=generator).bfloat16()
    padded = PaddedCopies()
    for _ in range(2):  # the second time with the copy that was kept
        aligned = SegmentProducts(grads, inputs, rows, padded)
        for segment in range(rows.count):
            part = rows.of(segment)
            expected = grads[part].float().t() @ inputs[part].float()
            torch.testing.assert_close(aligned.product(segment).float(), expected.bfloat16().float(), rtol=0, atol=0)


def test_a_kept_copy_is_of_the_same_rows_and_values() -> None:
    rows, other = SegmentRows((0, 64, 128)), SegmentRows((0, 100, 128))
    values = torch.randn(128, 3).bfloat16()
    padded, windows = PaddedCopies(), Windows.of(rows)
    assert windows is not None
    first = padded.copy(values, rows, windows)
    assert padded.copy(values, rows, windows) is first
    of_other = Windows.of(other)
    assert of_other is not None
    assert padded.copy(values, other, of_other) is not first
    changed = padded.copy(values, rows, windows)
    values += 1
    assert padded.copy(values, rows, windows) is not changed
    assert torch.equal(padded.copy(values, rows, windows), values)


def test_lengths_become_few() -> None:
    bounds = tuple(range(0, 1300, 13))
    windows = Windows.of(SegmentRows(bounds))
    assert windows is not None
    assert {w.stop - w.start for w in (*windows.copies, *windows.originals)} == {MULTIPLE}
    assert Windows.of(SegmentRows((0, 20, 30))) is None
