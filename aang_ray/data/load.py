"""An end task by its configuration: from the cache, or made now."""

from __future__ import annotations

import importlib.metadata
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from aang_ray.config import DataConfig, EncoderConfig
from aang_ray.data.cache import cache_folder, content_key, file_digest, made_once
from aang_ray.data.corpora import external_sources, load_external
from aang_ray.data.embedded import RECIPE, SDIST_SHA256
from aang_ray.data.neural_lm import neural_fingerprint
from aang_ray.data.prepare import FORMAT, MANIFEST, prepare
from aang_ray.data.pretrained import locate, tokenizer_fingerprint
from aang_ray.data.tasks import Corpus, EndTask, Labelled, Metric, Source, card_of, find_source
from aang_ray.data.tokens import read_tokens


def load_end_task(data: DataConfig, encoder: EncoderConfig) -> EndTask:
    """Everything that a run reads of its end task, as views of memory-mapped files.

    Made once for each content of data and tokenizer; several processes may ask at the same time.

    Raises:
        UserError: for anything wrong with the data or the encoder's tokenizer.
    """
    source, located = find_source(data), locate(encoder)
    tokenizer = tokenizer_fingerprint(located)
    fields = ("text", "text_b", "label", "train_size", "max_tokens", "split_seed", "dev_fraction", "test_fraction")
    key = {
        "format": FORMAT,
        "data": _fingerprint(source, data),
        "choices": {name: getattr(data, name) for name in fields},
        "tokenizer": tokenizer,
        "tokenizers": importlib.metadata.version("tokenizers"),
    }
    content = content_key(key)
    folder = made_once(cache_folder() / "tokens" / content, lambda draft: prepare(draft, source, data, located))
    named = {"name": source.name, "kind": source.kind, "source": source.place}
    made_with = {"encoder": located.source, "tokenizer": tokenizer, "data": key["data"]}
    task = _open(folder, data, named | made_with)
    if not data.external:
        return task
    external, manifests = load_external(data, located, content)
    return replace(task, external=external, manifest={**task.manifest, "external": manifests})


def data_fingerprint(data: DataConfig) -> str:
    """Hash of what the names in a configuration's `data` stand for, and of the card that they take.

    Files count by their content, a Hub dataset by its name and revision, an embedded task by the
    hash of the distribution that it is made from.

    Raises:
        UserError: for a file or folder that is not there.
    """
    return _fingerprint(find_source(data), data)


def _fingerprint(source: Source, data: DataConfig) -> str:
    card = card_of(data)
    content: dict[str, Any] = {
        "kind": source.kind,
        "card": card.name if card else None,
        "splits": {split: _file(path) for split, path in source.splits.items()},
        "corpora": {kind: _file(path) for kind, path in source.corpora.items()},
    }
    match source.kind:
        case "embedded":
            content["made"] = [source.name, SDIST_SHA256, RECIPE]
        case "file":
            content["file"] = _file(Path(source.place))
        case "hub":
            name, configuration, revision = source.hub
            content["hub"] = [name, configuration, revision]
    if data.neural_lm is not None:
        content["neural_lm"] = neural_fingerprint(data)
    if data.external:
        external = zip(data.external, external_sources(data), strict=True)
        content["external"] = {name: data_fingerprint(DataConfig(task=named)) for named, name in external}
    return content_key(content)


def _file(path: Path) -> list[str]:
    return [path.suffix.lower(), file_digest(path)]


def _open(folder: Path, data: DataConfig, named: dict[str, Any]) -> EndTask:
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8")) | named
    train, _ = _labelled(folder / "train.arrow")
    dev, _ = _labelled(folder / "dev.arrow")
    test, columns = _labelled(folder / "test.arrow")
    kinds: tuple[Corpus, ...] = ("in_domain", "out_of_domain", "neural_lm")
    names = tuple(manifest["label_names"])
    return EndTask(
        name=named["name"],
        label_names=names,
        metric=_metric(data),
        train=train,
        dev=dev,
        test=test,
        test_clean=np.flatnonzero(columns["clean"]).astype(np.int64),
        corpora={kind: read_tokens(folder / f"{kind}.arrow")[0] for kind in kinds if kind in manifest["corpora"]},
        class_weights=balanced_weights(train.labels, len(names)) if data.class_weights == "balanced" else None,
        manifest=manifest,
    )


def balanced_weights(labels: npt.NDArray[np.int64], classes: int) -> npt.NDArray[np.float32]:
    """Weight of class c: N / (C * N_c), so that the weights of all N examples sum to N."""
    counts = np.bincount(labels, minlength=classes)
    return (len(labels) / (classes * counts)).astype(np.float32)


def _labelled(path: Path) -> tuple[Labelled, dict[str, npt.NDArray[Any]]]:
    tokens, columns = read_tokens(path)
    return Labelled(tokens, columns["label"]), columns


def _metric(data: DataConfig) -> Metric:
    if data.metric is not None:
        return data.metric
    card = card_of(data)
    return card.metric if card else "accuracy"
