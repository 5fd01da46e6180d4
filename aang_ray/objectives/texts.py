"""What primitives work on: tokens of many texts in one array, and their vocabulary. Suffixes: T tokens, E texts."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from aang_ray.objectives import randomness

Int8 = npt.NDArray[np.int8]
Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Bool = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Texts:
    """E texts, concatenated."""

    ids_T: Int32
    lengths_E: Int64
    """Tokens in each text, special tokens included."""
    keys_E: randomness.U64
    """The random key of each text: a function of (seed, step, objective, example)."""
    capitals_T: Bool | None = None
    """Whether the token begins with an upper-case letter in the raw text; None if unknown."""
    types_T: Int8 | None = None
    """Token type of each token of text pairs; None: all are 0."""

    @cached_property
    def text_T(self) -> Int64:
        """Return the index of each token's text."""
        return np.repeat(np.arange(len(self.lengths_E)), self.lengths_E)

    @cached_property
    def starts_E(self) -> Int64:
        """Return the index of each text's first token."""
        return np.cumsum(self.lengths_E) - self.lengths_E

    @cached_property
    def positions_T(self) -> Int64:
        """Return the position of each token in its text, from 0."""
        return np.arange(len(self.ids_T)) - np.repeat(self.starts_E, self.lengths_E)

    def uniform_T(self, purpose: int) -> Float64:
        """Return a uniform number in [0, 1) for each token; `purpose` tells draws apart, yours use 1000 and up."""
        return randomness.uniform(self.keys_E[self.text_T].view(np.int64), purpose, self.positions_T)

    def uniform_E(self, purpose: int) -> Float64:
        """Return a uniform number in [0, 1) for each text."""
        return randomness.uniform(self.keys_E.view(np.int64), purpose, -1)

    def budget(self, real_T: Bool, rate: float) -> Int64:
        """Return how many of each text's m real tokens to select: floor(rate * m + u), u uniform in [0, 1).

        It is at least one, or 0 for a text of special tokens alone.
        """
        real_E = np.bincount(self.text_T, weights=real_T, minlength=len(self.lengths_E))
        wanted_E = np.floor(rate * real_E + self.uniform_E(randomness.COUNT))
        return np.minimum(np.maximum(wanted_E, 1), real_E).astype(np.int64)


@dataclass(frozen=True)
class Vocabulary:
    """The token ids of a tokenizer."""

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
        """Return all ids that are not special. Replacements are drawn from them."""
        return np.flatnonzero(self._ordinary).astype(np.int32)

    def real(self, ids_T: Int32) -> Bool:
        """Return whether each token is not special. Only real tokens are selected, and only they are labels."""
        real: Bool = self._ordinary[ids_T]
        return real
