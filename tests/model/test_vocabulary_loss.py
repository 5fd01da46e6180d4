"""The losses and gradients of a decoder in blocks are those of dense logits and PyTorch's cross-entropy."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from aang_ray.model import vocabulary_loss
from aang_ray.model.heads import Decoder, OwnDecoder, TiedDecoder
from aang_ray.model.segments import PassUpdate, SegmentRows, pass_update, segment_rows
from aang_ray.model.vocabulary_loss import decoded_losses
from aang_ray.train.device import activation_bytes

ROWS, WIDTH, VOCABULARY = 11, 6, 37


@pytest.fixture(params=[(4, 2), (4, 4), (64, 64)])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that do not divide the rows, and one that holds them all."""
    rows, in_cache = request.param
    monkeypatch.setattr(vocabulary_loss, "ROWS", {"cpu": rows})
    monkeypatch.setattr(vocabulary_loss, "ROWS_IN_CACHE", {"cpu": in_cache})


def made(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (
        torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in ((ROWS, WIDTH), (VOCABULARY, WIDTH), (VOCABULARY,))
    )
    return x, weight, bias, torch.randint(VOCABULARY, (ROWS,), generator=generator)


def dense(x: Tensor, weight: Tensor, bias: Tensor, label: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, weight, bias), label, reduction="none")


@pytest.mark.usefixtures("blocks")
def test_losses_and_gradients_are_those_of_dense_logits() -> None:
    x, weight, bias, label = made()
    scale = torch.linspace(-1.0, 2.0, ROWS, dtype=torch.float64)
    expected, found = dense(x, weight, bias, label), decoded_losses(x, weight, bias, label)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for one, other in zip(
        torch.autograd.grad(found @ scale, (x, weight, bias)),
        torch.autograd.grad(expected @ scale, (x, weight, bias)),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("blocks")
def test_large_logits_neither_overflow_nor_lose_the_loss() -> None:
    x, weight, bias, label = made()
    expected = dense(1e3 * x, weight, bias, label)
    found = decoded_losses(1e3 * x, weight, bias, label)
    assert expected.max() > 1e3
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("blocks")
def test_gradients_by_finite_differences() -> None:
    x, weight, bias, label = made()
    assert torch.autograd.gradcheck(lambda *inputs: decoded_losses(*inputs, label), (x, weight, bias))


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("kind", [TiedDecoder, OwnDecoder])
@pytest.mark.parametrize("frozen", [(), ("weight",), ("bias",)])
def test_sums_of_the_forward_pass_are_the_gradients(kind: type[Decoder], frozen: tuple[str, ...]) -> None:
    """With the coefficients announced, the forward pass computes what the backward pass would."""
    x, weight, bias, label = made()
    table = torch.nn.Embedding.from_pretrained(weight.detach().clone(), freeze=False)
    decoder = kind(table, bias.detach())  # type: ignore[call-arg]
    matrix = decoder.matrix
    assert isinstance(matrix, torch.nn.Parameter)
    for name, parameter in (("weight", matrix), ("bias", decoder.bias)):
        parameter.requires_grad_(name not in frozen)
    rows = SegmentRows((0, 4, 4, ROWS))
    coefficients_S = torch.tensor([0.5, 9.0, -2.0])
    label_weight = torch.linspace(0.1, 1.0, ROWS)
    scale = label_weight.double() * coefficients_S.double()[torch.tensor([0] * 4 + [2] * 7)]
    with segment_rows(rows), pass_update(PassUpdate(coefficients_S)):
        torch.autograd.backward(decoder(x, label, label_weight) @ scale)
    expected = torch.autograd.grad(dense(x, weight, bias, label) @ scale, (x, weight, bias))
    torch.testing.assert_close(x.grad, expected[0], rtol=1e-12, atol=1e-12)
    for name, parameter, gradient in (("weight", matrix, expected[1]), ("bias", decoder.bias, expected[2])):
        if name in frozen:
            assert parameter.grad is None
        else:
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-12, atol=1e-12)


def test_half_precision_products_keep_fp32_losses() -> None:
    x, weight, bias, label = made(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = decoded_losses(x, weight, bias, label)
        logits = F.linear(x, weight, bias)
    expected = F.cross_entropy(logits.float(), label, reduction="none")
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    for one, other in zip(
        torch.autograd.grad(found.sum(), (x, weight, bias)),
        torch.autograd.grad(expected.sum(), (x, weight, bias)),
        strict=True,
    ):
        assert one.dtype == torch.float32
        assert float((one - other).norm() / other.norm()) < 0.01


def test_no_rows() -> None:
    x, weight, bias, label = made()
    losses = decoded_losses(x[:0], weight, bias, label[:0])
    assert losses.shape == (0,)
    assert not torch.autograd.grad(losses.sum(), weight)[0].any()


def test_the_pass_keeps_less_than_the_logits() -> None:
    """What the backward pass needs grows with the width and not with the vocabulary: `batch.micro: auto` counts it."""
    weight, bias = torch.randn(4096, 8, requires_grad=True), torch.zeros(4096, requires_grad=True)

    def kept(rows: int) -> int:
        x, label = torch.randn(rows, 8, requires_grad=True), torch.zeros(rows, dtype=torch.long)
        return activation_bytes(lambda: decoded_losses(x, weight, bias, label))

    assert kept(200) - kept(100) <= 100 * (2 * 8 * 4 + 8)
