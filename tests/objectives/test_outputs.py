"""Labels and ranks of every cell of T x R, against a worked example."""

from __future__ import annotations

import numpy as np
import pytest

from aang_ray.config.sections import Semantics
from aang_ray.objectives.objective import Objective
from aang_ray.objectives.packing import Segment
from aang_ray.objectives.source import OutputSettings, build
from aang_ray.objectives.texts import Texts, Vocabulary
from aang_ray.objectives.visibility import HIGHEST
from tests.objectives.conftest import FIRST, LAST, MASK, make_texts


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


def sees(segment: Segment) -> np.ndarray:
    """The first text's visibility by the rule of semantics section 2.5."""
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
    assert sees(forward).tolist() == np.tri(5, dtype=bool).tolist()
    expected = np.tri(5, dtype=bool).T.copy()
    expected[:, 0] = True
    expected[0] = [True, False, False, False, False]
    assert sees(backward).tolist() == expected.tolist()


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
    visible = sees(segment)
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
    visible = sees(first)
    assert visible[0].all()
    assert not visible[1:, 0].any()
    assert first.ranks_T[0] == HIGHEST
    mean = make("mask", "random-factorized", vocabulary, texts, "end-task", pooling="mean")
    order = np.argsort(mean.ranks_T)
    assert sees(mean)[order][:, order].tolist() == np.tri(9, dtype=bool).tolist()
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
