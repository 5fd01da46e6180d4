"""Loads an end task of texts: prepared once (read, checked, split, tokenised), then memory-mapped from the cache."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from aang_ray.config import DataConfig, EncoderConfig
from aang_ray.data.cache import cache_folder, content_key, file_digest, made_once
from aang_ray.data.corpora import MANIFEST, external_sources, load_external, unlabelled_text, without_held_out
from aang_ray.data.embedded import RECIPE, SDIST_SHA256
from aang_ray.data.pretrained import Located, tokenizer_fingerprint
from aang_ray.data.read import SPLITS, LabelledTexts, RawTask, Split, Texts, check_labels
from aang_ray.data.retrieval import retrieval_fingerprint, retrieved_text
from aang_ray.data.sources import Source, find_source, read_task
from aang_ray.data.splits import clean_indices, count_duplicates, nested_subset
from aang_ray.data.tasks import Corpus, EndTask, Labelled, balanced_weights, card_of, metric_of
from aang_ray.data.tokens import load_tokenizer, read_tokens, token_limit, tokenise, tokenizer_facts, write_tokens

FORMAT = 2
"""Version of the cached files. Raise it when a change makes different files."""


def load_end_task(data: DataConfig, encoder: EncoderConfig) -> EndTask:
    """Load everything that a run reads of its end task, as views of files that are made once for each content.

    Raises:
        UserError: for anything wrong with the data or the encoder's tokenizer.
    """
    from aang_ray.data.random_encoder import locate_encoder  # here, because it reads the texts of this module

    source, located = find_source(data), locate_encoder(data, encoder)
    tokenizer, content_hash = tokenizer_fingerprint(located), data_fingerprint(data)
    fields = ("text", "text_b", "label", "train_size", "max_tokens", "split_seed", "dev_fraction", "test_fraction")
    key = {
        "format": FORMAT,
        "data": content_hash,
        "choices": {name: getattr(data, name) for name in fields},
        "tokenizer": tokenizer,
        "tokenizers": importlib.metadata.version("tokenizers"),
    }
    if data.text_b is not None:
        key["pairs"] = "token types"  # earlier files of pairs have none
    content = content_key(key)
    folder = made_once(cache_folder() / "tokens" / content, lambda draft: prepare(draft, source, data, located))
    # The same content may be loaded from several places: names and places are not part of the cached manifest.
    named = {"name": source.name, "kind": source.kind, "source": source.place}
    made_with = {"encoder": located.source, "tokenizer": tokenizer, "data": content_hash}
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8")) | named | made_with
    external, manifests = load_external(data, located, content)
    if external:
        manifest["external"] = manifests
    read = {split: read_tokens(folder / f"{split}.arrow") for split in SPLITS}
    labelled = {split: Labelled(tokens, columns["label"]) for split, (tokens, columns) in read.items()}
    kinds: tuple[Corpus, ...] = ("in_domain", "out_of_domain", "neural_lm", "retrieved")
    names = tuple(manifest["label_names"])
    balanced = data.class_weights == "balanced"
    return EndTask(
        name=source.name,
        label_names=names,
        metric=metric_of(data),
        train=labelled["train"],
        dev=labelled["dev"],
        test=labelled["test"],
        test_clean=np.flatnonzero(read["test"][1]["clean"]).astype(np.int64),
        corpora={kind: read_tokens(folder / f"{kind}.arrow")[0] for kind in kinds if kind in manifest["corpora"]},
        class_weights=balanced_weights(labelled["train"].labels, len(names)) if balanced else None,
        external=external,
        manifest=manifest,
    )


def data_fingerprint(data: DataConfig) -> str:
    """Return a hash of the content that the names in `data` stand for, and of the card that the end task takes.

    Files count by their content, a Hub dataset by its name and revision.

    Raises:
        UserError: if a file or folder does not exist.
    """
    source, card = find_source(data), card_of(data)

    def file(path: Path) -> list[str]:
        return [path.suffix.lower(), file_digest(path)]

    content: dict[str, Any] = {
        "kind": source.kind,
        "card": card.name if card else None,
        "splits": {split: file(path) for split, path in source.splits.items()},
        "corpora": {kind: file(path) for kind, path in source.corpora.items()},
    }
    match source.kind:
        case "embedded":
            content["made"] = [source.name, SDIST_SHA256, RECIPE]
        case "file":
            content["file"] = file(Path(source.place))
        case "hub":
            content["hub"] = list(source.hub)
    if data.neural_lm is not None:
        from aang_ray.data.neural_lm import neural_fingerprint  # late: imports torch

        content["neural_lm"] = neural_fingerprint(data)
    if data.retrieve_from is not None:
        content["retrieved"] = retrieval_fingerprint(data)
    if data.external:
        external = zip(data.external, external_sources(data), strict=True)
        content["external"] = {name: data_fingerprint(DataConfig(task=named)) for named, name in external}
    return content_key(content)


def prepare(folder: Path, source: Source, data: DataConfig, located: Located) -> None:
    """Read, check, split and tokenise an end task: write token files and a manifest into an empty folder.

    Raises:
        UserError: for anything wrong with the data or the tokenizer.
    """
    raw = read_task(source, data)
    names = check_labels(raw.splits)
    splits, rest = _subset(raw, names, data)
    corpora, corpus_counts = unlabelled_text(source, data, raw, rest)
    neural_report = None
    if data.neural_lm is not None:
        from aang_ray.data.neural_lm import neural_text  # late: imports torch

        # The model learns from train and in-domain text alone.
        known = list(dict.fromkeys([*splits["train"].texts.passages(), *corpora.get("in_domain", [])]))
        written = neural_text(data, known)
        corpora["neural_lm"] = passages = without_held_out(written.passages, raw)
        left_out = len(written.passages) - len(passages)
        corpus_counts["neural_lm"] = {"passages": len(passages), "left_out": left_out}
        neural_report = written.report()

    retrieval_report = None
    if data.retrieve_from is not None:
        found = retrieved_text(data, raw, splits["train"].texts.passages())
        corpora["retrieved"], retrieval_report = found.passages, found.report
        corpus_counts["retrieved"] = {"passages": len(found.passages), "left_out": found.report["left_out"]}

    tokenizer = load_tokenizer(located)
    limit = token_limit(data, tokenizer_facts(located, tokenizer))
    keys = {split: raw.splits[split].texts.keys() for split in SPLITS}
    clean = clean_indices(keys["train"], keys["dev"], keys["test"])
    truncated: dict[str, int] = {}

    def write(name: str, texts: Texts, columns: Mapping[str, npt.NDArray[Any]]) -> None:
        tokens, truncated[name] = tokenise(texts, tokenizer, limit, name)
        write_tokens(folder / f"{name}.arrow", tokens, columns)

    for split in SPLITS:
        columns: dict[str, npt.NDArray[Any]] = {"label": _label_indices(splits[split], names)}
        if split == "test":
            columns["clean"] = np.isin(np.arange(len(splits["test"])), clean)
        write(split, splits[split].texts, columns)
    for kind, of_kind in corpora.items():
        write(kind, Texts(of_kind), {})

    manifest = {
        "format": FORMAT,
        "label_names": names,
        "sizes": {split: len(splits[split]) for split in SPLITS},
        "sizes_given": {split: len(raw.splits[split]) for split in SPLITS},
        "split": {"method": raw.method, "seed": data.split_seed, "train_size": data.train_size},
        "duplicates": count_duplicates(keys["train"], keys["dev"], keys["test"]) | {"test_clean": len(clean)},
        "corpora": corpus_counts,
        "neural_lm": neural_report,
        "retrieved": retrieval_report,
        "max_tokens": limit,
        "truncated": truncated,
        "versions": {name: importlib.metadata.version(name) for name in ("datasets", "tokenizers", "transformers")},
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def known_texts(data: DataConfig) -> list[str]:
    """Return the texts of an end task that a run may know beforehand: train, and the unlabelled text that is given."""
    source = find_source(data)
    raw = read_task(source, data)
    splits, rest = _subset(raw, check_labels(raw.splits), data)
    corpora, _ = unlabelled_text(source, data, raw, rest)
    passages = [*splits["train"].texts.passages(), *(text for texts in corpora.values() for text in texts)]
    return list(dict.fromkeys(passages))


def _subset(raw: RawTask, names: tuple[str, ...], data: DataConfig) -> tuple[dict[Split, LabelledTexts], list[str]]:
    """Return the splits with train cut to `data.train_size`, and the train texts that are left out."""
    if data.train_size is None:
        return dict(raw.splits), []
    train = raw.splits["train"]
    kept = nested_subset(_label_indices(train, names), data.train_size, data.split_seed)
    rest = np.setdiff1d(np.arange(len(train)), kept)
    return {**raw.splits, "train": train.take(kept)}, train.texts.take(rest).passages()


def _label_indices(split: LabelledTexts, names: tuple[str, ...]) -> npt.NDArray[np.int64]:
    return np.array([names.index(label) for label in split.labels], dtype=np.int64)
