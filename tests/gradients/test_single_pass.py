"""The single pass equals differentiation of each loss, for every encoder family."""

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
    assert_matches,
    make_heads,
    reference,
    run,
    text_losses,
    text_piece,
)
from tests.model.families import FAMILIES, small_encoder

COEFFICIENTS = torch.tensor([0.0, 0.5, 0.3, 0.15, 0.05])


@pytest.mark.parametrize("tied_in_scores", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_each_loss_differentiated(
    family: str, dtype: torch.dtype, tolerance: float, dropout: float, tied_in_scores: bool
) -> None:
    encoder = small_encoder(family, dropout=dropout, dtype=dtype, pooling="mean")
    heads = make_heads(encoder, dtype)
    piece, losses = text_piece(SEGMENTS), text_losses(encoder, heads)
    torch.manual_seed(7)
    expected = reference(encoder, heads, piece, losses, COEFFICIENTS, tied_in_scores)
    torch.manual_seed(7)
    engine = make_engine("segments", encoder, heads, tied_in_scores=tied_in_scores)
    result, updates = run(
        engine, encoder, heads, [piece], losses, Request(COEFFICIENTS, scores=True, joint_from=JOINT_FROM)
    )
    assert_matches(result, updates, expected, tolerance)


@pytest.mark.parametrize("family", FAMILIES)
def test_only_tables_of_relative_positions_need_autograd(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All other modules have rules and need one pass; the exceptions are named here."""
    encoder = small_encoder(family)
    heads = make_heads(encoder, torch.float32)
    names = {parameter: name for name, parameter in encoder.named_parameters()}
    found: set[str] = set()

    class Watched(Regions):
        def __init__(self, calls: Iterable[Call], losses_S: Tensor, wanted: frozenset[nn.Parameter]) -> None:
            super().__init__(calls, losses_S, wanted)
            found.update(names[parameter] for parameter in self.parameters)

    monkeypatch.setattr(single_pass, "Regions", Watched)
    engine = make_engine("segments", encoder, heads, tied_in_scores=False)
    engine([text_piece(SEGMENTS)], text_losses(encoder, heads), Request(COEFFICIENTS, scores=True))
    encoder_names = {name.rsplit("body.", 1)[-1] for name in found}
    if family == "mpnet":
        assert encoder_names == {"encoder.relative_attention_bias.weight"}
    elif family == "deberta-v2":
        projections = {f"encoder.layer.{i}.attention.self.{p}_proj" for i in range(3) for p in ("query", "key")}
        own = {f"{name}.{part}" for name in (*projections, "encoder.LayerNorm") for part in ("weight", "bias")}
        assert encoder_names == own | {"encoder.rel_embeddings.weight"}
    else:
        assert encoder_names == set()
