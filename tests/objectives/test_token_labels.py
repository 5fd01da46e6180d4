"""Denoising and next-token on every transform and representation."""

from __future__ import annotations

import numpy as np
import pytest

from aang_ray.objectives.primitives import BUILT_IN
from aang_ray.objectives.texts import Texts, Vocabulary
from tests.objectives.cells import WIDTH, cell, sees
from tests.objectives.conftest import FIRST, LAST, MASK, make_texts

ORDERED = ("left-to-right", "right-to-left", "random-factorized")


def unique_texts(lengths: list[int]) -> tuple[Texts, Vocabulary]:
    """Texts in which no ordinary token occurs twice: to see a token's id is to see that token."""
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
    """What the deletion of this key leaves."""
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
    segment = cell(transform, representation, "next-token", texts, vocabulary)
    assert len(segment.labelled_M) > 0
    visible = sees(segment)
    for row, target in zip(segment.labelled_M, segment.targets_M, strict=True):
        assert target not in segment.ids_T[visible[row]]


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
