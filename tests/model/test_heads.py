"""Shapes, tied weights and initial values of heads."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from aang_ray.config import EncoderConfig
from aang_ray.data.pretrained import locate
from aang_ray.model.heads import ClassificationHead, TiedDecoder, TokenHead
from aang_ray.model.loading import load_encoder
from tests.model.families import FAMILIES, VOCAB, small_encoder, small_model
from tests.model.layout import lay_out, random_ids, text


def scramble(model: nn.Module) -> None:
    """Randomise all parameters, so that none is 0 or 1 and each affects the outputs."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize(
    ("family", "legacy"), [*((family, True) for family in FAMILIES), ("deberta-v2", False)], ids=str
)
def test_the_head_of_a_checkpoint_gives_the_logits_of_its_masked_lm_model(
    family: str, legacy: bool, tmp_path: Path
) -> None:
    changes = {} if legacy else {"legacy": False}
    model = small_model(family, "ForMaskedLM", **changes).eval()
    scramble(model)
    model.save_pretrained(tmp_path)
    config = EncoderConfig(name=str(tmp_path))
    loaded = load_encoder(config, locate(config))
    encoder = loaded.encoder.eval()
    assert loaded.mlm_head is not None
    head = TokenHead(encoder.word_embeddings, encoder.hidden_size, start=loaded.mlm_head)
    inputs = lay_out([[text(random_ids(8))], [text(random_ids(5, seed=1))]], width=8, pad_id=model.config.pad_token_id)
    real_RL = inputs.texts_RL >= 0
    with torch.no_grad():
        expected = model(input_ids=inputs.ids_RL, attention_mask=real_RL.long()).logits[real_RL]
        torch.testing.assert_close(head(encoder(inputs)[real_RL]), expected, rtol=1e-4, atol=1e-4)
        # The untied copy starts the same.
        untied = TokenHead(encoder.word_embeddings, encoder.hidden_size, start=loaded.mlm_head, untied=True)
        torch.testing.assert_close(untied(encoder(inputs)[real_RL]), expected, rtol=1e-4, atol=1e-4)


def test_heads_from_one_start_are_independent_of_each_other(tmp_path: Path) -> None:
    small_model("bert", "ForMaskedLM").save_pretrained(tmp_path)
    config = EncoderConfig(name=str(tmp_path))
    loaded = load_encoder(config, locate(config))
    table = loaded.encoder.word_embeddings
    first, second = (TokenHead(table, 32, start=loaded.mlm_head) for _ in range(2))
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.fill_(3.0)
    assert not any((parameter == 3.0).any() for parameter in second.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fresh_head_is_as_wide_as_the_table_and_starts_at_the_unigram_frequencies(family: str) -> None:
    encoder = small_encoder(family)
    with torch.no_grad():
        encoder.word_embeddings.weight.mul_(0.1)  # to the scale of pretrained tables
    counts_V = torch.arange(1, VOCAB + 1).double()
    unigram_V = counts_V / counts_V.sum()
    head = TokenHead(encoder.word_embeddings, encoder.hidden_size, bias_V=unigram_V.log())
    logits_MV = head(torch.randn(50, encoder.hidden_size, generator=torch.Generator().manual_seed(0)))
    assert logits_MV.shape == (50, VOCAB)
    predicted_MV = logits_MV.double().softmax(-1)
    divergence = (unigram_V * (unigram_V.log() - predicted_MV.log())).sum(-1).mean()
    uniform = (unigram_V * (unigram_V.log() + math.log(VOCAB))).sum()
    assert divergence < 0.2 * uniform


def test_the_tied_table_is_no_parameter_of_the_head() -> None:
    encoder = small_encoder("electra")
    head = TokenHead(encoder.word_embeddings, encoder.hidden_size)
    assert {name for name, _ in head.named_parameters()} == {
        "dense.weight", "dense.bias", "norm.weight", "norm.bias", "decoder.bias",
    }  # fmt: skip
    assert set(head.state_dict()) == {name for name, _ in head.named_parameters()}
    assert head.dense.out_features == 16
    # It follows the encoder, also through a copy of both and a change of dtype.
    both: Any = copy.deepcopy(nn.ModuleDict({"encoder": encoder, "head": head})).double()
    table = both["head"].decoder.table
    assert table is both["encoder"].word_embeddings
    assert table is not encoder.word_embeddings
    assert table.weight.dtype == torch.float64


def test_the_alias_splits_the_gradient_of_the_table_into_lookup_and_decoder() -> None:
    encoder = small_encoder("bert", dtype=torch.float64)
    table = encoder.word_embeddings.weight
    head = TokenHead(encoder.word_embeddings, 32).double()
    inputs = lay_out([[text(random_ids(8))]], width=8)

    def loss() -> torch.Tensor:
        return F.cross_entropy(head(encoder(inputs)[0, :3]), torch.tensor([7, 8, 9]))

    (whole,) = torch.autograd.grad(loss(), table)
    assert isinstance(head.decoder, TiedDecoder)
    head.decoder.alias = table.detach().requires_grad_()
    assert "decoder.alias" not in head.state_dict()
    lookup, decoder = torch.autograd.grad(loss(), [table, head.decoder.alias])
    head.decoder.alias = None
    torch.testing.assert_close(lookup + decoder, whole)
    seen = torch.zeros(VOCAB, dtype=torch.bool)
    seen[inputs.ids_RL[0]] = True
    assert (lookup[~seen] == 0).all()
    assert (decoder[~seen] != 0).any(1).all()


def test_an_untied_decoder_is_the_heads_own() -> None:
    encoder = small_encoder("bert")
    head = TokenHead(encoder.word_embeddings, 32, untied=True)
    weight = head.get_parameter("decoder.weight")
    assert torch.equal(weight, encoder.word_embeddings.weight)
    head(torch.randn(4, 32)).sum().backward()
    assert weight.grad is not None
    assert encoder.word_embeddings.weight.grad is None


def test_a_bias_of_another_vocabulary_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"\(5,\).*97"):
        TokenHead(small_encoder("bert").word_embeddings, 32, bias_V=torch.zeros(5))


def test_the_classification_head_is_linear_tanh_dropout_linear() -> None:
    head = ClassificationHead(hidden=6, classes=3, dropout=0.5).eval()
    pooled_EH = torch.randn(4, 6)
    weights = dict(head.named_parameters())
    inner_EH = torch.tanh(pooled_EH @ weights["0.weight"].T + weights["0.bias"])
    expected = inner_EH @ weights["3.weight"].T + weights["3.bias"]
    torch.testing.assert_close(head(pooled_EH), expected)
    head.train()
    assert not torch.equal(head(pooled_EH), head(pooled_EH))
