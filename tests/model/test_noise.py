"""Noise on input embeddings, in every family."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from aang_ray.model.attention import TokenInputs
from tests.model.families import FAMILIES, small_encoder
from tests.model.layout import lay_out, random_ids, text


def inputs() -> TokenInputs:
    """Inputs with two texts in one row and one in another."""
    texts = [[text(random_ids(6, 1), "bidirectional"), text(random_ids(5, 2), "bidirectional")]]
    texts.append([text(random_ids(9, 3), "bidirectional")])
    return lay_out(texts, 16)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_as_if_the_table_said_so(family: str) -> None:
    """Noise on a token has the same effect as changing its row of the table, if the token occurs once."""
    encoder = small_encoder(family, dtype=torch.float64).eval()
    clean = inputs()
    table = encoder.word_embeddings
    ids_T = clean.ids_RL.flatten()
    at = next(i for i in range(1, 11) if int((ids_T == ids_T[i]).sum()) == 1)
    noise = torch.randn(1, table.embedding_dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    noisy = replace(clean, noised_N=torch.tensor([at]), noise_NW=noise)
    with torch.no_grad():
        before, changed = encoder(clean), encoder(noisy)
        table.weight[ids_T[at]] += noise[0]
        expected = encoder(clean)
    assert not torch.allclose(before, changed)
    torch.testing.assert_close(changed, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_other_texts_do_not_see_it_and_no_hook_stays(family: str) -> None:
    encoder = small_encoder(family).eval()
    clean = inputs()
    noise = torch.ones(2, encoder.word_embeddings.embedding_dim)
    with torch.no_grad():
        before = encoder(clean)
        changed = encoder(replace(clean, noised_N=torch.tensor([1, 2]), noise_NW=noise))
        after = encoder(clean)
    own = clean.texts_RL == clean.texts_RL[0, 1]
    assert torch.equal(before[~own & (clean.texts_RL >= 0)], changed[~own & (clean.texts_RL >= 0)])
    assert (before[own] != changed[own]).any()
    assert torch.equal(before, after)
    assert not encoder.word_embeddings._forward_hooks


def test_the_tables_gradient_does_not_depend_on_how_the_noise_came() -> None:
    encoder = small_encoder("bert", dtype=torch.float64).eval()
    noisy = replace(inputs(), noised_N=torch.tensor([3]), noise_NW=torch.ones(1, 32))
    (gradient,) = torch.autograd.grad(encoder(noisy).pow(3).sum(), encoder.word_embeddings.weight)
    step = 1e-6 * torch.randn(gradient.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    step[0] = 0  # the padding token's row is not trained
    with torch.no_grad():
        values = []
        for sign in (1, -1):
            encoder.word_embeddings.weight += sign * step
            values.append(encoder(noisy).pow(3).sum())
            encoder.word_embeddings.weight -= sign * step
    torch.testing.assert_close((values[0] - values[1]) / 2, (gradient * step).sum(), rtol=1e-5, atol=0)
