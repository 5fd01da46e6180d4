"""Stage T: how the input is corrupted. (docs/semantics.md, section 2.4)

A transform is a function on many texts at once; `select` chooses tokens, `corrupt` changes them. docs/taxonomy.md lists
all transforms with their sources, and says how to add one.

Shape suffixes: T tokens before the transform, E texts, R real tokens, W width of the embeddings.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from aang_ray.objectives import randomness
from aang_ray.objectives.objective import Rule
from aang_ray.objectives.texts import Bool, Float32, Float64, Int32, Int64, Texts, Vocabulary


@dataclass(frozen=True)
class Corrupted:
    """What a transform returns, token by token of the original texts."""

    ids_T: Int32
    """The token that now stands in each place."""
    kept_T: Bool | None = None
    """Tokens that are still there; None: all. Special tokens must stay."""
    noised_T: Bool | None = None
    """Tokens whose input embeddings get noise; None: none."""


def select(texts: Texts, real_T: Bool, rate: float) -> Bool:
    """Select about `rate` of each text's m real tokens, uniformly: floor(rate * m + u) of them (`Texts.budget`).

    Args:
        texts: the texts.
        real_T: which tokens may be selected.
        rate: the share to select, `objectives.mask_rate`.

    Returns:
        Which tokens are selected, [T].
    """
    wanted_E = texts.budget(real_T, rate)
    draw_T = np.where(real_T, texts.uniform_T(randomness.SELECT), 2.0)  # special tokens come last
    rank_T = np.empty(len(real_T), dtype=np.int64)
    rank_T[np.lexsort((draw_T, texts.text_T))] = texts.positions_T
    return rank_T < wanted_E[texts.text_T]


CONTINUE, LONGEST = 0.8, 10
"""P(length = l) is proportional to 0.8^(l - 1), l = 1..10; the mean is 3.8 (Joshi et al. 2020, section 3.1)."""


def span_lengths(uniform: Float64) -> Int64:
    """Invert the distribution function of span lengths, for each number in [0, 1)."""
    lengths: Int64 = 1 + np.floor(np.log1p(-uniform * (1 - CONTINUE**LONGEST)) / np.log(CONTINUE)).astype(np.int64)
    return np.minimum(lengths, LONGEST)


def select_spans(texts: Texts, real_T: Bool, rate: float) -> Bool:
    """Select spans of each text's real tokens, as many tokens as `select` would, with the same arguments.

    Each text is closed to a ring, which is cut into spans end to end from a random place on. Spans are taken in random
    order, and the last one is cut to what is left of the budget. So every place is selected with the same probability
    and nothing has to be drawn again because spans overlap; a span may wrap around from the end of a text to its start.
    """
    real = np.flatnonzero(real_T)
    text_R = texts.text_T[real]
    counts_E = np.bincount(text_R, minlength=len(texts.lengths_E))
    first_R = np.repeat(np.cumsum(counts_E) - counts_E, counts_E)
    # A text of m real tokens gets m lengths. Each is at least 1, so they cover the text.
    lengths_R = span_lengths(texts.uniform_T(randomness.SPAN_LENGTH)[real])
    ends_R = np.cumsum(lengths_R)
    ends_R = ends_R - (ends_R[first_R] - lengths_R[first_R])
    place_R = np.arange(len(real)) - first_R
    turn_E = np.floor(texts.uniform_E(randomness.SPAN_TURN) * counts_E).astype(np.int64)
    turned_R = (place_R + turn_E[text_R]) % counts_E[text_R]
    # One search serves all texts: each gets an interval of its own, wider than any end.
    stride = int(counts_E.max(initial=0)) * LONGEST + 1
    span_R = np.searchsorted(ends_R + text_R * stride, turned_R + text_R * stride, side="right")
    draw_R = texts.uniform_T(randomness.SELECT)[real][span_R]
    order = np.lexsort((turned_R, draw_R, text_R))
    rank_R = np.empty(len(real), dtype=np.int64)
    rank_R[order] = place_R
    selected_T = np.zeros(len(real_T), dtype=np.bool_)
    selected_T[real] = rank_R < texts.budget(real_T, rate)[text_R]
    return selected_T


@dataclass(frozen=True)
class Transform:
    """A primitive of stage T. Its functions draw random numbers from `texts.uniform_T` and `texts.uniform_E` alone."""

    stage: ClassVar[str] = "transform"

    name: str
    corrupt: Callable[[Texts, Bool, Vocabulary], Corrupted]
    """(texts, selected_T, vocabulary) -> the corrupted texts."""
    select: Callable[[Texts, Bool, float], Bool] = select
    """(texts, real_T, rate) -> which tokens are selected, [T]."""
    rules: tuple[Rule, ...] = ()


def _mask(texts: Texts, selected_T: Bool, vocabulary: Vocabulary) -> Corrupted:
    return Corrupted(np.where(selected_T, np.int32(vocabulary.mask_id), texts.ids_T))


def _ordinary_tokens(texts: Texts, vocabulary: Vocabulary) -> Int32:
    ordinary = vocabulary.ordinary_ids
    return ordinary[(texts.uniform_T(randomness.REPLACEMENT) * len(ordinary)).astype(np.int64)]


def _replace(texts: Texts, selected_T: Bool, vocabulary: Vocabulary) -> Corrupted:
    return Corrupted(np.where(selected_T, _ordinary_tokens(texts, vocabulary), texts.ids_T))


def _bert_op(texts: Texts, selected_T: Bool, vocabulary: Vocabulary) -> Corrupted:
    operation_T = texts.uniform_T(randomness.OPERATION)
    masked = _mask(texts, selected_T & (operation_T < 0.8), vocabulary)
    replaced_T = selected_T & (operation_T >= 0.8) & (operation_T < 0.9)
    return Corrupted(np.where(replaced_T, _ordinary_tokens(texts, vocabulary), masked.ids_T))


TRANSFORMS = (
    Transform("no-op", lambda texts, selected_T, _: Corrupted(texts.ids_T)),
    Transform("mask", _mask),
    Transform("replace", _replace),
    Transform("bert-op", _bert_op),
    Transform("noised-embeddings", lambda texts, selected_T, _: Corrupted(texts.ids_T, noised_T=selected_T)),
    Transform("deletion", lambda texts, selected_T, _: Corrupted(texts.ids_T, kept_T=~selected_T)),
    Transform("span-mask", _mask, select=select_spans),
)


def remaining(texts: Texts, corrupted: Corrupted) -> Texts:
    """Return the corrupted texts as the encoder reads them: without the deleted tokens."""
    if corrupted.kept_T is None:
        return replace(texts, ids_T=corrupted.ids_T)
    lengths_E = np.bincount(texts.text_T[corrupted.kept_T], minlength=len(texts.lengths_E))
    types_T = None if texts.types_T is None else texts.types_T[corrupted.kept_T]
    return Texts(corrupted.ids_T[corrupted.kept_T], lengths_E, texts.keys_E, types_T=types_T)


@dataclass(frozen=True)
class Noise:
    """Gaussian noise for input embeddings of a width, drawn on the host so that it is the same on every device."""

    width: int
    deviation: float

    def draw(self, texts: Texts, noised_T: Bool) -> Float32:
        """Draw independent normal numbers, [noised tokens, W], from the random key of each text."""
        counts_E = np.bincount(texts.text_T[noised_T], minlength=len(texts.lengths_E))
        drawn = [np.zeros((0, self.width), dtype=np.float32)]
        for text in np.flatnonzero(counts_E):
            generator = randomness.generator(int(texts.keys_E[text].view(np.int64)), randomness.NOISE)
            drawn.append(generator.standard_normal((counts_E[text], self.width), dtype=np.float32))
        return np.concatenate(drawn) * np.float32(self.deviation)
