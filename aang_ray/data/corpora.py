"""Other labelled data sets beside an end task: their train splits, without what its dev and test hold.

An external data set is read by the columns of the end task; where it lacks one of them, by `text` and `label`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from aang_ray.config import DataConfig
from aang_ray.data.cache import cache_folder, content_key, made_once
from aang_ray.data.prepare import MANIFEST, held_out_sides, token_limit
from aang_ray.data.pretrained import Located
from aang_ray.data.read import MissingColumn, RawTask, check_labels
from aang_ray.data.splits import normalised
from aang_ray.data.tasks import External, Labelled, Source, card_named, find_source, read_task
from aang_ray.data.tokens import load_tokenizer, read_tokens, tokenise, tokenizer_facts, write_tokens
from aang_ray.errors import UserError

FORMAT = 1
"""Version of the files: a change makes new ones."""
_TRAIN = "train.arrow"


def external_sources(data: DataConfig) -> dict[str, Source]:
    """What `data.external` names, by the names that `external:NAME` goes by.

    Raises:
        UserError: for one that is not there, is not of texts, or is called like another one.
    """
    found: dict[str, Source] = {}
    for named in data.external:
        with _about(named):
            card = card_named(named)
            if card is not None and card.images:
                raise UserError("this is a task of images")
            source = find_source(DataConfig(task=named))
            if source.name in found:
                raise UserError(f"two data sets are called {source.name}")
            found[source.name] = source
    return found


def load_external(data: DataConfig, located: Located, end_task: str) -> tuple[dict[str, External], dict[str, Any]]:
    """The external data sets, and what their manifests say, both by name.

    Args:
        data: the configuration of the end task.
        located: the encoder, whose tokenizer all texts are cut by.
        end_task: content key of the prepared end task, which covers the content of the external sets, too.

    Raises:
        UserError: for anything wrong with one of them.
    """
    found: dict[str, External] = {}
    manifests: dict[str, Any] = {}
    for named, (name, source) in zip(data.external, external_sources(data).items(), strict=True):
        key = content_key({"format": FORMAT, "end_task": end_task, "external": name})
        with _about(named):
            prepare = partial(_prepare, source=source, data=data, located=located)
            folder = made_once(cache_folder() / "external" / key, prepare)
        manifest = manifests[name] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        tokens, columns = read_tokens(folder / _TRAIN)
        found[name] = External(tuple(manifest["label_names"]), Labelled(tokens, columns["label"]))
    return found, manifests


def _prepare(folder: Path, source: Source, data: DataConfig, located: Located) -> None:
    """The train split of an external data set as tokens.

    An example goes where one of its texts is one of dev or test: it could hold the very label that is asked there.
    """
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
    tokens = tokenise(kept.texts, tokenizer, token_limit(data, tokenizer_facts(located, tokenizer)), source.name)
    labels = np.array([names.index(label) for label in kept.labels], dtype=np.int64)
    write_tokens(folder / _TRAIN, tokens.ragged, {"label": labels})
    manifest = {"label_names": names, "columns": columns, "left_out": len(train) - len(kept)}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def _read(source: Source, data: DataConfig) -> tuple[RawTask, Mapping[str, str | None]]:
    """Its texts and labels, and the columns that these are from (none for an embedded task)."""
    if source.kind == "embedded":
        return read_task(source, DataConfig()), {}
    # The columns alone: one labelled file is split by the default seed and shares, whatever the end task's are.
    own, plain = (DataConfig(text=d.text, text_b=d.text_b, label=d.label) for d in (data, DataConfig()))
    try:
        return read_task(source, own), _columns(own)
    except MissingColumn as missing:
        if own == plain:
            raise
        try:
            return read_task(source, plain), _columns(plain)
        except MissingColumn:
            expected = ", ".join(name for name in _columns(own).values() if name is not None)
            raise UserError(
                f"{missing}; it needs the end task's columns ({expected}), or {plain.text} and {plain.label}"
            ) from missing


def _columns(data: DataConfig) -> dict[str, str | None]:
    return {"text": data.text, "text_b": data.text_b, "label": data.label}


@contextmanager
def _about(named: str) -> Iterator[None]:
    """Say of every complaint which external data set it is about."""
    try:
        yield
    except UserError as error:
        raise UserError(f"data.external: {named}: {str(error).removeprefix('data.task: ')}") from error
