"""Splits that a seed determines: of one labelled file, and the nested subsets of train."""

from __future__ import annotations

import hashlib
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from aang_ray.errors import UserError

Indices = npt.NDArray[np.int64]

SPLIT_METHOD = "stratified by label, equal texts kept together, ordered by SHA-256(seed, text)"


def split_one(
    keys: Sequence[str], labels: Sequence[str], dev_fraction: float, test_fraction: float, seed: int
) -> tuple[Indices, Indices, Indices]:
    """Train, dev and test indices of one labelled file.

    Examples with equal keys form a group, whose class is its most frequent label. Within each class
    the groups are ordered by SHA-256(seed, key), so that the split depends on the texts and not on
    their order in the file; the first share becomes test, the next dev, the rest train. A class of
    one or two groups is in train alone.

    Raises:
        UserError: where dev or test would be empty.
    """
    if dev_fraction + test_fraction >= 1:
        raise UserError(f"data.dev_fraction + data.test_fraction must be below 1, got {dev_fraction + test_fraction:g}")
    groups: dict[str, list[int]] = defaultdict(list)
    for index, key in enumerate(keys):
        groups[key].append(index)
    by_class: dict[str, list[str]] = defaultdict(list)
    for key, members in groups.items():
        counts = Counter(labels[i] for i in members)
        by_class[min(counts, key=lambda label: (-counts[label], label))].append(key)

    parts: tuple[list[int], list[int], list[int]] = ([], [], [])
    for names in by_class.values():
        names.sort(key=lambda key: text_rank(key, seed))
        n_test = _share(len(names), test_fraction, keep=2)
        n_dev = _share(len(names), dev_fraction, keep=1 + n_test)
        for order, key in enumerate(names):
            part = 2 if order < n_test else 1 if order < n_test + n_dev else 0
            parts[part].extend(groups[key])
    train, dev, test = (np.array(sorted(part), dtype=np.int64) for part in parts)
    if not len(dev) or not len(test):
        raise UserError(f"{len(groups)} different texts are too few to make train, dev and test of one file")
    return train, dev, test


def nested_subset(labels: npt.NDArray[np.int64], size: int, seed: int) -> Indices:
    """Indices of a stratified subset of train; a smaller size's subset is part of a larger one's.

    Each class is shuffled; its j-th example (from 0) of N_c takes place (j + 1/2) / N_c, but the
    first of every class goes before all others. The subset is the first `size` in that order, so
    that it holds every class, and each in proportion to within about one example.

    Raises:
        UserError: for a size above the train split or below the number of classes.
    """
    classes, counts = np.unique(labels, return_counts=True)
    if not len(classes) <= size <= len(labels):
        raise UserError(
            f"data.train_size: {size} is not possible, "
            f"the train split has {len(labels)} examples of {len(classes)} classes"
        )
    places = np.empty(len(labels))
    for label, count in zip(classes, counts, strict=True):
        order = np.random.default_rng([seed, int(label)]).permutation(np.flatnonzero(labels == label))
        places[order] = (np.arange(count) + 0.5) / count
        places[order[0]] = -1
    chosen = np.lexsort((labels, places))[:size]
    return np.sort(chosen).astype(np.int64)


def text_rank(key: str, seed: int | str) -> bytes:
    """A place among texts that looks random and depends on the text and the seed alone."""
    return hashlib.sha256(f"{seed}\x1f{key}".encode()).digest()


def _share(groups: int, fraction: float, keep: int) -> int:
    """Groups of a class that go to dev or test: rounded, at least one, and `keep` left for the others."""
    return min(max(1, round(groups * fraction)), groups - keep) if groups >= 3 else 0


# --- data.duplicates: Texts that say the same: within a split, across splits, and the test view without them.


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
