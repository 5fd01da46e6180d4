"""Every test has its own cache; fixtures make a tiny encoder and folders of data."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from aang_ray.config import EncoderConfig

Rows = Sequence[Mapping[str, Any]]
WORDS = ("good", "bad", "film", "plot", "very", "not", "the", "a", "actor", "scene", "dull", "bright")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("AANG_CACHE", str(folder))
    return folder


def write_encoder(folder: Path, config: Mapping[str, Any], **tokenizer: Any) -> Path:
    """A BERT word tokenizer of 17 tokens and a configuration, without weights."""
    folder.mkdir(parents=True)
    vocabulary = {word: index for index, word in enumerate((*SPECIAL, *WORDS))}
    single = [{"SpecialToken": {"id": "[CLS]", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    single.append({"SpecialToken": {"id": "[SEP]", "type_id": 0}})
    pair = [*single, {"Sequence": {"id": "B", "type_id": 1}}, {"SpecialToken": {"id": "[SEP]", "type_id": 1}}]
    specials = {name: {"id": name, "ids": [vocabulary[name]], "tokens": [name]} for name in ("[CLS]", "[SEP]")}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": name, **flags} for i, name in enumerate(SPECIAL)],
        "normalizer": {"type": "Lowercase"},
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": single,
            "pair": pair,
            "special_tokens": specials,
        },
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "[UNK]"},
    }
    (folder / "tokenizer.json").write_text(json.dumps(content))
    names = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{f"{k}_token": v for k, v in names.items()},
        **tokenizer,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in settings.items() if v is not None}))
    (folder / "config.json").write_text(json.dumps({"vocab_size": len(vocabulary), **config}))
    return folder


@pytest.fixture
def encoder(tmp_path: Path) -> EncoderConfig:
    """A tiny encoder of 16 positions, so that a short text is too long for it."""
    folder = write_encoder(tmp_path / "encoder", {"model_type": "bert", "max_position_embeddings": 16})
    return EncoderConfig(name=str(folder))


def ids(text: str) -> list[int]:
    """Return the tokens that the tiny tokenizer makes."""
    return [2, *(5 + WORDS.index(word) for word in text.lower().split()), 3]


def write_jsonl(path: Path, rows: Rows) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def rows_of(*pairs: tuple[str, Any]) -> list[dict[str, Any]]:
    return [{"text": text, "label": label} for text, label in pairs]


TRAIN = rows_of(("good film", "pos"), ("bad film", "neg"), ("very good", "pos"), ("Good  FILM", "pos"))
DEV = rows_of(("bad plot", "neg"), ("very GOOD", "pos"))
TEST = rows_of(("good film", "pos"), ("dull scene", "neg"), ("bad plot", "neg"), ("bright actor", "pos"))


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that makes a folder task; a split given as None is left out."""

    def make(name: str = "task", train: Rows | None = TRAIN, dev: Rows | None = DEV, test: Rows | None = TEST) -> Path:
        path = tmp_path / name
        path.mkdir()
        for split, rows in (("train", train), ("dev", dev), ("test", test)):
            if rows is not None:
                write_jsonl(path / f"{split}.jsonl", rows)
        return path

    return make
