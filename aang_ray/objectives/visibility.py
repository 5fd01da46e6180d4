"""R: who sees whom, as ranks.

Row i sees key j iff key_rank(j) <= rank(i), or i = j, for every row, labelled or not, in every layer
(semantics section 2.5). Ranks order the tokens of a text, and an order is transitive: what a row may
not see, it cannot learn through a third row in a later layer either.

| representation | token outputs | label of the text |
|---|---|---|
| bidirectional | all 0 | all 0 |
| left-to-right | position; first token lowest | illegal |
| right-to-left | reversed position; first token lowest | illegal |
| random-factorized | random order; first token lowest | random order; first token highest if it is pooled |

The lowest first token is seen by every row and itself sees only itself: a first token that saw the
text and was seen by all would carry each label through layer 2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from aang_ray.objectives import randomness
from aang_ray.objectives.contracts import check_order
from aang_ray.objectives.objective import Rule
from aang_ray.objectives.texts import Int32, Texts

LOWEST = 0
HIGHEST = np.iinfo(np.int32).max
"""As a key rank: nobody but the token itself sees it. As a rank: sees everything that anybody may see."""


@dataclass(frozen=True)
class Representation:
    """A primitive of the stage R."""

    stage: ClassVar[str] = "representation"

    name: str
    order: Callable[[Texts], Int32] | None
    """Rank of every token among its text's, from 1, [T]: a token sees what has its rank or a lower one.
    None: all see all."""
    rules: tuple[Rule, ...] = ()


def _left_to_right(texts: Texts) -> Int32:
    return (texts.positions_T + 1).astype(np.int32)


def _right_to_left(texts: Texts) -> Int32:
    return (np.repeat(texts.lengths_E, texts.lengths_E) - texts.positions_T).astype(np.int32)


def _random_order(texts: Texts) -> Int32:
    """A uniformly random order of each text's tokens."""
    order = np.empty(len(texts.ids_T), dtype=np.int64)
    order[np.lexsort((texts.uniform_T(randomness.ORDER), texts.text_T))] = texts.positions_T
    return (order + 1).astype(np.int32)


REPRESENTATIONS = (
    Representation("bidirectional", None),
    Representation("left-to-right", _left_to_right),
    Representation("right-to-left", _right_to_left),
    Representation("random-factorized", _random_order),
)


def ranks(representation: Representation, texts: Texts, first_token: int | None) -> Int32:
    """Rank of every token, even numbers so that a query fits below any token.

    `first_token`: the rank of each text's first token, or None to leave it in the order.

    Raises:
        UserError: for an order that is none.
    """
    if representation.order is None:
        return np.zeros(len(texts.ids_T), dtype=np.int32)
    order_T = np.asarray(representation.order(texts))
    check_order(representation.name, order_T, len(texts.ids_T), HIGHEST // 2)
    result = order_T.astype(np.int32) * 2
    if first_token is not None:
        result[texts.starts_E] = first_token
    return result


def published_matrix(
    representation: str, width: int, seed: int, step: int
) -> np.ndarray[tuple[int, int], np.dtype[np.bool_]]:
    """Who sees whom in the released code, one [width, width] matrix for a whole segment.

    Bidirectional sees padding, too; random-factorized is one Bernoulli(0.6) matrix without its
    diagonal; the causal ones are triangular with it.
    """
    match representation:
        case "bidirectional":
            return np.ones((width, width), dtype=np.bool_)
        case "left-to-right":
            return np.tri(width, dtype=np.bool_)
        case "right-to-left":
            return np.tri(width, dtype=np.bool_).T
        case "random-factorized":
            matrix = randomness.generator(seed, step, randomness.PUBLISHED).random((width, width)) < 0.6
            np.fill_diagonal(matrix, False)
            return matrix
        case _:
            raise ValueError(f"the released code has no representation {representation!r}")
