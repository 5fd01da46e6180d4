"""Reading checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors.torch import load_file, save_file

from aang_ray.config import EncoderConfig
from aang_ray.data.pretrained import Located, locate
from aang_ray.errors import UserError
from aang_ray.model.loading import LoadedEncoder, checkpoint_pooling, load_encoder
from tests.model.families import FAMILIES, small_config, small_model
from tests.model.layout import lay_out, random_ids, text


def load(folder: Path, **settings: Any) -> LoadedEncoder:
    config = EncoderConfig(name=str(folder), **settings)
    return load_encoder(config, locate(config))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_layers_alone(family: str, tmp_path: Path) -> None:
    model = small_model(family, "ForMaskedLM", layers=4).eval()
    model.save_pretrained(tmp_path)
    encoder = load(tmp_path, layers=3).encoder.eval()
    body: Any = encoder.body
    assert body.config.num_hidden_layers == 3
    inputs = lay_out([[text(random_ids(8))]], width=8)
    with torch.no_grad():
        whole = model.base_model(inputs.ids_RL, output_hidden_states=True)
        expected = whole.hidden_states[3]
        if family == "modernbert":  # the norm behind the last layer stays
            expected = body.final_norm(expected)
        torch.testing.assert_close(encoder(inputs), expected, rtol=1e-4, atol=1e-4)


def test_more_layers_than_there_are(tmp_path: Path) -> None:
    small_model("distilbert", "Model").save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"encoder\.layers: .* has 3 layers, 5 were asked for"):
        load(tmp_path, layers=5)


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_of_a_bare_encoder_are_read_and_come_without_head_and_pooler(family: str, tmp_path: Path) -> None:
    model = small_model(family, "Model", seed=3)
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert loaded.mlm_head is None
    saved = {name: value for name, value in model.named_parameters() if not name.startswith("pooler.")}
    read = dict(loaded.encoder.body.named_parameters())
    assert set(read) == set(saved)
    assert all(torch.equal(read[name], saved[name]) for name in saved)
    assert all(value.dtype == torch.float32 for value in read.values())
    assert loaded.encoder.training


def test_families_without_masked_lm_model_are_read_bare(tmp_path: Path) -> None:
    gpt2 = transformers.GPT2Config(
        vocab_size=50, n_embd=32, n_head=4, n_layer=2, n_positions=20, bos_token_id=1, eos_token_id=2
    )
    transformers.GPT2Model(gpt2).save_pretrained(tmp_path / "gpt2")
    loaded = load(tmp_path / "gpt2")
    assert loaded.mlm_head is None
    assert loaded.encoder.max_tokens == 20
    lilt = transformers.LiltConfig(
        vocab_size=50, hidden_size=48, num_attention_heads=2, intermediate_size=48, num_hidden_layers=2
    )
    transformers.LiltModel(lilt).save_pretrained(tmp_path / "lilt")
    loaded = load(tmp_path / "lilt")
    assert not [name for name, _ in loaded.encoder.named_parameters() if "pooler" in name]


def test_half_precision_checkpoints_are_read_as_fp32(tmp_path: Path) -> None:
    small_model("bert", "Model").to(torch.bfloat16).save_pretrained(tmp_path)
    assert {p.dtype for p in load(tmp_path).encoder.parameters()} == {torch.float32}


@pytest.mark.parametrize(("family", "kind"), [("electra", "ForPreTraining"), ("bert", "ForSequenceClassification")])
def test_a_checkpoint_with_another_head_has_no_masked_lm_head(family: str, kind: str, tmp_path: Path) -> None:
    small_model(family, kind).save_pretrained(tmp_path)
    assert load(tmp_path).mlm_head is None


def test_a_decoder_that_is_not_the_table_starts_no_head(tmp_path: Path) -> None:
    small_model("bert", "ForMaskedLM", tie_word_embeddings=False).save_pretrained(tmp_path)
    assert load(tmp_path).mlm_head is None


@pytest.mark.parametrize("family", FAMILIES)
def test_one_setting_for_every_dropout(family: str, tmp_path: Path) -> None:
    small_model(family, "Model", dropout=0.3).save_pretrained(tmp_path)

    def rates(**settings: Any) -> set[float]:
        modules = load(tmp_path, **settings).encoder.modules()
        return {module.p for module in modules if isinstance(module, torch.nn.Dropout)}

    assert rates() == {0.3}
    assert rates(dropout=0.0) == {0.0}
    assert rates(dropout=0.25) == {0.25}


def test_an_incomplete_checkpoint_is_refused(tmp_path: Path) -> None:
    small_model("roberta", "ForMaskedLM").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    gone = "roberta.encoder.layer.1.output.dense.weight"
    save_file({k: v for k, v in weights.items() if k != gone}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 weights.*layer\.1\.output\.dense\.weight"):
        load(tmp_path)


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    small_config("bert").save_pretrained(tmp_path)
    torch.save(small_model("bert", "Model").state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="safetensors"):
        load(tmp_path)


def test_broken_weights_are_one_line(tmp_path: Path) -> None:
    small_model("bert", "Model").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x00" * 64)
    with pytest.raises(UserError, match=r"encoder\.name: cannot read") as raised:
        load(tmp_path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "nonesuch"}, "nonesuch"),
        ({"model_type": "bart", "d_model": 16}, "bart"),
        ({"auto_map": {"AutoConfig": "own.Config"}}, "cannot read"),
    ],
)
def test_what_is_no_encoder_is_refused(config: dict[str, Any], words: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=words):
        load(tmp_path)


def pooling_file(folder: Path, content: object) -> Located:
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(content))
    return Located(str(folder), None, local=True)


@pytest.mark.parametrize(
    ("content", "pooling"),
    [
        ({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True, "include_prompt": True}, "mean"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "first"),
        ({"embedding_dimension": 384, "pooling_mode": "mean"}, "mean"),
        ({"pooling_mode": ["cls"]}, "first"),
    ],
)
def test_pooling_is_what_the_checkpoint_says(content: object, pooling: str, tmp_path: Path) -> None:
    assert checkpoint_pooling(pooling_file(tmp_path, content)) == pooling


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"pooling_mode": "max"}, "states max"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, r"cls_token \+ pooling_mode_mean"),
        ({}, "no mode"),
        ([], "no mode"),
    ],
)
def test_a_pooling_that_there_is_not_is_refused(content: object, words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words):
        checkpoint_pooling(pooling_file(tmp_path, content))


def test_without_a_statement_the_first_token_is_read(tmp_path: Path) -> None:
    small_model("bert", "Model").save_pretrained(tmp_path)
    assert load(tmp_path).encoder.pooling == "first"
    assert load(tmp_path, pooling="mean").encoder.pooling == "mean"


def test_pooling_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pooling_file(tmp_path, {"pooling_mode": "mean"})
    file = str(tmp_path / "1_Pooling" / "config.json")
    located = Located("owner/name", "v1", local=False)
    cached: object = file
    answer: object = None

    def look_up(*args: object, **kwargs: object) -> object:
        assert (args, kwargs) == (("owner/name", "1_Pooling/config.json"), {"revision": "v1"})
        return cached

    def download(*args: object, **kwargs: object) -> object:
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", look_up)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert checkpoint_pooling(located) == "mean"
    cached = object()  # the mark of a file that the Hub is known not to have
    assert checkpoint_pooling(located) == "first"
    cached, answer = None, file
    assert checkpoint_pooling(located) == "mean"
    answer = EntryNotFoundError("no such file")
    assert checkpoint_pooling(located) == "first"
    answer = LocalEntryNotFoundError("offline")
    with pytest.raises(UserError, match=r"encoder\.pooling.*Hub cannot be asked"):
        checkpoint_pooling(located)
