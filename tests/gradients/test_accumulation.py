"""Pieces, checkpointing and reduced precision change nothing but rounding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from aang_ray.gradients import LoopEngine, SegmentEngine
from aang_ray.gradients.engine import Request, StepGradients
from aang_ray.gradients.ledger import Ledger
from aang_ray.gradients.statistics import cosine
from tests.gradients.steps import (
    JOINT_FROM,
    SEGMENTS,
    TextPiece,
    assert_matches,
    make_heads,
    reference,
    run,
    scores_of,
    text_losses,
    text_piece,
)
from tests.model.families import FAMILIES, small_encoder

COEFFICIENTS = torch.tensor([0.0, 0.5, 0.3, 0.15, 0.05])
Cut = list[dict[int, tuple[int, int]]]
CUTS: dict[str, Cut] = {
    "one a segment": [{0: (0, 3)}, {1: (0, 2)}, {3: (0, 4)}, {4: (0, 1)}],
    "segments that span pieces": [{0: (0, 3), 1: (0, 1)}, {1: (1, 2), 3: (0, 2)}, {3: (2, 3)}, {3: (3, 4), 4: (0, 1)}],
    "a dev batch that spans pieces": [{0: (0, 1)}, {0: (1, 3), 1: (0, 2), 3: (0, 1)}, {3: (1, 4), 4: (0, 1)}],
}


def pieces_of(cut: Cut) -> list[TextPiece]:
    def texts_of(part: dict[int, tuple[int, int]]) -> list[tuple[int, ...]]:
        return [lengths[slice(*part.get(s, (0, 0)))] for s, lengths in enumerate(SEGMENTS)]

    return [text_piece(texts_of(part)) for part in cut]


@pytest.mark.parametrize("tied_in_scores", [False, True])
@pytest.mark.parametrize("family", ["bert", "mpnet"])
@pytest.mark.parametrize("cut", CUTS)
def test_accumulation_changes_nothing(cut: str, family: str, tied_in_scores: bool) -> None:
    encoder = small_encoder(family, dtype=torch.float64, pooling="mean")
    heads = make_heads(encoder, torch.float64)
    losses = text_losses(encoder, heads)
    expected = reference(encoder, heads, text_piece(SEGMENTS), losses, COEFFICIENTS, tied_in_scores)
    engine = SegmentEngine(encoder, heads, tied_in_scores)
    for gram in (False, True):
        request = Request(COEFFICIENTS, scores=True, gram=gram, joint_from=JOINT_FROM)
        result, updates = run(engine, encoder, heads, pieces_of(CUTS[cut]), losses, request)
        assert_matches(result, updates, expected, 1e-9)


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("tied_in_scores", [False, True])
@pytest.mark.parametrize("family", ["bert", "deberta-v2"])
@pytest.mark.parametrize("cut", [*CUTS, "whole", "loop"])
def test_inner_products_with_a_given_vector(
    cut: str, family: str, tied_in_scores: bool, stacked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both engines, with any pieces, one block after the other (CPU) and stacked (GPU); dev may be kept or empty."""
    if stacked:
        monkeypatch.setattr(Ledger, "takes_stacked", property(lambda ledger: not ledger._buffering))
    encoder = small_encoder(family, dtype=torch.float64, pooling="mean")
    heads = make_heads(encoder, torch.float64)
    losses = text_losses(encoder, heads)
    expected = reference(encoder, heads, text_piece(SEGMENTS), losses, COEFFICIENTS, tied_in_scores)
    size = expected.scored_SP.shape[1]
    u_P = torch.randn(size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    pieces = [text_piece(SEGMENTS)] if cut == "whole" else pieces_of(CUTS.get(cut, CUTS["one a segment"]))
    engine = (LoopEngine if cut == "loop" else SegmentEngine)(encoder, heads, tied_in_scores)
    request = Request(COEFFICIENTS, scores=True, joint_from=JOINT_FROM, keep=(0,), reference_P=u_P)
    result, updates = run(engine, encoder, heads, pieces, losses, request)
    dots_S, _ = scores_of(result)
    torch.testing.assert_close(dots_S, expected.scored_SP @ u_P, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(result.kept[0], expected.scored_SP[0], rtol=1e-9, atol=1e-12)
    with_v = replace(result, dots_S=expected.scored_SP @ expected.scored_SP[0])
    assert_matches(with_v, updates, expected, 1e-9)  # all else is as without a reference


def test_a_reference_goes_with_scores_alone() -> None:
    for other in ({}, {"scores": True, "gram": True}, {"scores": True, "separate": True}):
        with pytest.raises(ValueError, match="reference"):
            Request(COEFFICIENTS, reference_P=torch.zeros(3), **other)


def test_dev_must_come_first() -> None:
    encoder = small_encoder("bert")
    heads = make_heads(encoder, torch.float32)
    pieces = pieces_of([{0: (0, 1), 1: (0, 2)}, {0: (1, 3)}])
    with pytest.raises(ValueError, match="segment 0"):
        SegmentEngine(encoder, heads, False)(pieces, text_losses(encoder, heads), Request(COEFFICIENTS, scores=True))


@pytest.mark.parametrize("tied_in_scores", [False, True])
@pytest.mark.parametrize("family", ["roberta", "deberta-v2"])
def test_the_loop_agrees(family: str, tied_in_scores: bool) -> None:
    encoder = small_encoder(family, dtype=torch.float64)
    heads = make_heads(encoder, torch.float64)
    losses = text_losses(encoder, heads)
    expected = reference(encoder, heads, text_piece(SEGMENTS), losses, COEFFICIENTS, tied_in_scores)
    pieces = pieces_of([{0: (0, 3)}, {1: (0, 1)}, {1: (1, 2)}, {3: (0, 4)}, {4: (0, 1)}])
    request = Request(COEFFICIENTS, scores=True, gram=True, separate=True, joint_from=JOINT_FROM)
    result, updates = run(LoopEngine(encoder, heads, tied_in_scores), encoder, heads, pieces, losses, request)
    assert_matches(result, updates, expected, 1e-9)
    assert result.separate_SP is not None
    torch.testing.assert_close(result.separate_SP, expected.scored_SP, rtol=1e-9, atol=1e-12)
    with pytest.raises(ValueError, match="one segment each"):
        LoopEngine(encoder, heads, tied_in_scores)([text_piece(SEGMENTS)], losses, request)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "mpnet"])
def test_checkpointing_changes_nothing(family: str, dropout: float) -> None:
    encoder = small_encoder(family, dropout=dropout, dtype=torch.float64)
    heads = make_heads(encoder, torch.float64)
    piece, losses = text_piece(SEGMENTS), text_losses(encoder, heads)
    torch.manual_seed(3)
    expected = reference(encoder, heads, piece, losses, COEFFICIENTS)
    encoder.enable_checkpointing()
    torch.manual_seed(3)
    engine, request = SegmentEngine(encoder, heads, False), Request(COEFFICIENTS, scores=True)
    result, updates = run(engine, encoder, heads, [piece], losses, request)
    assert_matches(result, updates, expected, 1e-9)


def test_checkpointing_keeps_no_activations() -> None:
    """Between the passes autograd must hold far fewer bytes than without checkpointing."""
    held: list[int] = []
    for checkpointing in (False, True):
        encoder = small_encoder("bert", layers=6)
        heads = make_heads(encoder, torch.float32)
        if checkpointing:
            encoder.enable_checkpointing()
        losses = text_losses(encoder, heads)
        kept: set[int] = set()

        def pack(tensor: Tensor, kept: set[int] = kept) -> Tensor:
            kept.add(tensor.data_ptr())
            return tensor

        def watched(
            piece: TextPiece,
            pack: Callable[[Tensor], Tensor] = pack,
            losses: Callable[[TextPiece], Tensor] = losses,
        ) -> Tensor:
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                return losses(piece)

        SegmentEngine(encoder, heads, False)([text_piece(SEGMENTS)], watched, Request(COEFFICIENTS, scores=True))
        held.append(len(kept))
    assert held[1] < held[0] / 3


@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_differs_no_more_than_the_loop_does(family: str) -> None:
    """Cosines and update under bf16 autocast: at most twice the loop's own distance from fp32, plus 2^-8."""
    encoder = small_encoder(family, pooling="mean")
    heads = make_heads(encoder, torch.float32)
    plain = text_losses(encoder, heads)
    pieces = pieces_of(CUTS["one a segment"])

    def autocast(piece: TextPiece) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return plain(piece)

    request = Request(COEFFICIENTS, scores=True)
    loop, single = LoopEngine(encoder, heads, False), SegmentEngine(encoder, heads, False)
    exact, exact_updates = run(loop, encoder, heads, pieces, plain, request)
    rounded, rounded_updates = run(loop, encoder, heads, pieces, autocast, request)
    found, updates = run(single, encoder, heads, [text_piece(SEGMENTS)], autocast, request)

    def cosines(result: StepGradients) -> Tensor:
        return cosine(*scores_of(result))

    own = (cosines(rounded) - cosines(exact)).abs().max()
    assert (cosines(found) - cosines(exact)).abs().max() <= 2 * own + 2**-8

    def distance(of: dict[str, Tensor]) -> Tensor:
        return torch.stack([(of[name] - exact_updates[name]).square().sum() for name in of]).sum().sqrt()

    assert distance(updates) <= 1.5 * distance(rounded_updates)
