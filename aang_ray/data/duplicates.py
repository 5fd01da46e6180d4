"""Texts that say the same: within a split, across splits, and the test view without them."""

from __future__ import annotations

import unicodedata
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt


def normalised(text: str) -> str:
    """What texts are compared by: Unicode NFKC, lower case, runs of white space as one space."""
    return " ".join(unicodedata.normalize("NFKC", text).lower().split())


def surplus(keys: Sequence[str]) -> int:
    """Texts that stand in the list once more than needed: N - |set|."""
    return len(keys) - len(set(keys))


def clean_indices(train: Collection[str], dev: Collection[str], test: Sequence[str]) -> npt.NDArray[np.int64]:
    """Indices of the test texts that occur neither in train nor in dev (semantics section 4, leaks)."""
    seen = {*train, *dev}
    return np.array([i for i, key in enumerate(test) if key not in seen], dtype=np.int64)


def count_duplicates(train: Sequence[str], dev: Sequence[str], test: Sequence[str]) -> dict[str, Any]:
    """Duplicates within each split, and texts of one split that also stand in another, as JSON values."""
    in_train, in_dev = set(train), set(dev)
    return {
        "within": {"train": surplus(train), "dev": surplus(dev), "test": surplus(test)},
        "dev_in_train": sum(key in in_train for key in dev),
        "test_in_train": sum(key in in_train for key in test),
        "test_in_dev": sum(key in in_dev for key in test),
    }
