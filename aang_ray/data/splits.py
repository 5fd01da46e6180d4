"""Seeded splits of one labelled file, nested subsets of train, and duplicates within and across splits.

Nothing here depends on the order of a file: places in a split come from the texts, the labels and the seed.
"""

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
    """Split one labelled file into train, dev and test.

    Examples with equal keys form a group, and the class of a group is its most frequent label. Within each class the
    groups are sorted by SHA-256(seed, key). The first share becomes test, the next dev, the rest train. A class of
    one or two groups goes to train alone.

    Args:
        keys: The normalised text of each example.
        labels: The label of each example.
        dev_fraction: Share of each class that becomes dev.
        test_fraction: Share of each class that becomes test.
        seed: Decides the split.

    Returns:
        Ascending indices of train, dev and test.

    Raises:
        UserError: if dev or test would be empty, or the two shares leave nothing for train.
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
    for class_keys in by_class.values():
        class_keys.sort(key=lambda key: text_rank(key, seed))
        n_test = _share(len(class_keys), test_fraction, keep=2)
        n_dev = _share(len(class_keys), dev_fraction, keep=1 + n_test)
        for order, key in enumerate(class_keys):
            part = 2 if order < n_test else 1 if order < n_test + n_dev else 0
            parts[part].extend(groups[key])
    train, dev, test = (np.array(sorted(part), dtype=np.int64) for part in parts)
    if not len(dev) or not len(test):
        raise UserError(f"{len(groups)} different texts are too few to make train, dev and test of one file")
    return train, dev, test


def _share(groups: int, fraction: float, keep: int) -> int:
    """Return how many of a class's groups go to dev or test: at least one, and `keep` are left for the other splits."""
    return min(max(1, round(groups * fraction)), groups - keep) if groups >= 3 else 0


def text_rank(key: str, seed: int | str) -> bytes:
    """Return a sort key that looks random and depends only on the text and the seed."""
    return hashlib.sha256(f"{seed}\x1f{key}".encode()).digest()


def nested_subset(labels: npt.NDArray[np.int64], size: int, seed: int, setting: str = "data.train_size") -> Indices:
    """Choose ascending indices, [size], of a stratified subset of train, given the class of each example.

    The subset of a smaller size is part of that of a larger size. Each class is shuffled. Its j-th example (from 0) of
    N_c gets the position (j + 1/2) / N_c, and the first example of every class comes before all others. The subset is
    the first `size` examples in that order, so that it holds every class in proportion to within about one example.
    `setting` is the setting that states the size, for error messages.

    Raises:
        UserError: if `size` exceeds the train split or is below the number of classes.
    """
    classes, counts = np.unique(labels, return_counts=True)
    if not len(classes) <= size <= len(labels):
        has = f"the train split has {len(labels)} examples of {len(classes)} classes"
        raise UserError(f"{setting}: {size} is not possible, {has}")
    positions = np.empty(len(labels))
    for label, count in zip(classes, counts, strict=True):
        order = np.random.default_rng([seed, int(label)]).permutation(np.flatnonzero(labels == label))
        positions[order] = (np.arange(count) + 0.5) / count
        positions[order[0]] = -1
    chosen = np.lexsort((labels, positions))[:size]
    return np.sort(chosen).astype(np.int64)


def normalised(text: str) -> str:
    """Return the form in which texts are compared: Unicode NFKC, lower case, runs of white space as one space."""
    return " ".join(unicodedata.normalize("NFKC", text).lower().split())


def clean_indices(train: Collection[str], dev: Collection[str], test: Sequence[str]) -> Indices:
    """Return the indices of the test texts that are in neither train nor dev (docs/semantics.md, section 4)."""
    seen = {*train, *dev}
    return np.array([i for i, key in enumerate(test) if key not in seen], dtype=np.int64)


def count_duplicates(train: Sequence[str], dev: Sequence[str], test: Sequence[str]) -> dict[str, Any]:
    """Count repeated normalised texts within each split, and texts of one split that are also in another."""
    in_train, in_dev = set(train), set(dev)
    splits = {"train": train, "dev": dev, "test": test}
    return {
        "within": {name: len(keys) - len(set(keys)) for name, keys in splits.items()},
        "dev_in_train": sum(key in in_train for key in dev),
        "test_in_train": sum(key in in_train for key in test),
        "test_in_dev": sum(key in in_dev for key in test),
    }
