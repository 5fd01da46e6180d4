"""Adapters on linear layers: which layers get them, what is trained, and that merging computes the same."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn

from aang_ray.config.sections import AdapterConfig
from aang_ray.errors import UserError
from aang_ray.model.encoder import Encoder
from aang_ray.model.lora import add_lora, lora_size, lora_targets, merged_state, write_adapter
from tests.model.families import FAMILIES, small_encoder
from tests.model.layout import lay_out, random_ids, text

DEFAULT = {
    "bert": {"query", "value"},
    "roberta": {"query", "value"},
    "distilbert": {"q_lin", "v_lin"},
    "electra": {"query", "value"},
    "mpnet": {"q", "v"},
    "deberta-v2": {"query_proj", "value_proj"},
    "modernbert": {"Wqkv"},
}


def adapted(family: str, dtype: torch.dtype = torch.float32, dropout: float = 0.0, **settings: object) -> Encoder:
    """A small encoder with adapters whose B is not 0, in train mode."""
    encoder = small_encoder(family, dropout=dropout, dtype=dtype, pooling="mean")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        add_lora(encoder.body, AdapterConfig.model_validate(settings))
        for name, parameter in encoder.named_parameters():
            if ".lora_B." in name:
                nn.init.normal_(parameter, std=0.2)
    return encoder.to(dtype)


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_alone_are_trained(family: str) -> None:
    encoder = small_encoder(family).eval()
    inputs = lay_out([[text(random_ids(5, seed=0))], [text(random_ids(7, seed=1))]], 8)
    before = encoder(inputs)
    config = AdapterConfig()
    expected = lora_size(encoder.body, config)
    assert set(lora_targets(encoder.body, config)) == DEFAULT[family]
    add_lora(encoder.body, config)
    torch.testing.assert_close(encoder(inputs), before, rtol=0, atol=0)  # B is 0
    trained = {name: p for name, p in encoder.named_parameters() if p.requires_grad}
    assert all(".lora_A." in name or ".lora_B." in name for name in trained)
    assert sum(p.numel() for p in trained.values()) == expected
    # Each layer has A, 8 x 32, and B, 32 x 8; that of ModernBERT has three outputs.
    assert expected == 3 * (8 * (32 + 96) if family == "modernbert" else 2 * 8 * (32 + 32))


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_weights_compute_the_same(family: str) -> None:
    encoder = adapted(family, torch.float64, targets="all-linear", rank=4, alpha=6).eval()
    inputs = lay_out([[text(random_ids(5, seed=0))], [text(random_ids(7, seed=1))]], 8)
    plain = small_encoder(family, dtype=torch.float64, pooling="mean").eval()
    untrained = plain(inputs)
    plain.body.load_state_dict(merged_state(encoder.body))
    torch.testing.assert_close(plain(inputs), encoder(inputs), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(plain(inputs), untrained)


def test_a_layer_by_hand() -> None:
    """y = W x + b + (alpha / rank) B A x."""
    encoder = adapted("bert", torch.float64, targets="encoder.layer.1.attention.self.key", rank=2, alpha=3)
    key = encoder.get_submodule("body.encoder.layer.1.attention.self.key")
    named = dict(key.named_parameters())
    x_NI = torch.randn(5, 32, dtype=torch.float64)
    low_rank = 1.5 * named["lora_B.default.weight"] @ named["lora_A.default.weight"]
    expected = x_NI @ (named["base_layer.weight"] + low_rank).t() + named["base_layer.bias"]
    torch.testing.assert_close(key(x_NI), expected)
    trained = [name for name, p in encoder.named_parameters() if p.requires_grad]
    assert len(trained) == 2, "the name is that of one layer"


def test_the_layout_of_peft(tmp_path: Path) -> None:
    from peft import PeftModel

    encoder = adapted("bert", targets=["dense", "query"], rank=3).eval()
    write_adapter(encoder.body, tmp_path / "adapter", "owner/name", "main")
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    other = PeftModel.from_pretrained(small_encoder("bert").body, tmp_path / "adapter").eval()
    settings = other.peft_config["default"]
    assert (settings.base_model_name_or_path, settings.revision, settings.r) == ("owner/name", "main", 3)
    ids = torch.tensor([random_ids(6, seed=0)])
    found, expected = other(input_ids=ids).last_hidden_state, encoder.body(input_ids=ids).last_hidden_state
    torch.testing.assert_close(found, expected)
    assert encoder.body.peft_config["default"].base_model_name_or_path is None, "writing changes nothing"


@pytest.mark.parametrize("targets", ["nothing", "LayerNorm", "uery", "word_embeddings", "self"])
def test_unknown_targets(targets: str) -> None:
    encoder = small_encoder("bert")
    line = f"encoder.adapter.targets: '{targets}' names no linear layers: an encoder of type 'bert' has dense, key, "
    with pytest.raises(UserError, match=line + "query, value, or use all-linear"):
        add_lora(encoder.body, AdapterConfig(targets=("query", targets)))


def test_a_family_without_known_queries() -> None:
    encoder = small_encoder("bert")
    for layer in encoder.body.encoder.layer:
        layer.attention.self = nn.ModuleDict({"first": nn.Linear(32, 32)})
    with pytest.raises(UserError, match="name linear layers: an encoder of type 'bert' has dense, first, or use"):
        lora_targets(encoder.body, AdapterConfig())


def test_peft_is_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aang_ray.model.lora.find_spec", lambda name: None)
    assert importlib.util.find_spec("peft") is not None
    with pytest.raises(UserError, match=r"needs peft, not installed here; run: pip install 'aang-ray\[adapters\]'"):
        add_lora(small_encoder("bert").body, AdapterConfig())
