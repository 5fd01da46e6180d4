"""TF and TF-IDF of tokens against scikit-learn's vectorizers on the same texts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
from sklearn.preprocessing import normalize

from aang_ray.objectives.outputs import TF, TF_IDF, Output
from aang_ray.objectives.space import SpaceFile, enumerate_space
from aang_ray.objectives.texts import Texts, Vocabulary
from tests.objectives.cells import cell
from tests.objectives.conftest import make_texts
from tests.objectives.source import SPLITS, ragged, step_of


def documents(texts: Texts) -> list[list[int]]:
    ends = np.cumsum(texts.lengths_E)
    return [[int(i) for i in texts.ids_T[e - n : e] if i > 3] for n, e in zip(texts.lengths_E, ends, strict=True)]


def fitted(output: Output, train: Texts, vocabulary: Vocabulary) -> Any:
    assert output.fit is not None
    return output.fit(ragged(train), vocabulary)


def by_scikit_learn(name: str, train: Texts, texts: Texts) -> np.ndarray:
    """Value of every real token of the texts, one after another."""
    terms = [str(i) for i in range(50)]
    analyzer = lambda document: [str(i) for i in document]  # noqa: E731
    if name == "tf-idf":
        vectorizer = TfidfVectorizer(analyzer=analyzer, vocabulary=terms).fit(documents(train))
        matrix = vectorizer.transform(documents(texts))
    else:
        matrix = normalize(CountVectorizer(analyzer=analyzer, vocabulary=terms).transform(documents(texts)))
    dense = matrix.toarray()
    return np.array([dense[row, i] for row, document in enumerate(documents(texts)) for i in document])


@pytest.mark.parametrize("output", [TF, TF_IDF], ids=lambda output: output.name)
def test_values_are_scikit_learns_standardised_on_train(output: Output, vocabulary: Vocabulary) -> None:
    train, other = make_texts([12, 30, 7, 21] * 5, seed=1), make_texts([9, 40], seed=2)
    known = fitted(output, train, vocabulary)
    on_train = by_scikit_learn(output.name, train, train)
    for texts in (train, other):
        segment = cell("no-op", "bidirectional", output.name, texts, vocabulary, fitted=known)
        expected = (by_scikit_learn(output.name, train, texts) - on_train.mean()) / on_train.std()
        np.testing.assert_allclose(segment.targets_M[:, 0], expected, rtol=1e-5, atol=1e-6)
        assert (segment.labelled_M == np.flatnonzero(vocabulary.real(texts.ids_T))).all()
        assert segment.normaliser == len(expected)
    labels = cell("no-op", "bidirectional", output.name, train, vocabulary, fitted=known).targets_M
    assert labels.mean() == pytest.approx(0, abs=1e-5)
    assert labels.std() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("output", [TF, TF_IDF], ids=lambda output: output.name)
def test_a_run_knows_the_frequencies_of_train_alone(output: Output, vocabulary: Vocabulary) -> None:
    block = {"data": ["end-task"], "transform": ["no-op"], "representation": ["bidirectional"]}
    space = enumerate_space("mine", SpaceFile.model_validate({"blocks": [{**block, "output": [output.name]}]}))
    segment = step_of(space, vocabulary).segments[2]
    texts = Texts(segment.ids_T, segment.lengths_E, np.zeros(segment.texts, dtype=np.uint64))
    on_train = by_scikit_learn(output.name, SPLITS["train"], SPLITS["train"])
    expected = (by_scikit_learn(output.name, SPLITS["train"], texts) - on_train.mean()) / on_train.std()
    np.testing.assert_allclose(segment.targets_M[:, 0], expected, rtol=1e-5, atol=1e-6)


def test_a_rare_word_weighs_more(vocabulary: Vocabulary) -> None:
    # Token 10 stands in each of 10 texts, token 20 in one: idf 1 + ln(11/11) = 1 and 1 + ln(11/2) = 2.7047. In
    # a text of one each, tf-idf = (1, 2.7047) / |(1, 2.7047)| = (0.3468, 0.9380).
    ids = np.array([1, 10, 20, 2] + [1, 10, 11, 2] * 9, dtype=np.int32)
    train = Texts(ids, np.full(10, 4), np.arange(10, dtype=np.uint64))
    known = fitted(TF_IDF, train, vocabulary)
    labels = cell("no-op", "bidirectional", "tf-idf", train, vocabulary, fitted=known).targets_M[:2, 0]
    np.testing.assert_allclose(labels * known.deviation + known.mean, [0.3468, 0.9380], atol=1e-4)


@pytest.mark.parametrize("transform", ["mask", "replace", "deletion", "span-mask"])
def test_labels_are_those_of_the_text_before_it_was_corrupted(transform: str, vocabulary: Vocabulary) -> None:
    texts = make_texts([12, 30, 7])
    known = fitted(TF_IDF, texts, vocabulary)
    clean = cell("no-op", "bidirectional", "tf-idf", texts, vocabulary, fitted=known)
    corrupted = cell(transform, "bidirectional", "tf-idf", texts, vocabulary, fitted=known)
    if transform == "deletion":
        assert len(corrupted.targets_M) < len(clean.targets_M)
        of = {int(i): v for i, v in zip(clean.ids_T[clean.labelled_M[:10]], clean.targets_M[:10, 0], strict=True)}
        for row, value in zip(corrupted.labelled_M[:5], corrupted.targets_M[:5, 0], strict=True):
            assert value == of[int(corrupted.ids_T[row])]
    else:
        assert (corrupted.targets_M == clean.targets_M).all()


@pytest.mark.parametrize("output", [TF, TF_IDF], ids=lambda output: output.name)
@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 6, 11, 13])
def test_where_all_values_are_alike_nothing_is_divided_by_zero(
    output: Output, tokens: int, vocabulary: Vocabulary
) -> None:
    # Every token of every text has the value 1 / sqrt(k), but for rounding: of k = 5 the deviation is 6e-17.
    ids = np.array([1, *range(10, 10 + tokens), 2] * 37, dtype=np.int32)
    texts = Texts(ids, np.full(37, tokens + 2), np.arange(37, dtype=np.uint64))
    known = fitted(output, texts, vocabulary)
    labels = cell("no-op", "bidirectional", output.name, texts, vocabulary, fitted=known).targets_M
    np.testing.assert_allclose(labels, 0, atol=1e-12)
