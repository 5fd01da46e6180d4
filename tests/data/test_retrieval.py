"""Retrieved text: BM25 against its formula, and which passages of a pool are taken."""

from __future__ import annotations

import builtins
import io
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from aang_ray.config import DataConfig, EncoderConfig
from aang_ray.data import data_fingerprint, load_end_task, print_task
from aang_ray.data.retrieval import nearest_passages
from aang_ray.errors import UserError
from tests.data.conftest import ids

words = st.lists(st.sampled_from(["good", "bad", "film", "plot", "scene"]), min_size=1, max_size=8).map(" ".join)


def bm25(query: str, passage: str, pool: list[str]) -> float:
    """Lucene's BM25 with k_1 = 1.5, b = 0.75 (Robertson and Zaragoza 2009, equation 3.15, without k_1 + 1)."""
    counts = [Counter(text.split()) for text in pool]
    mean = sum(counter.total() for counter in counts) / len(pool)
    found = Counter(passage.split())
    score = 0.0
    for word in set(query.split()):
        having = sum(word in counter for counter in counts)
        idf = math.log(1 + (len(pool) - having + 0.5) / (having + 0.5))
        score += idf * found[word] / (found[word] + 1.5 * (1 - 0.75 + 0.75 * found.total() / mean))
    return score


@given(st.lists(words, min_size=1, max_size=6), words, st.integers(1, 4))
def test_the_nearest_have_the_highest_scores(pool: list[str], query: str, k: int) -> None:
    (found,) = nearest_passages(pool, [query], k)
    scores = [bm25(query, passage, pool) for passage in pool]
    expected = [index for index in sorted(range(len(pool)), key=lambda i: -scores[i]) if scores[index] > 0][:k]
    assert len(found) == len(expected)
    assert [scores[i] for i in found] == pytest.approx([scores[i] for i in expected], rel=1e-5)


def test_words_are_compared_in_normalised_form_and_unknown_ones_are_ignored() -> None:
    pool = ["The FILM was dull.", "A plot", "?!"]
    assert nearest_passages(pool, ["film!", "nothing here", "Plot, plot"], 2) == [[0], [], [1]]
    assert nearest_passages(["?", "!"], ["film"], 2) == [[]]


def write_pool(path: Path, *passages: str) -> str:
    path.write_text("\n".join(passages) + "\n")
    return str(path)


def test_dev_test_and_train_texts_are_left_out(
    encoder: EncoderConfig, folder: Callable[..., Path], tmp_path: Path
) -> None:
    """Of the pool are a dev, a test and a train text, a repeated passage, and one without a word of train."""
    path = folder()
    pool = write_pool(
        tmp_path / "pool.txt", "BAD  plot", "good film", "the film", "The  film", "scene scene", "dull film"
    )
    data = DataConfig(task=str(path), retrieve_from=pool, retrieve_k=5)
    task = load_end_task(data, encoder)
    found = task.corpora["retrieved"]
    assert [found[i].tolist() for i in range(len(found))] == [ids("the film"), ids("dull film")]
    report = task.manifest["retrieved"]
    assert (report["pool"], report["left_out"], report["queries"], report["k"]) == (6, 3, len(task.train), 5)
    page = io.StringIO()
    print_task(data, encoder, Console(file=page, width=200))
    assert "Corpus retrieved: 2 passages" in page.getvalue()
    assert (
        f"the 5 nearest by BM25 to each of {len(task.train)} train texts, from a pool of 6 passages" in page.getvalue()
    )
    assert "nearest: " in page.getvalue()


def test_pool_and_number_enter_the_fingerprint(folder: Callable[..., Path], tmp_path: Path) -> None:
    path, pool = str(folder()), write_pool(tmp_path / "pool.txt", "the film")
    prints = {
        data_fingerprint(DataConfig(task=path)),
        data_fingerprint(DataConfig(task=path, retrieve_from=pool)),
        data_fingerprint(DataConfig(task=path, retrieve_from=pool, retrieve_k=3)),
    }
    write_pool(tmp_path / "pool.txt", "a film")
    prints.add(data_fingerprint(DataConfig(task=path, retrieve_from=pool)))
    assert len(prints) == 4


def test_errors_are_one_line(
    encoder: EncoderConfig, folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(folder())

    def load(pool: str) -> None:
        load_end_task(DataConfig(task=path, retrieve_from=pool), encoder)

    with pytest.raises(UserError, match=r"data.retrieve_from: there is no file nowhere"):
        load("nowhere")
    with pytest.raises(UserError, match=r"data.retrieve_from: all passages of .* are texts of"):
        load(write_pool(tmp_path / "same.txt", "good film"))
    with pytest.raises(UserError, match=r"no passage of .* shares a word with a train text"):
        load(write_pool(tmp_path / "far.txt", "unheard of"))
    real = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name == "bm25s":
            raise ModuleNotFoundError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"data.retrieve_from needs bm25s: pip install 'aang-ray\[retrieval\]'"):
        load(write_pool(tmp_path / "near.txt", "the film"))
