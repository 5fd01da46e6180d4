"""Results of an engine that processes sharing a step need: kept gradients, and rows of a table."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from aang_ray.gradients import make_engine
from aang_ray.gradients.engine import JointRows, Request
from tests.gradients.steps import (
    JOINT_FROM,
    SEGMENTS,
    assert_matches,
    make_heads,
    reference,
    run,
    text_losses,
    text_piece,
)
from tests.gradients.test_accumulation import COEFFICIENTS, CUTS, pieces_of
from tests.model.families import small_encoder

KEEP = (1, 3)
# The loop takes pieces of one segment each.
ENGINES = [("loop", "one a segment"), *(("segments", cut) for cut in ("one piece", *CUTS))]


@pytest.mark.parametrize("family", ["bert", "deberta-v2"])
@pytest.mark.parametrize(("name", "cut"), ENGINES)
def test_kept_gradients_and_rows(name: Literal["loop", "segments"], cut: str, family: str) -> None:
    """Segments 1 and 3 themselves, and every second row of the table's joint gradient, by automatic differentiation."""
    encoder = small_encoder(family, dtype=torch.float64)
    heads = make_heads(encoder, torch.float64)
    losses = text_losses(encoder, heads)
    expected = reference(encoder, heads, text_piece(SEGMENTS), losses, COEFFICIENTS)
    table = encoder.word_embeddings.weight
    assert isinstance(table, nn.Parameter)
    place_V = torch.full((len(table),), len(table) // 2)
    place_V[1::2] = torch.arange(len(table) // 2)
    request = Request(
        COEFFICIENTS,
        scores=True,
        joint_from=JOINT_FROM,
        keep=KEEP,
        joint_rows=JointRows(table, place_V, len(table) // 2),
    )
    pieces = [text_piece(SEGMENTS)] if cut == "one piece" else pieces_of(CUTS[cut])
    engine = make_engine(name, encoder, heads, tied_in_scores=False)
    result, updates = run(engine, encoder, heads, pieces, losses, request)
    assert_matches(result, updates, expected, 1e-9)
    assert result.joint_norm2 is None
    assert result.kept.keys() == set(KEEP)
    for segment in KEEP:
        torch.testing.assert_close(result.kept[segment], expected.scored_SP[segment], rtol=1e-9, atol=1e-12)
    joint_P = COEFFICIENTS.double()[JOINT_FROM:] @ expected.scored_SP[JOINT_FROM:]
    start = offset_of(encoder, table)
    joint_VH = joint_P[start : start + table.numel()].view(table.shape)
    assert result.joint_rows_UH is not None
    torch.testing.assert_close(result.joint_rows_UH, joint_VH[1::2], rtol=1e-9, atol=1e-12)


def offset_of(body: nn.Module, wanted: Tensor) -> int:
    start = 0
    for parameter in body.parameters():
        if parameter is wanted:
            return start
        start += parameter.numel()
    raise AssertionError("no parameter of the body")


def test_a_kept_segment_without_examples_is_zero() -> None:
    encoder = small_encoder("bert", dtype=torch.float64)
    heads = make_heads(encoder, torch.float64)
    engine = make_engine("segments", encoder, heads, tied_in_scores=False)
    request = Request(COEFFICIENTS, scores=True, keep=(2,))
    result, _ = run(engine, encoder, heads, [text_piece(SEGMENTS)], text_losses(encoder, heads), request)
    assert not result.kept[2].any()
