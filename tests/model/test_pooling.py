"""Pooling: the vector of a text."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aang_ray.errors import UserError
from tests.model.families import small_encoder
from tests.model.layout import lay_out, random_ids, text

TEXTS = [[text(random_ids(4)), text(random_ids(3, seed=1))], [text(random_ids(6, seed=2))]]
SPANS = [(0, 0, 4), (0, 4, 7), (1, 0, 6)]


@pytest.mark.parametrize("pooling", ["first", "mean"])
def test_pooling_reads_each_text_alone(pooling: str) -> None:
    encoder = small_encoder("bert", pooling="first" if pooling == "first" else "mean")
    inputs = lay_out(TEXTS, width=9)
    hidden_RLH = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0), requires_grad=True)
    pooled_EH = encoder.pool(hidden_RLH, inputs)
    for vector_H, (row, start, stop) in zip(pooled_EH, SPANS, strict=True):
        expected = hidden_RLH[row, start] if pooling == "first" else hidden_RLH[row, start:stop].mean(0)
        torch.testing.assert_close(vector_H, expected)
    (gradient_RLH,) = torch.autograd.grad(pooled_EH.sum(), hidden_RLH)
    for row, start, stop in SPANS:
        share = 1.0 if pooling == "first" else 1 / (stop - start)
        torch.testing.assert_close(gradient_RLH[row, start], torch.full((32,), share))
    assert (gradient_RLH[inputs.texts_RL < 0] == 0).all()


def test_means_of_half_precision_are_made_in_fp32() -> None:
    encoder = small_encoder("bert", pooling="mean")
    inputs = lay_out(TEXTS, width=9)
    hidden_RLH = torch.full((2, 9, 32), 1.0078125, dtype=torch.bfloat16)
    pooled_EH = encoder.pool(hidden_RLH, inputs)
    assert pooled_EH.dtype == torch.float32
    torch.testing.assert_close(pooled_EH, torch.full((3, 32), 1.0078125))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.integers(1, 6), min_size=0, max_size=3), min_size=1, max_size=4).filter(any))
def test_the_mean_of_a_constant_is_that_constant(lengths: list[list[int]]) -> None:
    encoder = small_encoder("bert", layers=1, pooling="mean", dtype=torch.float64)
    inputs = lay_out([[text(random_ids(length)) for length in row] for row in lengths], width=20)
    index_RL = inputs.texts_RL.double().unsqueeze(2).expand(-1, -1, 32)
    pooled_EH = encoder.pool(index_RL, inputs)
    torch.testing.assert_close(pooled_EH[:, 0], torch.arange(pooled_EH.shape[0], dtype=torch.float64))


def test_checkpointing_gives_the_same_gradients() -> None:
    inputs = lay_out(TEXTS, width=9)
    gradients = []
    for checkpointing in (False, True):
        encoder = small_encoder("roberta", dtype=torch.float64)
        if checkpointing:
            encoder.enable_checkpointing()
        loss = encoder.pool(encoder(inputs), inputs).square().sum()
        gradients.append(torch.autograd.grad(loss, list(encoder.parameters())))
    torch.testing.assert_close(gradients[0], gradients[1])


def test_a_family_without_checkpointing_says_so() -> None:
    with pytest.raises(UserError, match=r"gradients\.checkpointing.*mpnet"):
        small_encoder("mpnet").enable_checkpointing()
