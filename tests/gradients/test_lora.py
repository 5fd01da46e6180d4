"""With adapters, both engines return the gradients of the adapters alone, and heads use a frozen table."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from torch import Tensor, nn

from aang_ray.gradients import make_engine, single_pass
from aang_ray.gradients.engine import Request
from aang_ray.gradients.regions import Call, Regions
from tests.gradients.steps import (
    JOINT_FROM,
    SEGMENTS,
    WIDTH,
    assert_matches,
    make_heads,
    reference,
    run,
    text_losses,
    text_piece,
)
from tests.gradients.test_accumulation import CUTS, pieces_of
from tests.gradients.test_single_pass import COEFFICIENTS
from tests.model.families import FAMILIES
from tests.model.test_lora import adapted


@pytest.mark.parametrize("targets", [None, "all-linear"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_each_loss_differentiated(
    family: str, dtype: torch.dtype, tolerance: float, targets: str | None
) -> None:
    encoder = adapted(family, dtype, dropout=0.2, targets=targets, rank=4)
    heads = make_heads(encoder, dtype)
    table = encoder.word_embeddings.weight
    piece, losses = text_piece(SEGMENTS), text_losses(encoder, heads)
    torch.manual_seed(7)
    expected = reference(encoder, heads, piece, losses, COEFFICIENTS)
    request = Request(COEFFICIENTS, scores=True, joint_from=JOINT_FROM)
    for tied_in_scores in (False, True):  # the table has no gradient, so this makes no difference
        torch.manual_seed(7)
        engine = make_engine("segments", encoder, heads, tied_in_scores=tied_in_scores)
        result, updates = run(engine, encoder, heads, [piece], losses, request)
        assert_matches(result, updates, expected, tolerance)
        assert table.grad is None
        assert not table.requires_grad
    assert float(updates["heads.token.decoder.bias"].norm()) > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_single_pass_equals_loop(family: str) -> None:
    encoder = adapted(family, torch.float64, targets="all-linear", rank=2)
    heads = make_heads(encoder, torch.float64)
    losses = text_losses(encoder, heads)
    request = Request(COEFFICIENTS, scores=True, joint_from=JOINT_FROM, gram=True, separate=True)
    size = sum(p.numel() for p in encoder.parameters() if p.requires_grad)
    found = []
    for name, parts in (("segments", [text_piece(SEGMENTS)]), ("loop", pieces_of(CUTS["one a segment"]))):
        engine = make_engine(name, encoder, heads, tied_in_scores=False)
        found.append(run(engine, encoder, heads, parts, losses, request))
    (ours, update), (loop, expected) = found
    for single, looped in ((ours.separate_SP, loop.separate_SP), (ours.gram_SS, loop.gram_SS)):
        assert single is not None
        assert looped is not None
        torch.testing.assert_close(single, looped, rtol=1e-9, atol=1e-12)
    assert ours.separate_SP is not None
    assert ours.separate_SP.shape == (len(SEGMENTS), size)
    for name, gradient in expected.items():
        torch.testing.assert_close(update[name], gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_need_one_pass(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A and B have the rule of linear layers, except where DeBERTa projects its relative positions, too."""
    encoder = adapted(family, targets="all-linear")
    heads = make_heads(encoder, torch.float32)
    found: set[nn.Parameter] = set()

    class Watched(Regions):
        def __init__(self, calls: Iterable[Call], losses_S: Tensor, wanted: frozenset[nn.Parameter]) -> None:
            super().__init__(calls, losses_S, wanted)
            found.update(self.parameters)

    monkeypatch.setattr(single_pass, "Regions", Watched)
    engine = make_engine("segments", encoder, heads, tied_in_scores=False)
    engine([text_piece(SEGMENTS)], text_losses(encoder, heads), Request(COEFFICIENTS, scores=True))
    names = {name.rsplit(".lora_", 1)[0] for name, p in encoder.named_parameters() if p in found}
    layers = {f"body.encoder.layer.{i}.attention.self.{part}_proj" for i in range(3) for part in ("query", "key")}
    assert names == (layers if family == "deberta-v2" else set())


def test_a_frozen_table_with_as_many_rows_as_the_batch_has_none_of_it() -> None:
    """DeBERTa's relative positions are 16 here. A batch of 16 tokens must not take them for its own."""
    encoder = adapted("deberta-v2", torch.float64, targets="all-linear", rank=2)
    heads = make_heads(encoder, torch.float64)
    assert encoder.body.encoder.rel_embeddings.weight.shape[0] == WIDTH
    piece, losses = text_piece(((6,), (5,), (), (), (5,))), text_losses(encoder, heads)
    assert piece.tokens.rows == WIDTH
    expected = reference(encoder, heads, piece, losses, COEFFICIENTS)
    engine = make_engine("segments", encoder, heads, tied_in_scores=False)
    result, updates = run(engine, encoder, heads, [piece], losses, Request(COEFFICIENTS, scores=True))
    assert_matches(result, updates, expected, 1e-9)


@pytest.mark.parametrize("family", ["bert", "deberta-v2", "modernbert"])
def test_with_activations_computed_again(family: str) -> None:
    encoder = adapted(family, torch.float64, targets="all-linear", rank=2)
    heads = make_heads(encoder, torch.float64)
    piece, losses = text_piece(SEGMENTS), text_losses(encoder, heads)
    expected = reference(encoder, heads, piece, losses, COEFFICIENTS)
    encoder.enable_checkpointing()
    engine = make_engine("segments", encoder, heads, tied_in_scores=False)
    request = Request(COEFFICIENTS, scores=True, joint_from=JOINT_FROM)
    result, updates = run(engine, encoder, heads, [piece], losses, request)
    assert_matches(result, updates, expected, 1e-9)
