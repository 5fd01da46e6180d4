"""Which tokens an output depends on, for each family and representation, over three layers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aang_ray.model.attention import additive
from aang_ray.model.encoder import Encoder, Pooling
from aang_ray.model.loading import check_no_leak
from tests.model.families import FAMILIES, VOCAB, small_encoder
from tests.model.layout import HIGHEST, LOWEST, REPRESENTATIONS, Text, lay_out, random_ids, text

families = pytest.mark.parametrize("family", FAMILIES)


def double(family: str) -> Encoder:
    return small_encoder(family, dtype=torch.float64).eval()


@families
@pytest.mark.parametrize("representation", REPRESENTATIONS)
def test_another_token_changes_the_outputs_that_may_see_it_and_no_other(family: str, representation: str) -> None:
    # Row 0 is the original; row 1 + j has another token in column j. Rows do not touch each other.
    encoder = double(family)
    texts = [text(random_ids(7), representation), text(random_ids(5, seed=1), representation)]
    inputs = lay_out([texts] * 15, width=14)
    ids_RL = inputs.ids_RL.clone()
    changed = torch.arange(14)
    ids_RL[1 + changed, changed] = (ids_RL[0] + 11) % (VOCAB - 5) + 5
    with torch.no_grad():
        hidden_RLH = encoder(replace(inputs, ids_RL=ids_RL))
    differs_ji = (hidden_RLH[1:] != hidden_RLH[:1]).any(2)
    visible_ij = inputs.visibility_RLL()[0]
    assert not (differs_ji.T & ~visible_ij).any()
    real = slice(0, 12)
    if family == "modernbert":  # places more than two apart meet in layer 0 alone, which is enough here
        assert differs_ji.T[real, real][visible_ij[real, real]].float().mean() > 0.9
    else:
        assert differs_ji.T[real, real][visible_ij[real, real]].all()


@families
def test_gradients_of_what_is_hidden_are_exactly_zero(family: str) -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        check_no_leak(small_encoder(family, dropout=0.1, dtype=dtype))


@families
def test_padding_never_matters(family: str) -> None:
    encoder = double(family)
    texts = [[text(random_ids(7), "left-to-right"), text(random_ids(4, seed=1))], [text(random_ids(3, seed=2))]]
    narrow = lay_out(texts, width=11)
    outputs = []
    with torch.no_grad():
        for inputs in (narrow, replace(narrow, ids_RL=torch.where(narrow.texts_RL < 0, 42, narrow.ids_RL))):
            outputs.append(encoder(inputs)[inputs.texts_RL >= 0])
        wide = lay_out(texts, width=16, pad_id=9)
        outputs.append(encoder(wide)[wide.texts_RL >= 0])
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=0)
    torch.testing.assert_close(outputs[2], outputs[0], rtol=1e-9, atol=1e-12)


@families
@pytest.mark.parametrize("representation", REPRESENTATIONS)
def test_packed_equals_alone(family: str, representation: str) -> None:
    encoder = double(family)
    texts = [text(random_ids(length, seed=length), representation) for length in (7, 9, 4, 2)]
    with torch.no_grad():
        packed = lay_out([texts], width=25)
        together = encoder(packed)[packed.texts_RL >= 0]
        alone = torch.cat([encoder(lay_out([[item]], width=len(item.ids)))[0] for item in texts])
    torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-12)


@families
def test_agrees_with_the_model_itself_under_its_own_padding_mask(family: str) -> None:
    # Independent of our masks and ids: the family's own forward on padded rows.
    encoder = double(family)
    ids = [random_ids(9), random_ids(5, seed=1), random_ids(2, seed=2)]
    body: Any = encoder.body
    inputs = lay_out([[text(row)] for row in ids], width=9, pad_id=body.config.pad_token_id)
    real = inputs.texts_RL >= 0
    with torch.no_grad():
        ours = encoder(inputs)
        theirs = body(input_ids=inputs.ids_RL, attention_mask=real.long()).last_hidden_state
    torch.testing.assert_close(ours[real], theirs[real], rtol=1e-9, atol=1e-12)


@families
def test_a_query_out_of_order_equals_a_mask_token_in_its_place(family: str) -> None:
    # Position 3 has the highest rank, so that no other token sees it. Its query stands behind the text.
    encoder = double(family)
    assert encoder.positions_given == (family not in ("mpnet", "deberta-v2"))
    if not encoder.positions_given:
        return
    ids, mask = random_ids(6), 4
    ranks = (LOWEST, 4, 2, 10, 8, 6)
    in_place = Text((*ids[:3], mask, *ids[4:]), ranks)
    appended = Text((*ids, mask), (*ranks, 9), key_ranks=(*ranks, HIGHEST), positions=(*range(6), 3))
    with torch.no_grad():
        expected = encoder(lay_out([[in_place]], width=6))[0]
        got = encoder(lay_out([[appended]], width=8))[0]
    torch.testing.assert_close(got[6], expected[3], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(got[[0, 1, 2, 4, 5]], expected[[0, 1, 2, 4, 5]], rtol=1e-9, atol=1e-12)


@families
def test_bf16_autocast_is_finite_even_where_a_row_sees_nothing(family: str) -> None:
    encoder = small_encoder(family)
    inputs = lay_out([[text(random_ids(6), "left-to-right")], [text(random_ids(3))]], width=8)
    blind = inputs.visibility_RLL().clone()
    blind[0, 2] = False
    for given_inputs in (inputs, replace(inputs, visible_RLL=blind)):
        with torch.autocast("cpu", torch.bfloat16):
            hidden_RLH = encoder(given_inputs)
        hidden_RLH.float().square().mean().backward()
        assert hidden_RLH.isfinite().all()
        assert all(p.grad is None or p.grad.isfinite().all() for p in encoder.parameters())


@families
def test_every_parameter_of_the_body_takes_part(family: str) -> None:
    encoder = small_encoder(family)
    hidden_RLH = encoder(lay_out([[text(random_ids(8)), text(random_ids(5))]], width=14))
    hidden_RLH.square().sum().backward()
    idle = {name for name, parameter in encoder.named_parameters() if parameter.grad is None}
    assert not idle


@families
@pytest.mark.parametrize("pooling", ["first", "mean"])
def test_nothing_waits_for_values(family: str, pooling: Pooling) -> None:
    # On the meta device there are shapes and no values: reading one (a host synchronisation) raises.
    encoder = small_encoder(family, dropout=0.1, pooling=pooling).to("meta")
    inputs = lay_out([[text(random_ids(7)), text(random_ids(4))], [text(random_ids(9))]], width=12)
    inputs = inputs.to(torch.device("meta"))
    pooled_EH = encoder.pool(encoder(inputs), inputs)
    assert pooled_EH.shape == (3, 32)
    torch.autograd.grad(pooled_EH.sum(), list(encoder.parameters()))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=3, max_size=3))
def test_the_softmax_of_an_additive_mask_is_that_of_the_visible_keys(visible: list[list[bool]]) -> None:
    visible_RLL = torch.tensor([visible])
    scores_RLL = torch.randn(1, 3, 3, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        weights = (scores_RLL.to(dtype) + additive(visible_RLL, dtype)[:, 0]).softmax(-1)
        assert weights.isfinite().all()
        sees = visible_RLL.any(-1)
        assert (weights[sees][~visible_RLL[sees]] == 0).all()
        exact = scores_RLL.to(dtype).masked_fill(~visible_RLL, float("-inf")).softmax(-1)
        torch.testing.assert_close(weights[sees], exact[sees])
