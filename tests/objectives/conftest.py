"""Small random texts for the tests of objectives."""

from __future__ import annotations

import numpy as np
import pytest

from aang_ray.objectives import randomness
from aang_ray.objectives.texts import Texts, Vocabulary

FIRST, LAST, MASK, PAD = 1, 2, 3, 0


def make_texts(lengths: list[int], seed: int = 0, vocabulary: int = 50) -> Texts:
    """Texts of random ordinary tokens between a first and a last token."""
    rng = np.random.default_rng(seed)
    parts = [np.concatenate(([FIRST], rng.integers(4, vocabulary, size=n - 2), [LAST])) for n in lengths]
    keys = randomness.keys(seed, np.arange(len(lengths)))
    return Texts(np.concatenate(parts).astype(np.int32), np.asarray(lengths), keys)


@pytest.fixture
def vocabulary() -> Vocabulary:
    return Vocabulary(50, MASK, (PAD, FIRST, LAST, MASK))
