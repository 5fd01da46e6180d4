"""Retrieved text: the passages of a pool that are nearest to the train texts, by BM25.

kNN-TAPT (Gururangan et al. 2020, section 4.2) selects unlabelled text for a task in the same way, by the distance of
embeddings. BM25 (Robertson and Zaragoza 2009) needs no model. It is computed by bm25s, which the extra `retrieval`
installs.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from aang_ray.config import DataConfig
from aang_ray.data.cache import file_digest
from aang_ray.data.corpora import without_held_out
from aang_ray.data.read import RawTask
from aang_ray.data.sources import read_passages
from aang_ray.data.splits import normalised
from aang_ray.errors import UserError

RECIPE = 1
"""Version of how passages are chosen; counts in the fingerprint. Raise it when a change chooses others."""
SHOWN = 3
"""Number of train texts that `aang data show` prints with their nearest passage."""
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Retrieved:
    """The passages that were chosen from a pool."""

    passages: list[str]
    """In the order of the pool."""
    report: dict[str, Any]
    """For the manifest, as JSON values."""


def retrieved_text(data: DataConfig, raw: RawTask, train: Sequence[str]) -> Retrieved:
    """Return the passages of the pool that are among the `retrieve_k` nearest of at least one train text.

    Repeated passages of the pool, texts of dev and test, and the train texts themselves are left out before.

    Args:
        data: Names the pool and the number of passages for each text.
        raw: The end task, whose dev and test texts are left out.
        train: The train texts.

    Raises:
        UserError: If the pool cannot be read, nothing is left of it, no passage shares a word with a train text, or
            bm25s is not installed.
    """
    given = read_passages(_pool(data), data.text)
    known = {normalised(text) for text in train}
    distinct = {normalised(passage): passage for passage in reversed(given)}
    unique = [passage for key, passage in reversed(distinct.items()) if key not in known]
    pool = without_held_out(unique, raw)
    if not pool:
        raise UserError(f"data.retrieve_from: all passages of {data.retrieve_from} are texts of {data.task}")
    nearest = nearest_passages(pool, train, data.retrieve_k)
    chosen = sorted({index for found in nearest for index in found})
    if not chosen:
        raise UserError(f"data.retrieve_from: no passage of {data.retrieve_from} shares a word with a train text")
    examples = [[text, pool[found[0]]] for text, found in zip(train, nearest, strict=True) if found][:SHOWN]
    report = {
        "pool": len(given),
        "left_out": len(given) - len(pool),
        "queries": len(train),
        "k": data.retrieve_k,
        "examples": examples,
    }
    return Retrieved([pool[index] for index in chosen], report)


def nearest_passages(pool: Sequence[str], queries: Sequence[str], k: int) -> list[list[int]]:
    """Return the indices of the k passages with the highest BM25 score for each query, the best first.

    A passage without a word of the query has the score 0 and is not near. Equal scores go by the order of the pool.

    Raises:
        UserError: If bm25s is not installed.
    """
    try:
        import bm25s
    except ModuleNotFoundError as error:
        raise UserError("data.retrieve_from needs bm25s: pip install 'aang-ray[retrieval]'") from error
    words = [_words(passage) for passage in pool]
    if not any(words):
        return [[] for _ in queries]
    index = bm25s.BM25(k1=1.5, b=0.75, method="lucene")
    index.index(words, show_progress=False)
    nearest: list[list[int]] = []
    for query in queries:
        asked = [word for word in dict.fromkeys(_words(query)) if word in index.vocab_dict]
        if not asked:
            nearest.append([])
            continue
        scores = np.asarray(index.get_scores(asked))
        order = np.argsort(-scores, kind="stable")[:k]
        nearest.append([int(place) for place in order if scores[place] > 0])
    return nearest


def retrieval_fingerprint(data: DataConfig) -> list[Any]:
    """Return what decides which passages are chosen, beside the end task: the pool's content and the number k."""
    pool = _pool(data)
    return [pool.suffix.lower(), file_digest(pool), data.retrieve_k, RECIPE]


def _pool(data: DataConfig) -> Path:
    path = Path(data.retrieve_from or "").expanduser()
    if not path.is_file():
        raise UserError(f"data.retrieve_from: there is no file {data.retrieve_from}")
    return path


def _words(text: str) -> list[str]:
    return _WORD.findall(normalised(text))
