"""Labels and ranks of every output, against worked examples."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
from sklearn.preprocessing import normalize

from aang_ray.config.sections import Semantics
from aang_ray.objectives.objective import Objective, ruled_out
from aang_ray.objectives.outputs import TF, TF_IDF, Output
from aang_ray.objectives.packing import Segment
from aang_ray.objectives.primitives import BUILT_IN
from aang_ray.objectives.source import OutputSettings, build
from aang_ray.objectives.space import SpaceFile, enumerate_space
from aang_ray.objectives.texts import Texts, Vocabulary
from aang_ray.objectives.visibility import HIGHEST
from tests.objectives.cells import WIDTH, cell, sees
from tests.objectives.conftest import FIRST, LAST, MASK, make_texts
from tests.objectives.source import SPLITS, ragged, step_of


def make(
    transform: str,
    representation: str,
    vocabulary: Vocabulary,
    texts: Texts,
    output: str = "denoise",
    labels: Semantics = "sound",
    pooling: str = "mean",
) -> Segment:
    settings = OutputSettings(0.15, labels, pooling)
    classes = np.zeros(len(texts.lengths_E), dtype=np.int64) if output == "end-task" else None
    return build(Objective("end-task", transform, representation, output), "h", texts, classes, vocabulary, settings)


def first_text_sees(segment: Segment) -> np.ndarray:
    """The first text's visibility by the rule of docs/semantics.md, section 2.5."""
    length = int(segment.lengths_E[0])
    ranks, keys = segment.ranks_T[:length], segment.key_ranks_T[:length]
    return (keys[None, :] <= ranks[:, None]) | np.eye(length, dtype=bool)


def test_next_and_previous_token(vocabulary: Vocabulary) -> None:
    # One text: first, a, b, c, last. Left-to-right labels: first -> a, a -> b, b -> c; not -> last.
    # Right-to-left: b -> a, c -> b, last -> c; not a -> first.
    ids = np.array([FIRST, 10, 11, 12, LAST], dtype=np.int32)
    texts = Texts(ids, np.array([5]), np.zeros(1, dtype=np.uint64))
    forward = make("no-op", "left-to-right", vocabulary, texts)
    assert forward.labelled_M.tolist() == [0, 1, 2]
    assert forward.targets_M.tolist() == [10, 11, 12]
    backward = make("no-op", "right-to-left", vocabulary, texts)
    assert backward.labelled_M.tolist() == [2, 3, 4]
    assert backward.targets_M.tolist() == [10, 11, 12]
    # Rows see: left-to-right themselves and what is before; the first token only itself.
    assert first_text_sees(forward).tolist() == np.tri(5, dtype=bool).tolist()
    expected = np.tri(5, dtype=bool).T.copy()
    expected[:, 0] = True
    expected[0] = [True, False, False, False, False]
    assert first_text_sees(backward).tolist() == expected.tolist()


@pytest.mark.parametrize("representation", ["left-to-right", "right-to-left", "random-factorized"])
@pytest.mark.parametrize("transform", ["no-op", "mask", "replace", "bert-op"])
def test_no_label_is_visible_to_its_row(transform: str, representation: str, vocabulary: Vocabulary) -> None:
    texts = make_texts([12, 7, 30])
    segment = make(transform, representation, vocabulary, texts)
    start = 0
    for length in segment.lengths_E:
        rows = (segment.labelled_M >= start) & (segment.labelled_M < start + length)
        for position, target in zip(segment.labelled_M[rows], segment.targets_M[rows], strict=True):
            keys = segment.key_ranks_T[start : start + length] <= segment.ranks_T[position]
            keys[position - start] = True
            visible_ids = segment.ids_T[start : start + length][keys]
            visible_places = segment.positions_T[start : start + length][keys]
            truth = segment.positions_T[position]
            if transform == "no-op" and representation != "random-factorized":
                truth += 1 if representation == "left-to-right" else -1
            # Neither the target itself nor its place with its own content is to be seen.
            if transform != "bert-op":
                seen = visible_ids[(visible_places == truth) & (visible_ids == target)]
                assert len(seen) == 0 or transform == "replace"
        start += length


def test_queries_of_xlnet_style(vocabulary: Vocabulary) -> None:
    texts = make_texts([20])
    segment = make("no-op", "random-factorized", vocabulary, texts)
    queries = segment.labelled_M
    assert segment.lengths_E.tolist() == [20 + len(queries)]
    assert (segment.ids_T[:20] == texts.ids_T).all()
    assert (segment.ids_T[queries] == MASK).all()
    assert (texts.ids_T[segment.positions_T[queries]] == segment.targets_M).all()
    visible = first_text_sees(segment)
    for query in queries:
        target = segment.positions_T[query]
        assert not visible[:, query][np.arange(len(visible)) != query].any()  # nobody sees a query
        assert visible[query, 0]  # it sees the first token
        assert visible[query, query]
        assert not visible[query, target]
        content = np.arange(1, 20)
        lower = segment.ranks_T[content] < segment.ranks_T[target]
        assert (visible[query, content] == lower).all()
    assert visible[0].sum() == 1  # the first token sees itself alone


def test_label_of_the_text_under_a_random_order(vocabulary: Vocabulary) -> None:
    texts = make_texts([9])
    first = make("mask", "random-factorized", vocabulary, texts, "end-task", pooling="first")
    visible = first_text_sees(first)
    assert visible[0].all()
    assert not visible[1:, 0].any()
    assert first.ranks_T[0] == HIGHEST
    mean = make("mask", "random-factorized", vocabulary, texts, "end-task", pooling="mean")
    order = np.argsort(mean.ranks_T)
    assert first_text_sees(mean)[order][:, order].tolist() == np.tri(9, dtype=bool).tolist()
    assert mean.classes_E is not None
    assert len(mean.labelled_M) == 0


def test_published_no_op_labels_are_the_visible_tokens(vocabulary: Vocabulary) -> None:
    texts = make_texts([30, 30])
    for representation in ("bidirectional", "left-to-right", "random-factorized"):
        segment = make("no-op", representation, vocabulary, texts, labels="published")
        assert (segment.ids_T == texts.ids_T).all()
        assert (segment.targets_M == texts.ids_T[segment.labelled_M]).all()
        assert 0 < len(segment.labelled_M) <= 0.15 * 60 + 2


def test_special_tokens_are_never_labels(vocabulary: Vocabulary) -> None:
    texts = make_texts([3, 5, 40])
    for transform in ("no-op", "mask", "replace", "bert-op"):
        for representation in ("left-to-right", "right-to-left", "random-factorized"):
            segment = make(transform, representation, vocabulary, texts)
            assert vocabulary.real(segment.targets_M).all()
            assert segment.normaliser == len(segment.labelled_M) > 0


def test_a_text_of_special_tokens_alone_has_no_labels(vocabulary: Vocabulary) -> None:
    texts = make_texts([2, 2])
    for transform in ("no-op", "mask"):
        for representation in ("left-to-right", "random-factorized"):
            assert len(make(transform, representation, vocabulary, texts).labelled_M) == 0


# Denoising and next-token, on every transform and representation


ORDERED = ("left-to-right", "right-to-left", "random-factorized")


def unique_texts(lengths: list[int]) -> tuple[Texts, Vocabulary]:
    """Texts in which no ordinary token occurs twice, so that an id identifies a token."""
    texts = make_texts(lengths)
    ids = texts.ids_T.copy()
    ordinary = ids > 3
    ids[ordinary] = 4 + np.arange(ordinary.sum())
    return Texts(ids, texts.lengths_E, texts.keys_E), Vocabulary(4 + int(ordinary.sum()), MASK, (0, FIRST, LAST, MASK))


def test_deletion_asks_before_each_gap() -> None:
    # first a b c d e last, and b, c and e are deleted: what is read is first a d last at the places 0..3. Before
    # the gap of b and c stands a, which is asked for b; before that of e stands d, which is asked for e.
    vocabulary = Vocabulary(50, MASK, (0, FIRST, LAST, MASK))
    ids = np.array([FIRST, 10, 11, 12, 13, 14, LAST], dtype=np.int32)
    texts = Texts(ids, np.array([7]), np.zeros(1, dtype=np.uint64))
    key = next(k for k in range(3000) if deleted(texts, k, vocabulary) == [FIRST, 10, 13, LAST])
    segment = cell("deletion", "bidirectional", "denoise", with_key(texts, key), vocabulary, rate=0.6)
    assert segment.positions_T.tolist() == [0, 1, 2, 3]
    assert segment.labelled_M.tolist() == [1, 2]
    assert segment.targets_M.tolist() == [11, 14]
    # Next token: first -> a, a -> b, d -> e; last has none. Previous: d -> c, last -> e, a has none.
    forward = cell("deletion", "left-to-right", "next-token", with_key(texts, key), vocabulary, rate=0.6)
    assert (forward.labelled_M.tolist(), forward.targets_M.tolist()) == ([0, 1, 2], [10, 11, 14])
    backward = cell("deletion", "right-to-left", "next-token", with_key(texts, key), vocabulary, rate=0.6)
    assert (backward.labelled_M.tolist(), backward.targets_M.tolist()) == ([2, 3], [12, 14])


def deleted(texts: Texts, key: int, vocabulary: Vocabulary) -> list[int]:
    """The tokens that are left after deletion with this random key."""
    ids: list[int] = cell(
        "deletion", "bidirectional", "denoise", with_key(texts, key), vocabulary, rate=0.6
    ).ids_T.tolist()
    return ids


def with_key(texts: Texts, key: int) -> Texts:
    return Texts(texts.ids_T, texts.lengths_E, np.array([key], dtype=np.uint64))


@pytest.mark.parametrize("representation", ["bidirectional", *ORDERED])
@pytest.mark.parametrize("transform", ["mask", "deletion", "span-mask"])
def test_denoising_shows_no_label_to_its_row(transform: str, representation: str) -> None:
    texts, vocabulary = unique_texts([12, 7, 30, 3])
    segment = cell(transform, representation, "denoise", texts, vocabulary)
    assert len(segment.labelled_M) == len(segment.targets_M) == segment.normaliser > 0
    visible = sees(segment)
    for row, target in zip(segment.labelled_M, segment.targets_M, strict=True):
        assert target not in segment.ids_T[visible[row]]


@pytest.mark.parametrize(
    ("transform", "representation"),
    [
        *((t, r) for t in BUILT_IN.transforms for r in ("left-to-right", "right-to-left")),
        ("no-op", "random-factorized"),
    ],
)
def test_the_next_token_is_hidden_from_its_row(transform: str, representation: str) -> None:
    texts, _ = unique_texts([12, 7, 30, 3])
    # So many ids to replace a token by that none stands there by chance.
    vocabulary = Vocabulary(1_000_000, MASK, (0, FIRST, LAST, MASK))
    objective = Objective("end-task", transform, representation, "next-token")
    if ruled_out(objective, "sound", BUILT_IN.rules(objective)):
        return
    segment = cell(transform, representation, "next-token", texts, vocabulary)
    assert len(segment.labelled_M) > 0
    visible = sees(segment)
    for row, target in zip(segment.labelled_M, segment.targets_M, strict=True):
        assert target not in segment.ids_T[visible[row]], f"{objective.key} shows its label: forbid it by a Rule"


def test_corrupted_next_tokens_are_those_before_the_corruption() -> None:
    texts, vocabulary = unique_texts([30])
    clean = cell("no-op", "left-to-right", "next-token", texts, vocabulary)
    for transform in ("mask", "noised-embeddings", "span-mask", "replace"):
        corrupted = cell(transform, "left-to-right", "next-token", texts, vocabulary)
        assert (corrupted.targets_M == clean.targets_M).all()
        assert (corrupted.labelled_M == clean.labelled_M).all()


@pytest.mark.parametrize("representation", ORDERED)
def test_denoising_an_intact_text_is_next_token(representation: str) -> None:
    texts, vocabulary = unique_texts([12, 7, 30])
    one, other = (cell("no-op", representation, output, texts, vocabulary) for output in ("denoise", "next-token"))
    for name in ("ids_T", "positions_T", "ranks_T", "key_ranks_T", "lengths_E", "labelled_M"):
        if (name, representation) != ("ranks_T", "random-factorized"):
            assert (getattr(one, name) == getattr(other, name)).all()
    assert (one.targets_M == other.targets_M).all()


def test_noise_leaves_ids_and_asks_for_the_noised() -> None:
    texts, vocabulary = unique_texts([30, 8])
    segment = cell("noised-embeddings", "bidirectional", "denoise", texts, vocabulary, deviation=3.0)
    assert (segment.ids_T == texts.ids_T).all()
    assert (segment.noised_N == segment.labelled_M).all()
    assert segment.noise_NW.shape == (len(segment.noised_N), WIDTH)
    part = segment.part(1, 2)
    assert (part.noise_NW == segment.noise_NW[segment.noised_N >= 30]).all()
    assert (part.noised_N == segment.noised_N[segment.noised_N >= 30] - 30).all()


def test_noise_is_normal_and_belongs_to_its_text() -> None:
    texts, vocabulary = unique_texts([60] * 100)
    noise = cell("noised-embeddings", "bidirectional", "denoise", texts, vocabulary, deviation=2.0).noise_NW
    # About 870 * 32 numbers: the mean is known to 0.012, the deviation to 0.0085.
    assert noise.mean() == pytest.approx(0, abs=0.05)
    assert noise.std() == pytest.approx(2.0, abs=0.04)
    alone = Texts(texts.ids_T[60:120], texts.lengths_E[:1], texts.keys_E[1:2])
    again = cell("noised-embeddings", "left-to-right", "denoise", alone, vocabulary, deviation=2.0)
    whole = cell("noised-embeddings", "bidirectional", "denoise", texts, vocabulary, deviation=2.0)
    assert (again.noise_NW == whole.part(1, 2).noise_NW).all()


# TF and TF-IDF, against scikit-learn's vectorizers on the same texts


def documents(texts: Texts) -> list[list[int]]:
    ends = np.cumsum(texts.lengths_E)
    return [[int(i) for i in texts.ids_T[e - n : e] if i > 3] for n, e in zip(texts.lengths_E, ends, strict=True)]


def fitted(output: Output, train: Texts, vocabulary: Vocabulary) -> Any:
    assert output.fit is not None
    return output.fit(ragged(train), vocabulary)


def by_scikit_learn(name: str, train: Texts, texts: Texts) -> np.ndarray:
    """scikit-learn's value of every real token of the texts, in order."""
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
    texts = Texts(segment.ids_T, segment.lengths_E, np.zeros(segment.examples, dtype=np.uint64))
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
