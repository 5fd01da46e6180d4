"""Stage R: which tokens a token may attend to, expressed as ranks. (docs/semantics.md, section 2.5)

Row i sees key j iff key_rank(j) <= rank(i) or i = j, for every row, labelled or not, in every layer. An order is
transitive: what a row may not see does not reach it through a third row in a later layer either. For outputs at tokens
the first token ranks lowest: if it saw the text and was seen by all, it would carry each label to its row through layer
2. docs/taxonomy.md lists all representations, and says how to add one.

Shape suffixes: T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from aang_ray.objectives import randomness
from aang_ray.objectives.objective import Rule
from aang_ray.objectives.texts import Bool, Int32, Texts

LOWEST = 0
HIGHEST = np.iinfo(np.int32).max
"""As a key rank: no other token sees it. As a rank: it sees every token that any token may see."""

PUBLISHED = frozenset({"bidirectional", "left-to-right", "right-to-left", "random-factorized"})
"""Representations that `objectives.visibility: published` defines."""


@dataclass(frozen=True)
class Representation:
    """A primitive of stage R."""

    stage: ClassVar[str] = "representation"

    name: str
    order: Callable[[Texts], Int32] | None
    """texts -> the rank of every token in its text, from 1, [T]; None: every token sees all of its text."""
    rules: tuple[Rule, ...] = ()


def _right_to_left(texts: Texts) -> Int32:
    return (np.repeat(texts.lengths_E, texts.lengths_E) - texts.positions_T).astype(np.int32)


def _random_order(texts: Texts) -> Int32:
    order = np.empty(len(texts.ids_T), dtype=np.int64)
    order[np.lexsort((texts.uniform_T(randomness.ORDER), texts.text_T))] = texts.positions_T
    return (order + 1).astype(np.int32)


REPRESENTATIONS = (
    Representation("bidirectional", None),
    Representation("left-to-right", lambda texts: (texts.positions_T + 1).astype(np.int32)),
    Representation("right-to-left", _right_to_left),
    Representation("random-factorized", _random_order),
)


def published_matrix(representation: str, width: int, seed: int, step: int) -> Bool:
    """Return the visibility of the released code: one matrix [L, L] for all texts of a segment, rows are queries.

    Args:
        representation: one of `PUBLISHED`.
        width: L, tokens in a row, padding included.
        seed: of the run.
        step: optimiser step.
    """
    match representation:
        case "bidirectional":
            return np.ones((width, width), dtype=np.bool_)
        case "left-to-right":
            return np.tri(width, dtype=np.bool_)
        case "right-to-left":
            return np.tri(width, dtype=np.bool_).T
        case "random-factorized":
            matrix: Bool = randomness.generator(seed, step, randomness.PUBLISHED).random((width, width)) < 0.6
            np.fill_diagonal(matrix, False)
            return matrix
        case _:
            raise ValueError(f"the released code has no representation {representation!r}")
