"""The Gram matrix, separate gradients and per-example norms, compared with other libraries."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Literal

import pytest
import torch
from opacus import GradSampleModule
from torch import nn
from torch.nn import functional as F
from torchjd.autojac import jac

from aang_ray.errors import UserError
from aang_ray.gradients import SegmentEngine, make_engine
from aang_ray.gradients.engine import Request
from tests.gradients.examples import example_losses, examples, heads_of
from tests.gradients.steps import SEGMENTS, make_heads, reference, run, text_losses, text_piece
from tests.model.families import small_encoder

COEFFICIENTS = torch.tensor([0.0, 0.5, 0.3, 0.15, 0.05])


@pytest.mark.parametrize("family", ["bert", "mpnet", "modernbert"])
def test_gram_matrix_equals_torchjd(family: str) -> None:
    # TorchJD differentiates both uses of the table.
    encoder = small_encoder(family, dtype=torch.float64, pooling="mean")
    heads = make_heads(encoder, torch.float64)
    piece, losses = text_piece(SEGMENTS), text_losses(encoder, heads)
    engine = SegmentEngine(encoder, heads, tied_in_scores=True)
    result, _ = run(engine, encoder, heads, [piece], losses, Request(COEFFICIENTS, gram=True))
    parameters = list(encoder.parameters())
    jacobians = jac(list(losses(piece)), parameters, parallel_chunk_size=1)
    matrix = torch.cat([jacobian.flatten(1) for jacobian in jacobians], dim=1)
    assert result.gram_SS is not None
    assert result.dots_S is None
    torch.testing.assert_close(result.gram_SS, matrix @ matrix.t(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", ["bert", "deberta-v2"])
def test_separate_gradients(family: str) -> None:
    encoder = small_encoder(family, dtype=torch.float64)
    heads = make_heads(encoder, torch.float64)
    piece, losses = text_piece(SEGMENTS), text_losses(encoder, heads)
    expected = reference(encoder, heads, piece, losses, COEFFICIENTS)
    request = Request(COEFFICIENTS, scores=True, gram=True, separate=True)
    result, _ = run(SegmentEngine(encoder, heads, False), encoder, heads, [piece], losses, request)
    assert result.separate_SP is not None
    torch.testing.assert_close(result.separate_SP, expected.scored_SP, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(result.gram_SS, expected.scored_SP @ expected.scored_SP.t(), rtol=1e-9, atol=1e-12)


def test_gram_matrix_of_a_large_table() -> None:
    """A table with more entries than rows: its gradients are never stored as dense matrices."""
    body = nn.Sequential(nn.Embedding(400, 4), nn.Flatten(), nn.Linear(12, 5)).double()
    heads = heads_of(5)
    ids = torch.randint(0, 6, (9, 3), generator=torch.Generator().manual_seed(0)) * 50
    piece, losses = examples(ids, (0, 2, 5, 5, 9), positions=3), example_losses(body, heads["head"])

    coefficients = COEFFICIENTS[:4]
    expected = reference(body, heads, piece, losses, coefficients)
    for request in (Request(coefficients, gram=True), Request(coefficients, scores=True, joint_from=1)):
        result, updates = run(SegmentEngine(body, heads, False), body, heads, [piece], losses, request)
        gram = expected.scored_SP @ expected.scored_SP.t()
        if result.gram_SS is not None:
            torch.testing.assert_close(result.gram_SS, gram, rtol=1e-9, atol=1e-12)
        else:
            torch.testing.assert_close(result.norms2_S, gram.diagonal(), rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(result.dots_S, gram[0], rtol=1e-9, atol=1e-12)
            joint_S = coefficients.double().index_fill(0, torch.tensor([0]), 0.0)
            torch.testing.assert_close(result.joint_norm2, joint_S @ gram @ joint_S, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(updates["0.weight"], expected.updates["0.weight"], rtol=1e-9, atol=1e-12)


def test_per_example_norms_equal_opacus() -> None:
    def network() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.Tanh(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 8), nn.LayerNorm(8), nn.Tanh()
        ).double()

    images = torch.randn(6, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    heads, body = heads_of(8), network()
    piece = examples(images, range(7))
    request = Request(torch.full((6,), 1 / 6), scores=True)
    result, _ = run(
        SegmentEngine(body, heads, False), body, heads, [piece], example_losses(body, heads["head"]), request
    )
    theirs = GradSampleModule(network(), loss_reduction="sum")
    torch.autograd.backward(F.cross_entropy(heads["head"](theirs(images)), piece.classes_N, reduction="sum"))
    norms2 = torch.stack([p.grad_sample.flatten(1).square().sum(1) for p in theirs.parameters()]).sum(0)
    torch.testing.assert_close(result.norms2_S, norms2, rtol=1e-9, atol=0.0)


@pytest.mark.parametrize("name", ["segments", "loop"])
def test_memory_is_checked_before_the_step(name: Literal["segments", "loop"], monkeypatch: pytest.MonkeyPatch) -> None:
    body, heads = nn.Linear(5, 6), heads_of(6, torch.float32)
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=575))
    engine = make_engine(name, body, heads, tied_in_scores=False)

    def never(_: object) -> torch.Tensor:
        raise AssertionError("the step began")

    # 4 segments, 36 entries of 4 bytes.
    with pytest.raises(UserError, match=r"need 576 bytes, 575 are free on cpu: lower n or encoder\.layers"):
        engine([examples(torch.randn(4, 5), range(5))], never, Request(COEFFICIENTS[:4], separate=True))
