"""Products over row ranges whose lengths are rounded up equal products over the ranges themselves."""

from __future__ import annotations

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from aang_ray.gradients.engine import Request
from aang_ray.gradients.ledger import Ledger
from aang_ray.gradients.products import MULTIPLE, PaddedCopies, SegmentProducts, Windows
from aang_ray.gradients.rules import Sums
from aang_ray.model.segments import SegmentRows


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


def test_sums_of_half_precision_rows() -> None:
    rows = SegmentRows((0, 3, 3, 10))
    parameter = nn.Parameter(torch.zeros(4))
    ledger = Ledger([parameter], Request(torch.zeros(3), scores=True), [rows])
    grads = torch.randint(-2, 3, (10, 4), generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = torch.stack([grads[rows.of(s)].float().sum(0) for s in range(3)])
    assert torch.equal(Sums(grads, rows).columns(torch.float32, ledger.members), expected)
    other = SegmentRows((0, 1, 2, 10))
    expected = torch.stack([grads[other.of(s)].float().sum(0) for s in range(3)])
    assert torch.equal(Sums(grads, other).columns(torch.float32, ledger.members), expected)
