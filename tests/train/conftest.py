"""A tiny encoder folder and a tiny task, so that whole runs take seconds."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

WORDS = {
    "good": ["great", "lovely", "warm", "bright", "kind", "happy"],
    "bad": ["awful", "cold", "dull", "grim", "sad", "angry"],
}
FILLER = ["the", "film", "was", "and", "a", "plot", "actor", "scene", "with", "very", "some", "quite", "music"]


def sentence(label: str, rng: random.Random) -> str:
    words = [rng.choice(FILLER) for _ in range(rng.randint(4, 12))]
    for _ in range(2):
        words.insert(rng.randrange(len(words)), rng.choice(WORDS[label]))
    return " ".join(words)


def write_task(folder: Path, sizes: dict[str, int], seed: int = 0) -> Path:
    rng = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for split, size in sizes.items():
        labels = ["good", "bad"] * (size // 2)
        lines = [json.dumps({"text": sentence(label, rng), "label": label}) for label in labels]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "in_domain.txt").write_text(
        "\n".join(sentence(rng.choice(["good", "bad"]), rng) for _ in range(60)) + "\n"
    )
    return folder


def write_encoder(folder: Path, layers: int = 3, hidden: int = 32) -> Path:
    """A small random BERT with a word-level tokenizer, as a checkpoint on disk."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *FILLER, *WORDS["good"], *WORDS["bad"]]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    tokenizer = BertTokenizerFast(vocab=str(folder / "vocab.txt"), model_max_length=64)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=2 * hidden,
        max_position_embeddings=64,
    )
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Settings of a run that takes a second: a task, an encoder, few steps."""
    root = tmp_path_factory.mktemp("tiny")
    task = write_task(root / "task", {"train": 80, "dev": 40, "test": 40})
    encoder = write_encoder(root / "encoder")
    return {
        "data": {"task": str(task)},
        "encoder": {"name": str(encoder), "pooling": "mean"},
        "batch": {"end_task": 16, "auxiliary": 24, "dev": 8, "dev_head": 8},
        "schedule": {"steps": 20, "eval_every": 10},
        "optim": {"body_lr": 1e-3, "head_lr": 1e-2},
        "precision": "fp32",
        "n": 6,
        "resources": {"device": "cpu"},
    }
