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
from aang_ray.objectives.legality import Rule
from aang_ray.objectives.spans import select_spans
from aang_ray.objectives.texts import Bool, Int32, Texts, Vocabulary


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
