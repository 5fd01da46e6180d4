"""Other texts of an end task, none of them in dev or test: unlabelled text, and external labelled data sets."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from aang_ray.config import DataConfig
from aang_ray.data.cache import cache_folder, content_key, made_once
from aang_ray.data.pretrained import Located
from aang_ray.data.read import MissingColumn, RawTask, check_labels, wanted_columns
from aang_ray.data.sources import Source, find_source, read_passages, read_task
from aang_ray.data.splits import nested_subset, normalised
from aang_ray.data.tasks import TEXT, Corpus, External, Labelled, card_named
from aang_ray.data.tokens import load_tokenizer, read_tokens, token_limit, tokenise, tokenizer_facts, write_tokens
from aang_ray.errors import UserError

FORMAT = 1
"""Version of the cached files of external data sets. Raise it when a change makes different files."""
MANIFEST = "manifest.json"
_TRAIN = "train.arrow"
_COLUMNS = {"text", "text_b", "label"}


def held_out_sides(raw: RawTask) -> set[str]:
    """Return every normalised text of dev and test; of pairs also each text by itself."""
    return {normalised(side) for split in ("dev", "test") for side in raw.splits[split].texts.sides()}


def without_held_out(passages: list[str], raw: RawTask) -> list[str]:
    """Return the passages that are no text of dev or test."""
    held_out = held_out_sides(raw)
    return [passage for passage in passages if normalised(passage) not in held_out]


def unlabelled_text(
    source: Source, data: DataConfig, raw: RawTask, rest: list[str]
) -> tuple[dict[Corpus, list[str]], dict[str, dict[str, int]]]:
    """Collect unlabelled text by kind, without the texts of dev and test.

    Args:
        source: Names the files of unlabelled text.
        data: Names the column of texts.
        raw: The end task, which may bring in-domain text along.
        rest: Train texts that `data.train_size` left out; they are added to the in-domain text.

    Returns:
        The passages by kind, and counts for the manifest.
    """
    given: dict[Corpus, list[str]] = {kind: read_passages(path, data.text) for kind, path in source.corpora.items()}
    if raw.in_domain is not None and "in_domain" not in given:
        given["in_domain"] = list(raw.in_domain)
    if rest:
        given["in_domain"] = given.get("in_domain", []) + rest
    corpora = {kind: without_held_out(passages, raw) for kind, passages in given.items()}
    counts = {
        str(kind): {"passages": len(corpora[kind]), "left_out": len(passages) - len(corpora[kind])}
        for kind, passages in given.items()
    }
    if rest:
        counts["in_domain"]["given_by_train"] = len(rest)
    return corpora, counts


def external_sources(data: DataConfig) -> dict[str, Source]:
    """Find the data sets of `data.external`, by the name that a space uses in `external:NAME`.

    Raises:
        UserError: if one does not exist, is not of texts, or has the same name as another.
    """
    found: dict[str, Source] = {}
    for named in data.external:
        with _named_in_errors(named):
            card = card_named(named)
            if card is not None and card.modality != TEXT:
                raise UserError(f"this is a task of {card.modality}")
            source = find_source(DataConfig(task=named))
            if source.name in found:
                raise UserError(f"two data sets are called {source.name}")
            found[source.name] = source
    return found


def load_external(data: DataConfig, located: Located, end_task: str) -> tuple[dict[str, External], dict[str, Any]]:
    """Return the external data sets, from the cache or made now, and their manifests, both by name.

    Args:
        data: The configuration of the end task.
        located: The encoder, whose tokenizer makes the tokens.
        end_task: Content key of the prepared end task, which also covers the content of the external data sets.

    Raises:
        UserError: for anything wrong with one of them.
    """
    found: dict[str, External] = {}
    manifests: dict[str, Any] = {}
    for named, (name, source) in zip(data.external, external_sources(data).items(), strict=True):
        content: dict[str, Any] = {"format": FORMAT, "end_task": end_task, "external": name}
        if data.external_size is not None:
            content["size"] = data.external_size
        key = content_key(content)
        with _named_in_errors(named):
            prepare = partial(_prepare, source=source, data=data, located=located)
            folder = made_once(cache_folder() / "external" / key, prepare)
        manifest = manifests[name] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        tokens, columns = read_tokens(folder / _TRAIN)
        found[name] = External(tuple(manifest["label_names"]), Labelled(tokens, columns["label"]))
    return found, manifests


def _prepare(folder: Path, source: Source, data: DataConfig, located: Located) -> None:
    """Write the tokens of an external train split, less examples with a text of dev or test (labels could leak)."""
    raw, columns = _read(source, data)
    names = check_labels(raw.splits)
    train = raw.splits["train"]
    held_out = held_out_sides(read_task(find_source(data), data))
    kept = train.take(
        i for i in range(len(train)) if held_out.isdisjoint(map(normalised, train.texts.take([i]).sides()))
    )
    if not len(kept):
        raise UserError(f"all train texts of {source.name} are dev or test texts of {data.task}")
    tokenizer = load_tokenizer(located)
    limit = token_limit(data, tokenizer_facts(located, tokenizer))
    labels = np.array([names.index(label) for label in kept.labels], dtype=np.int64)
    chosen = np.arange(len(kept))
    if data.external_size is not None and data.external_size < len(kept):
        chosen = nested_subset(labels, data.external_size, data.split_seed, "data.external_size")
    tokens, _ = tokenise(kept.texts.take(chosen), tokenizer, limit, source.name)
    write_tokens(folder / _TRAIN, tokens, {"label": labels[chosen]})
    manifest = {"label_names": names, "columns": columns, "left_out": len(train) - len(kept)}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def _read(source: Source, data: DataConfig) -> tuple[RawTask, dict[str, str | None]]:
    """Return an external data set by the end task's columns, else by `text` and `label`; and the columns it has."""
    default = DataConfig()
    if source.kind == "embedded":
        return read_task(source, default), {}
    # Only the columns: one labelled file is split with the default seed and shares, whatever those of the end task are.
    own = DataConfig(text=data.text, text_b=data.text_b, label=data.label)
    try:
        return read_task(source, own), own.model_dump(include=_COLUMNS)
    except MissingColumn as missing:
        if own == default:
            raise
        try:
            return read_task(source, default), default.model_dump(include=_COLUMNS)
        except MissingColumn:
            expected = ", ".join(wanted_columns(own))
            raise UserError(f"{missing}; it needs the end task's columns ({expected}), or text and label") from missing


@contextmanager
def _named_in_errors(named: str) -> Iterator[None]:
    """Add the name of the external data set to every error of the block."""
    try:
        yield
    except UserError as error:
        raise UserError(f"data.external: {named}: {str(error).removeprefix('data.task: ')}") from error
