"""Selection and corruption."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aang_ray.objectives.texts import Bool, Int32, Texts, Vocabulary
from aang_ray.objectives.transforms import TRANSFORMS, select
from tests.objectives.conftest import FIRST, LAST, MASK, PAD, make_texts

VOCABULARY = Vocabulary(50, MASK, (PAD, FIRST, LAST, MASK))
BY_NAME = {transform.name: transform for transform in TRANSFORMS}


def corrupt(name: str, texts: Texts, selected: Bool, vocabulary: Vocabulary) -> Int32:
    return BY_NAME[name].corrupt(texts, selected, vocabulary).ids_T


@given(st.lists(st.integers(2, 40), min_size=1, max_size=8), st.integers(0, 10))
def test_selection_takes_the_stated_share_of_real_tokens(lengths: list[int], seed: int) -> None:
    texts = make_texts(lengths, seed)
    selected = select(texts, VOCABULARY.real(texts.ids_T), 0.15)
    assert not selected[~VOCABULARY.real(texts.ids_T)].any()
    for start, length in zip(texts.starts_E, texts.lengths_E, strict=True):
        real = length - 2
        count = int(selected[start : start + length].sum())
        low = min(real, max(1, int(np.floor(0.15 * real))))
        assert low <= count <= max(low, np.floor(0.15 * real) + 1)


def test_selection_is_unbiased_and_uniform() -> None:
    # 22 real tokens: 0.15 * 22 = 3.3 selected on average; every place equally often.
    texts = make_texts([24] * 4000)
    selected = select(texts, VOCABULARY.real(texts.ids_T), 0.15).reshape(4000, 24)
    assert selected.sum(axis=1).mean() == pytest.approx(3.3, abs=0.05)
    share = selected[:, 1:-1].mean(axis=0)
    assert np.abs(share - 0.15).max() < 0.03  # five standard deviations of a share of 4000


def test_selection_does_not_depend_on_the_neighbours() -> None:
    together = make_texts([10, 20, 30])
    selected = select(together, VOCABULARY.real(together.ids_T), 0.15)
    for index, start in enumerate(together.starts_E):
        length = together.lengths_E[index]
        alone = Texts(together.ids_T[start : start + length], together.lengths_E[[index]], together.keys_E[[index]])
        expected = selected[start : start + length]
        assert (select(alone, VOCABULARY.real(alone.ids_T), 0.15) == expected).all()


def test_no_op_mask_and_replace() -> None:
    texts = make_texts([30] * 50)
    selected = select(texts, VOCABULARY.real(texts.ids_T), 0.15)
    assert (corrupt("no-op", texts, selected, VOCABULARY) == texts.ids_T).all()
    masked = corrupt("mask", texts, selected, VOCABULARY)
    assert (masked[selected] == MASK).all()
    assert (masked[~selected] == texts.ids_T[~selected]).all()
    replaced = corrupt("replace", texts, selected, VOCABULARY)
    assert VOCABULARY.real(replaced[selected]).all()
    assert (replaced[~selected] == texts.ids_T[~selected]).all()
    assert (replaced[selected] == texts.ids_T[selected]).mean() < 0.1


def test_bert_op_is_80_10_10() -> None:
    texts = make_texts([40] * 2000)
    selected = select(texts, VOCABULARY.real(texts.ids_T), 0.15)
    result = corrupt("bert-op", texts, selected, VOCABULARY)
    masked = (result[selected] == MASK).mean()
    same = (result[selected] == texts.ids_T[selected]).mean()
    # 46 ordinary tokens: a replacement is the same token in 1 of 46 cases.
    assert masked == pytest.approx(0.8, abs=0.02)
    assert same == pytest.approx(0.1 + 0.1 / 46, abs=0.02)
    assert (result[~selected] == texts.ids_T[~selected]).all()


def test_replacements_cover_all_ordinary_tokens() -> None:
    texts = make_texts([60] * 200)
    everything = np.ones(len(texts.ids_T), dtype=np.bool_)
    drawn = corrupt("replace", texts, everything, VOCABULARY)
    assert set(drawn.tolist()) == set(VOCABULARY.ordinary_ids.tolist())
