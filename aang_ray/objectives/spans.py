"""Which tokens a span transform selects: spans of geometric length, as in SpanBERT."""

from __future__ import annotations

import numpy as np

from aang_ray.objectives import randomness
from aang_ray.objectives.texts import Bool, Float64, Int64, Texts

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
