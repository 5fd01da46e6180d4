"""Training attention in half precision equals PyTorch's, dropout and gradients included."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from aang_ray.model import training_attention
from aang_ray.model.attention import TokenInputs
from aang_ray.model.training_attention import NAME, attention
from tests.model.families import FAMILIES, small_encoder

ROWS, HEADS, LENGTH, WIDTH = 5, 3, 16, 8
Attention = Callable[..., tuple[Tensor, None]]


def computed(function: Attention, dtype: torch.dtype, dropout: float, scaling: float | None = None) -> list[Tensor]:
    """The result and the gradients of query, key and value, from numbers that half precision holds exactly."""
    generator = torch.Generator().manual_seed(7)
    shape = (ROWS, LENGTH, HEADS, WIDTH)
    given = [torch.randn(shape, generator=generator).bfloat16().to(dtype).transpose(1, 2) for _ in range(3)]
    for tensor in given:
        tensor.requires_grad_()
    hidden_RLL = torch.rand(ROWS, LENGTH, LENGTH, generator=generator) < 0.4
    hidden_RLL[:, :, 0] = False
    mask = torch.zeros(ROWS, 1, LENGTH, LENGTH, dtype=dtype)
    mask.masked_fill_(hidden_RLL[:, None], torch.finfo(dtype).min)
    torch.manual_seed(3)
    out, _ = function(nn.Module(), *given, mask, dropout=dropout, scaling=scaling)
    out.backward(torch.randn(shape, generator=generator).bfloat16().to(dtype))
    gradients = [tensor.grad for tensor in given]
    return [found.detach().double() for found in (out, *gradients) if found is not None]


@pytest.mark.parametrize("group", [1, 2 * HEADS * LENGTH**2, training_attention.GROUP], ids=["one", "two", "all"])
@pytest.mark.parametrize("scaling", [None, 0.7])
@pytest.mark.parametrize("dropout", [0.0, 0.1, 0.5])
def test_equals_pytorch(monkeypatch: pytest.MonkeyPatch, dropout: float, scaling: float | None, group: int) -> None:
    monkeypatch.setattr(training_attention, "GROUP", group // torch.get_num_threads() or 1)
    expected = computed(sdpa_attention_forward, torch.float32, dropout, scaling)
    found = computed(attention, torch.bfloat16, dropout, scaling)
    assert len(found) == 4
    for one, other in zip(found, expected, strict=True):
        # One rounding to bf16, 2**-9 of a number.
        assert (one - other).norm() < 2.0**-8 * other.norm()


def test_it_is_what_computes_in_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.dtype] = []

    def count(module: nn.Module, query: Tensor, *args: Tensor, **settings: float) -> tuple[Tensor, None]:
        asked.append(query.dtype)
        return query.transpose(1, 2).contiguous(), None

    monkeypatch.setattr(training_attention, "sdpa_attention_forward", count)
    mask = torch.zeros(1, 1, 4, 4)
    for dtype in (torch.bfloat16, torch.float32):
        q = torch.randn(1, 2, 4, 8, dtype=dtype, requires_grad=True)
        attention(nn.Module(), q, q, q, mask)
        with torch.no_grad():
            attention(nn.Module(), q, q, q, mask)
    assert asked == [torch.bfloat16, torch.float32, torch.float32]


@pytest.mark.parametrize("family", FAMILIES)
def test_families_compute_what_they_computed(family: str) -> None:
    """A training step of two layers under autocast, with dropout, beside the same with PyTorch's attention."""
    generator = torch.Generator().manual_seed(0)
    ids_RL = torch.randint(5, 97, (3, 12), generator=generator)
    ranks_RL = torch.zeros(3, 12, dtype=torch.int32)
    inputs = TokenInputs(
        ids_RL,
        torch.arange(12).expand(3, 12),
        ranks_RL,
        ranks_RL,
        torch.arange(3, dtype=torch.int32)[:, None].expand(3, 12),
        torch.arange(3) * 12,
        torch.full((3,), 12),
    )
    found: list[Tensor] = []
    for implementation in (NAME, "sdpa"):
        encoder = small_encoder(family, layers=2, dropout=0.1)
        if encoder.body.config._attn_implementation == NAME:
            encoder.body.set_attn_implementation(implementation)
        torch.manual_seed(1)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden_RLH = encoder(inputs)
        hidden_RLH.float().square().sum().backward()
        found.append(torch.cat([p.grad.flatten() for p in encoder.parameters() if p.grad is not None]))
    assert (found[0] - found[1]).norm() < 0.02 * found[1].norm()


def test_supported_families_use_it() -> None:
    using = {family for family in FAMILIES if small_encoder(family, layers=1).body.config._attn_implementation == NAME}
    assert using == {"bert", "roberta", "distilbert", "electra", "modernbert"}


def test_a_learned_mask_keeps_its_gradient() -> None:
    q = torch.randn(1, 2, 4, 8, dtype=torch.bfloat16, requires_grad=True)
    mask = torch.zeros(1, 1, 4, 4, dtype=torch.bfloat16, requires_grad=True)
    attention(nn.Module(), q, q, q, mask)[0].sum().backward()
    assert mask.grad is not None
