"""T: what corrupts the input. Works on the tokens of many texts at once, end to end. (semantics section 2.4)

| transform | of the selected tokens |
|---|---|
| no-op | nothing changes |
| mask | all become the mask token |
| replace | all become ordinary tokens, drawn uniformly |
| bert-op | 80 % mask token, 10 % replaced, 10 % unchanged (Devlin et al. 2018) |
| noised-embeddings | Gaussian noise is added to their input embeddings |
| deletion | they are gone, and the rest moves together (Lewis et al. 2019) |
| span-mask | mask, but whole spans are selected (`spans`) |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from aang_ray.objectives import randomness
from aang_ray.objectives.objective import Rule
from aang_ray.objectives.texts import Bool, Float32, Float64, Int32, Int64, Texts, Vocabulary

# --- objectives.spans: Which tokens a span transform selects: spans of geometric length, as in SpanBERT.


CONTINUE, LONGEST = 0.8, 10
"""P(length = l) is proportional to 0.8^(l - 1), l = 1..10: the mean is 3.8 (Joshi et al. 2020, section 3.1)."""


def span_lengths(uniform: Float64) -> Int64:
    """Lengths by the inverse of their distribution, for numbers in [0, 1)."""
    lengths: Int64 = 1 + np.floor(np.log1p(-uniform * (1 - CONTINUE**LONGEST)) / np.log(CONTINUE)).astype(np.int64)
    return np.minimum(lengths, LONGEST)


def select_spans(texts: Texts, real_T: Bool, rate: float) -> Bool:
    """Select spans of each text's real tokens until as many tokens are selected as `select` takes.

    A text is closed to a ring and, from a random place on, cut into spans end to end. Spans are taken in random order;
    the last one taken is cut to what is left of the budget. So every place is selected with the same probability, no
    span is drawn in vain where another lies, and nothing loops; a span may go on at the text's start.
    """
    real = np.flatnonzero(real_T)
    text_R = texts.text_T[real]
    counts_E = np.bincount(text_R, minlength=len(texts.lengths_E))
    first_R = np.repeat(np.cumsum(counts_E) - counts_E, counts_E)
    # A text of m real tokens has m lengths, of which each is at least 1: they cover it.
    lengths_R = span_lengths(texts.uniform_T(randomness.SPAN_LENGTH)[real])
    ends_R = np.cumsum(lengths_R)
    ends_R = ends_R - (ends_R[first_R] - lengths_R[first_R])
    place_R = np.arange(len(real)) - first_R
    turn_E = np.floor(texts.uniform_E(randomness.SPAN_TURN) * counts_E).astype(np.int64)
    turned_R = (place_R + turn_E[text_R]) % counts_E[text_R]
    # One search for all texts: each gets an interval of its own, wider than any end.
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
class Corrupted:
    """What T made of texts, token by token of the original. Suffix: T original tokens."""

    ids_T: Int32
    """What stands in each token's place."""
    kept_T: Bool | None = None
    """Tokens that are still there; None: all of them. Special tokens always are."""
    noised_T: Bool | None = None
    """Tokens whose embeddings get noise; None: none."""


def select(texts: Texts, real_T: Bool, rate: float) -> Bool:
    """Select about `rate` of each text's m real tokens, uniformly: floor(rate * m + u), u in [0, 1), at least one.

    The expected count is rate * m wherever that exceeds one (semantics section 2.4).
    """
    wanted_E = texts.budget(real_T, rate)
    draw_T = np.where(real_T, texts.uniform_T(randomness.SELECT), 2.0)
    rank_T = np.empty(len(real_T), dtype=np.int64)
    rank_T[np.lexsort((draw_T, texts.text_T))] = texts.positions_T
    selected: Bool = rank_T < wanted_E[texts.text_T]
    return selected


@dataclass(frozen=True)
class Transform:
    """A primitive of the stage T.

    Randomness comes from `texts.uniform_T` alone: so it is a function of (seed, step, objective, example).
    """

    stage: ClassVar[str] = "transform"

    name: str
    corrupt: Callable[[Texts, Bool, Vocabulary], Corrupted]
    """Of the texts, which tokens are selected [T], and the vocabulary."""
    select: Callable[[Texts, Bool, float], Bool] = select
    """Which tokens are selected, [T], of the texts, which tokens are real [T], and the rate."""
    rules: tuple[Rule, ...] = ()


def replacements(texts: Texts, vocabulary: Vocabulary) -> Int32:
    """An ordinary token for every place, drawn uniformly, [T]."""
    ordinary = vocabulary.ordinary_ids
    drawn_T: Int32 = ordinary[(texts.uniform_T(randomness.REPLACEMENT) * len(ordinary)).astype(np.int64)]
    return drawn_T


def _no_op(texts: Texts, selected_T: Bool, vocabulary: Vocabulary) -> Corrupted:
    return Corrupted(texts.ids_T)


def _mask(texts: Texts, selected_T: Bool, vocabulary: Vocabulary) -> Corrupted:
    return Corrupted(np.where(selected_T, np.int32(vocabulary.mask_id), texts.ids_T))


def _replace(texts: Texts, selected_T: Bool, vocabulary: Vocabulary) -> Corrupted:
    return Corrupted(np.where(selected_T, replacements(texts, vocabulary), texts.ids_T))


def _bert_op(texts: Texts, selected_T: Bool, vocabulary: Vocabulary) -> Corrupted:
    operation_T = texts.uniform_T(randomness.OPERATION)
    masked = _mask(texts, selected_T & (operation_T < 0.8), vocabulary)
    replaced_T = selected_T & (operation_T >= 0.8) & (operation_T < 0.9)
    return Corrupted(np.where(replaced_T, replacements(texts, vocabulary), masked.ids_T))


def _noised(texts: Texts, selected_T: Bool, vocabulary: Vocabulary) -> Corrupted:
    return Corrupted(texts.ids_T, noised_T=selected_T)


def _deletion(texts: Texts, selected_T: Bool, vocabulary: Vocabulary) -> Corrupted:
    return Corrupted(texts.ids_T, kept_T=~selected_T)


TRANSFORMS = (
    Transform("no-op", _no_op),
    Transform("mask", _mask),
    Transform("replace", _replace),
    Transform("bert-op", _bert_op),
    Transform("noised-embeddings", _noised),
    Transform("deletion", _deletion),
    Transform("span-mask", _mask, select=select_spans),
)


def remaining(texts: Texts, corrupted: Corrupted) -> Texts:
    """The corrupted texts without what was deleted."""
    if corrupted.kept_T is None:
        return replace(texts, ids_T=corrupted.ids_T)
    lengths_E = np.bincount(texts.text_T[corrupted.kept_T], minlength=len(texts.lengths_E))
    return Texts(corrupted.ids_T[corrupted.kept_T], lengths_E, texts.keys_E)


# --- objectives.noise: The Gaussian noise of noised embeddings, drawn on the host: the same on every device.


@dataclass(frozen=True)
class Noise:
    """What is added to the input embedding of a token."""

    width: int
    """Of the embeddings."""
    deviation: float
    """Standard deviation of every component."""

    def draw(self, texts: Texts, noised_T: Bool) -> Float32:
        """Independent normal numbers for every noised token, [number of noised tokens, width]: from each text's key."""
        counts_E = np.bincount(texts.text_T[noised_T], minlength=len(texts.lengths_E))
        drawn = [
            randomness.generator(int(key.view(np.int64)), randomness.NOISE).standard_normal(
                (count, self.width), dtype=np.float32
            )
            for key, count in zip(texts.keys_E, counts_E, strict=True)
            if count
        ]
        everything = np.concatenate(drawn) if drawn else np.zeros((0, self.width), dtype=np.float32)
        return everything * np.float32(self.deviation)
