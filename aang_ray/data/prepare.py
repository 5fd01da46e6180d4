"""From texts to what the cache holds of an end task: token files and a manifest."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from aang_ray.config import DataConfig
from aang_ray.data.neural_lm import NeuralText, neural_text
from aang_ray.data.pretrained import Located
from aang_ray.data.read import SPLITS, LabelledTexts, RawTask, Split, Texts, check_labels
from aang_ray.data.splits import clean_indices, count_duplicates, nested_subset, normalised
from aang_ray.data.tasks import Corpus, Source, read_passages, read_task
from aang_ray.data.tokens import Tokenised, TokenizerFacts, load_tokenizer, tokenise, tokenizer_facts, write_tokens
from aang_ray.errors import UserError

FORMAT = 2
"""Version of the files: a change makes new ones."""
MANIFEST = "manifest.json"


def prepare(folder: Path, source: Source, data: DataConfig, located: Located) -> None:
    """Read, check, split and tokenise an end task into a folder.

    Raises:
        UserError: for anything wrong with the data or the tokenizer.
    """
    raw = read_task(source, data)
    names = check_labels(raw.splits)
    keys = {split: raw.splits[split].texts.keys() for split in SPLITS}
    splits, rest = _subset(raw.splits, names, data)
    corpora, corpus_counts = _corpora(source, data, raw, rest)
    written = _neural(data, splits["train"], corpora)
    if written is not None:
        corpora["neural_lm"] = _without_held_out(written.passages, raw)
        left_out = len(written.passages) - len(corpora["neural_lm"])
        corpus_counts["neural_lm"] = {"passages": len(corpora["neural_lm"]), "left_out": left_out}

    tokenizer = load_tokenizer(located)
    facts = tokenizer_facts(located, tokenizer)
    limit = token_limit(data, facts)
    clean = clean_indices(keys["train"], keys["dev"], keys["test"])
    truncated: dict[str, int] = {}
    for split in SPLITS:
        tokens = tokenise(splits[split].texts, tokenizer, limit, split)
        columns: dict[str, npt.NDArray[Any]] = {
            "label": np.array([names.index(label) for label in splits[split].labels], dtype=np.int64)
        }
        if split == "test":
            columns["clean"] = np.isin(np.arange(len(splits["test"])), clean)
        truncated[split] = _write(folder, split, tokens, columns)
    for kind, passages in corpora.items():
        truncated[kind] = _write(folder, kind, tokenise(Texts(passages), tokenizer, limit, kind), {})

    manifest = {
        "format": FORMAT,
        "label_names": names,
        "sizes": {split: len(splits[split]) for split in SPLITS},
        "sizes_given": {split: len(raw.splits[split]) for split in SPLITS},
        "split": {"method": raw.method, "seed": data.split_seed, "train_size": data.train_size},
        "duplicates": count_duplicates(keys["train"], keys["dev"], keys["test"]) | {"test_clean": len(clean)},
        "corpora": corpus_counts,
        "neural_lm": None if written is None else written.report(),
        "max_tokens": limit,
        "truncated": truncated,
        "versions": {name: importlib.metadata.version(name) for name in ("datasets", "tokenizers", "transformers")},
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def held_out_sides(raw: RawTask) -> set[str]:
    """Every text of dev and test, pairs as passages too, as texts are compared."""
    return {normalised(side) for split in ("dev", "test") for side in raw.splits[split].texts.sides()}


def token_limit(data: DataConfig, facts: TokenizerFacts) -> int:
    """Longest text in tokens: as configured, else what the encoder takes.

    Raises:
        UserError: for one that the encoder does not take.
    """
    if data.max_tokens is None:
        return facts.max_tokens
    if not 8 <= data.max_tokens <= facts.max_tokens:
        raise UserError(
            f"data.max_tokens: {data.max_tokens} is not possible, this encoder takes 8 to {facts.max_tokens}"
        )
    return data.max_tokens


def _subset(
    splits: Mapping[Split, LabelledTexts], names: tuple[str, ...], data: DataConfig
) -> tuple[dict[Split, LabelledTexts], list[str]]:
    """The splits with train cut to `data.train_size`, and the texts of train that it leaves out."""
    train = splits["train"]
    if data.train_size is None:
        return dict(splits), []
    labels = np.array([names.index(label) for label in train.labels], dtype=np.int64)
    kept = nested_subset(labels, data.train_size, data.split_seed)
    rest = np.setdiff1d(np.arange(len(train)), kept)
    return {**splits, "train": train.take(kept)}, train.texts.take(rest).passages()


def _corpora(
    source: Source, data: DataConfig, raw: RawTask, rest: list[str]
) -> tuple[dict[Corpus, list[str]], dict[str, dict[str, int]]]:
    """Unlabelled text without what dev or test hold, and the counts of what came from where."""
    given: dict[Corpus, list[str]] = {kind: read_passages(path, data.text) for kind, path in source.corpora.items()}
    if raw.in_domain is not None and "in_domain" not in given:
        given["in_domain"] = list(raw.in_domain)
    if rest:
        given["in_domain"] = given.get("in_domain", []) + rest
    corpora = {kind: _without_held_out(passages, raw) for kind, passages in given.items()}
    counts = {
        str(kind): {"passages": len(corpora[kind]), "left_out": len(passages) - len(corpora[kind])}
        for kind, passages in given.items()
    }
    if rest:
        counts["in_domain"]["given_by_train"] = len(rest)
    return corpora, counts


def _without_held_out(passages: list[str], raw: RawTask) -> list[str]:
    """Those that are no text of dev or test."""
    held_out = held_out_sides(raw)
    return [passage for passage in passages if normalised(passage) not in held_out]


def _neural(data: DataConfig, train: LabelledTexts, corpora: Mapping[Corpus, list[str]]) -> NeuralText | None:
    """Text written by a causal language model that knows, of the domain, train and in-domain text alone."""
    if data.neural_lm is None:
        return None
    return neural_text(data, list(dict.fromkeys([*train.texts.passages(), *corpora.get("in_domain", [])])))


def _write(folder: Path, name: str, tokens: Tokenised, columns: dict[str, Any]) -> int:
    write_tokens(folder / f"{name}.arrow", tokens.ragged, columns)
    return tokens.truncated
