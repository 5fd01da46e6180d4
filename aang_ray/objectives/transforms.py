"""T: what corrupts the input. Works on the tokens of many texts at once, end to end."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from aang_ray.objectives import randomness

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Texts:
    """Texts end to end. Suffixes: T tokens, E texts."""

    ids_T: Int32
    lengths_E: Int64
    keys_E: randomness.U64
    """A key of randomness for each text: a function of (seed, step, objective, example)."""

    @property
    def text_T(self) -> Int64:
        """Index of each token's text."""
        return np.repeat(np.arange(len(self.lengths_E)), self.lengths_E)

    @property
    def starts_E(self) -> Int64:
        return np.cumsum(self.lengths_E) - self.lengths_E

    @property
    def positions_T(self) -> Int64:
        """Position of each token in its text, from 0."""
        return np.arange(len(self.ids_T)) - np.repeat(self.starts_E, self.lengths_E)

    def uniform_T(self, purpose: int) -> npt.NDArray[np.float64]:
        """One number in [0, 1) for each token."""
        return randomness.uniform(self.keys_E[self.text_T].view(np.int64), purpose, self.positions_T)

    def uniform_E(self, purpose: int) -> npt.NDArray[np.float64]:
        """One number in [0, 1) for each text."""
        return randomness.uniform(self.keys_E.view(np.int64), purpose, -1)


@dataclass(frozen=True)
class Vocabulary:
    """What the transforms and labels need to know of the tokenizer."""

    size: int
    mask_id: int
    special_ids: tuple[int, ...]

    @cached_property
    def _ordinary(self) -> Bool:
        ordinary = np.ones(self.size, dtype=np.bool_)
        ordinary[list(self.special_ids)] = False
        return ordinary

    @cached_property
    def ordinary_ids(self) -> Int32:
        """Every id that is not special: what replacements are drawn from."""
        return np.flatnonzero(self._ordinary).astype(np.int32)

    def real(self, ids_T: Int32) -> Bool:
        """Tokens that are text: only they are selected, and only they are labels."""
        real: Bool = self._ordinary[ids_T]
        return real


def select(texts: Texts, real_T: Bool, rate: float) -> Bool:
    """Select about `rate` of each text's m real tokens, uniformly: floor(rate * m + u), u in [0, 1), at least one.

    The expected count is rate * m wherever that exceeds one (semantics section 2.4).
    """
    text_T = texts.text_T
    real_E = np.bincount(text_T, weights=real_T, minlength=len(texts.lengths_E))
    wanted_E = np.floor(rate * real_E + texts.uniform_E(randomness.COUNT))
    wanted_E = np.minimum(np.maximum(wanted_E, 1), real_E)
    draw_T = np.where(real_T, texts.uniform_T(randomness.SELECT), 2.0)
    rank_T = np.empty(len(text_T), dtype=np.int64)
    rank_T[np.lexsort((draw_T, text_T))] = texts.positions_T
    selected: Bool = rank_T < wanted_E[text_T]
    return selected


def corrupt(name: str, texts: Texts, selected_T: Bool, vocabulary: Vocabulary) -> Int32:
    """The ids that the encoder reads.

    mask: all selected become the mask token. replace: all selected become ordinary tokens, uniformly.
    bert-op: 80 % mask, 10 % replaced, 10 % unchanged (Devlin et al. 2018). no-op: unchanged.
    """
    if name == "no-op":
        return texts.ids_T
    ordinary = vocabulary.ordinary_ids
    draw_T = texts.uniform_T(randomness.REPLACEMENT)
    replacement_T = ordinary[(draw_T * len(ordinary)).astype(np.int64)]
    if name == "mask":
        masked_T, replaced_T = selected_T, np.zeros_like(selected_T)
    elif name == "replace":
        masked_T, replaced_T = np.zeros_like(selected_T), selected_T
    elif name == "bert-op":
        operation_T = texts.uniform_T(randomness.OPERATION)
        masked_T = selected_T & (operation_T < 0.8)
        replaced_T = selected_T & (operation_T >= 0.8) & (operation_T < 0.9)
    else:
        raise ValueError(f"no transform {name!r}")
    corrupted_T: Int32 = np.where(masked_T, np.int32(vocabulary.mask_id), texts.ids_T).astype(np.int32)
    return np.where(replaced_T, replacement_T, corrupted_T).astype(np.int32)
