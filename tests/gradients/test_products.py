"""Inner products of long vectors."""

from __future__ import annotations

import pytest
import torch

from aang_ray.gradients.products import RUN, products


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
