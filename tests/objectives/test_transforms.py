"""Which tokens are selected, alone or in spans, and what happens to them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aang_ray.objectives.texts import Bool, Int32, Texts, Vocabulary
from aang_ray.objectives.transforms import TRANSFORMS, select, span_lengths
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


# Spans: their lengths, their number, their places


SPAN_MASK = next(transform for transform in TRANSFORMS if transform.name == "span-mask")


def test_lengths_are_geometric_and_cut_at_ten() -> None:
    # P(l) = 0.2 * 0.8^(l - 1) / (1 - 0.8^10): 0.2 / 0.8926 = 0.2241 for l = 1, mean 3.797 (SpanBERT: 3.8).
    lengths = span_lengths((np.arange(100_000) + 0.5) / 100_000)
    expected = 0.2 * 0.8 ** np.arange(10) / (1 - 0.8**10)
    np.testing.assert_allclose(np.bincount(lengths, minlength=11)[1:] / 100_000, expected, atol=2e-5)
    assert lengths.mean() == pytest.approx(3.797, abs=1e-3)


@given(st.lists(st.integers(2, 60), min_size=1, max_size=8), st.integers(0, 10), st.floats(0.05, 0.95))
def test_as_many_tokens_as_single_ones_would_be(lengths: list[int], seed: int, rate: float) -> None:
    texts = make_texts(lengths, seed)
    real = VOCABULARY.real(texts.ids_T)
    spans, single = (chosen(texts, real, rate) for chosen in (SPAN_MASK.select, select))
    assert not spans[~real].any()
    count = len(lengths)
    assert (
        np.bincount(texts.text_T[spans], minlength=count) == np.bincount(texts.text_T[single], minlength=count)
    ).all()


def test_they_are_spans() -> None:
    # 100 real tokens, 15 of which are selected: single ones stand alone in 85 % of the cases (runs of 1.18 on
    # average); spans are longer.
    texts = make_texts([102] * 3000)
    real = VOCABULARY.real(texts.ids_T)

    def runs(selected: np.ndarray) -> float:
        grid = selected.reshape(3000, 102)
        return float(grid.sum() / (grid & ~np.roll(grid, 1, axis=1)).sum())

    spans = SPAN_MASK.select(texts, real, 0.15)
    assert runs(select(texts, real, 0.15)) < 1.3
    assert 3.0 < runs(spans) < 4.6


@pytest.mark.parametrize("real_tokens", [10, 22, 100])
def test_every_place_is_as_likely(real_tokens: int) -> None:
    # floor(m r + u) of m places: the expected share is r at each; five standard deviations of a share of 20,000.
    texts = make_texts([real_tokens + 2] * 20_000)
    selected = SPAN_MASK.select(texts, VOCABULARY.real(texts.ids_T), 0.15)
    share = selected.reshape(20_000, real_tokens + 2)[:, 1:-1].mean(axis=0)
    assert np.abs(share - 0.15).max() < 5 * (0.15 * 0.85 / 20_000) ** 0.5


def test_a_span_may_go_on_at_the_start() -> None:
    # Of 10 places one or two are selected. Two are neighbours on the ring where the first span is longer than 1
    # (0.776, but for the one that the ring's end cuts), or where two touch; the last and the first place as any.
    texts = make_texts([12] * 20_000)
    selected = SPAN_MASK.select(texts, VOCABULARY.real(texts.ids_T), 0.15).reshape(20_000, 12)[:, 1:-1]
    two = selected[selected.sum(axis=1) == 2]
    neighbours = two & np.roll(two, 1, axis=1)
    assert neighbours.any(axis=1).mean() > 0.75
    at = neighbours.mean(axis=0)  # the place of the later one of the two
    assert np.abs(at - at.mean()).max() < 5 * (at.mean() / len(two)) ** 0.5


def test_a_text_is_alone_with_its_key() -> None:
    together = make_texts([10, 40, 3, 30])
    selected = SPAN_MASK.select(together, VOCABULARY.real(together.ids_T), 0.3)
    for index, start in enumerate(together.starts_E):
        length = together.lengths_E[index]
        alone = Texts(together.ids_T[start : start + length], together.lengths_E[[index]], together.keys_E[[index]])
        expected = selected[start : start + length]
        assert (SPAN_MASK.select(alone, VOCABULARY.real(alone.ids_T), 0.3) == expected).all()


def test_special_tokens_inside_a_text_are_stepped_over() -> None:
    ids = np.array([FIRST, *[10] * 20, LAST, *[11] * 20, LAST] * 50, dtype=np.int32)
    texts = Texts(ids, np.full(50, 43), np.arange(50, dtype=np.uint64))
    selected = SPAN_MASK.select(texts, VOCABULARY.real(ids), 0.5)
    assert not selected[~VOCABULARY.real(ids)].any()
    assert selected.sum() == 50 * 20
