"""phi* follows PyTorch's AdamW, stops where it should, and is the same for the same seed."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from aang_ray.gradients import dev_head
from aang_ray.gradients.dev_head import fit_dev_head


def sample(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(32, 12, generator=generator).to(dtype), torch.randint(0, 3, (32,), generator=generator)


def by_torch(head: nn.Module, features: torch.Tensor, labels: torch.Tensor) -> int:
    """The same fit by `torch.optim.AdamW`; returns how many steps it took."""
    head.requires_grad_(True)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2, weight_decay=0.1)
    previous = float("inf")
    for step in range(10):
        loss = F.cross_entropy(head(features), labels)
        if abs(previous - float(loss)) < dev_head.TOLERANCE:
            return step
        previous = float(loss)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    return 10


@pytest.mark.parametrize(("tolerance", "steps"), [(0.0, 10), (0.1, None)])
def test_follows_adamw(tolerance: float, steps: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = sample()
    monkeypatch.setattr(dev_head, "STEPS", 0)
    start = fit_dev_head(features, labels, 3, seed=1)
    monkeypatch.undo()
    monkeypatch.setattr(dev_head, "TOLERANCE", tolerance)
    taken = by_torch(start, features, labels)
    assert taken == steps if steps is not None else 0 < taken < 10
    found = fit_dev_head(features, labels, 3, seed=1)
    for ours, theirs in zip(found.parameters(), start.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-9, atol=1e-12)


def test_reproducible_frozen_and_alone() -> None:
    features, labels = sample(torch.float32)
    state = torch.get_rng_state()
    first, again, other = (fit_dev_head(features, labels, 3, seed) for seed in (5, 5, 6))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))
    assert not any(p.requires_grad for p in first.parameters())
    assert F.cross_entropy(first(features), labels) < 1.0
