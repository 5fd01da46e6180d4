"""Splits of one file, nested subsets of train, and duplicates; those of two public data sets are known."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aang_ray.config import DataConfig
from aang_ray.data.read import SPLITS, check_labels
from aang_ray.data.sources import find_source, read_task
from aang_ray.data.splits import clean_indices, count_duplicates, nested_subset, normalised, split_one
from aang_ray.errors import UserError

labelled = st.lists(st.tuples(st.integers(0, 60), st.sampled_from("abc")), min_size=60, max_size=200)


@given(labelled, st.integers(0, 5))
def test_the_split_is_a_partition_that_keeps_equal_texts_together(rows: list[tuple[int, str]], seed: int) -> None:
    # Enough texts of one class for all three parts.
    rows = [*rows, *((100 + i, "a") for i in range(3))]
    keys, labels = [str(key) for key, _ in rows], [label for _, label in rows]
    parts = split_one(keys, labels, 0.2, 0.3, seed)
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(rows)))
    sides = [{keys[i] for i in part} for part in parts]
    assert not sides[0] & sides[1]
    assert not sides[0] & sides[2]
    assert not sides[1] & sides[2]


@given(st.permutations(range(90)))
def test_the_split_depends_on_texts_and_not_on_their_order(order: list[int]) -> None:
    keys, labels = [f"text {i}" for i in range(90)], ["ab"[i % 3 == 0] for i in range(90)]
    straight = [{keys[i] for i in part} for part in split_one(keys, labels, 0.2, 0.2, 1)]
    moved_keys = [keys[i] for i in order]
    moved = split_one(moved_keys, [labels[i] for i in order], 0.2, 0.2, 1)
    assert [{moved_keys[i] for i in part} for part in moved] == straight


def test_shares_hold_within_each_class() -> None:
    keys, labels = [f"text {i}" for i in range(1000)], ["rare" if i % 10 == 0 else "common" for i in range(1000)]
    train, dev, test = split_one(keys, labels, 0.15, 0.25, 0)
    # 100 rare texts and 900 common ones: 15 and 135 to dev, 25 and 225 to test.
    assert Counter(labels[i] for i in dev) == {"rare": 15, "common": 135}
    assert Counter(labels[i] for i in test) == {"rare": 25, "common": 225}
    assert len(train) == 600
    assert split_one(keys, labels, 0.15, 0.25, 1)[2].tolist() != test.tolist()


def test_every_class_is_in_train_however_large_the_other_shares() -> None:
    keys, labels = [str(i) for i in range(26)], ["a"] * 20 + ["b"] * 3 + ["c"] * 2 + ["d"]
    for dev_fraction, test_fraction in ((0.49, 0.5), (0.01, 0.98), (0.98, 0.01)):
        train, dev, test = split_one(keys, labels, dev_fraction, test_fraction, 0)
        assert {labels[i] for i in train} == set("abcd")
        assert {labels[i] for i in dev} == {labels[i] for i in test} == {"a", "b"}


def test_impossible_splits() -> None:
    with pytest.raises(UserError, match=r"below 1, got 1\.2"):
        split_one(["a"], ["x"], 0.6, 0.6, 0)
    with pytest.raises(UserError, match="1 different texts are too few"):
        split_one(["a", "a", "a", "a"], ["x", "x", "x", "y"], 0.2, 0.2, 0)


@given(st.lists(st.integers(0, 4), min_size=8, max_size=300), st.integers(0, 3), st.data())
def test_subsets_are_nested_and_stratified(values: list[int], seed: int, data: st.DataObject) -> None:
    labels = np.array(values, dtype=np.int64)
    classes, counts = np.unique(labels, return_counts=True)
    sizes = sorted(data.draw(st.lists(st.integers(len(classes), len(labels)), min_size=2, max_size=4)))
    subsets = [nested_subset(labels, size, seed) for size in sizes]
    for size, subset in zip(sizes, subsets, strict=True):
        assert len(set(subset.tolist())) == size
        for label, count in zip(classes, counts, strict=True):
            kept = int((labels[subset] == label).sum())
            assert kept >= 1
            # The first example of every class comes early: at most C - 1 positions in all.
            assert abs(kept - size * count / len(labels)) <= len(classes)
    for small, large in pairwise(subsets):
        assert set(small.tolist()) <= set(large.tolist())


def test_the_seed_chooses_the_subset() -> None:
    labels = np.arange(200) % 2
    assert nested_subset(labels, 50, 0).tolist() == nested_subset(labels, 50, 0).tolist()
    assert nested_subset(labels, 50, 0).tolist() != nested_subset(labels, 50, 1).tolist()


@pytest.mark.parametrize("size", [1, 7])
def test_impossible_sizes(size: int) -> None:
    with pytest.raises(UserError, match=f"data.train_size: {size} is not possible.* 6 examples of 2 classes"):
        nested_subset(np.array([0, 0, 0, 1, 1, 1]), size, 0)


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("A  good\tfilm\n", "a good film"),
        ("\ufb01lm", "film"),  # the ligature fi is the two letters under NFKC
        ("\uff21\u00a0b", "a b"),  # a full-width letter, a no-break space
        ("e\u0301", "\u00e9"),  # a combining accent and the composed letter
    ],
)
def test_normalised(text: str, same: str) -> None:
    assert normalised(text) == same


@given(st.text())
def test_normalised_ignores_padding_and_doubling_of_spaces(text: str) -> None:
    assert normalised(f"  {text}\t ") == normalised(text)
    assert "  " not in normalised(text)


def test_duplicates_counted_by_hand() -> None:
    train, dev, test = ["a", "a", "b", "a"], ["b", "c", "c"], ["a", "c", "d", "d", "a"]
    assert count_duplicates(train, dev, test) == {
        "within": {"train": 2, "dev": 1, "test": 2},
        "dev_in_train": 1,
        "test_in_train": 2,
        "test_in_dev": 1,
    }
    assert clean_indices(train, dev, test).tolist() == [2, 3]


DATA = Path(__file__).parents[2] / ".." / "shared" / "data"


@pytest.mark.parametrize(
    ("name", "sizes", "classes", "within_train", "dev_leaks", "test_leaks", "clean"),
    [
        ("citation_intent", [1688, 114, 139], 6, 418, 43, 52, 85),
        ("sciie", [3219, 455, 974], 7, 4, 0, 0, 974),
    ],
)
def test_known_duplicates_of_public_data_sets(
    name: str, sizes: list[int], classes: int, within_train: int, dev_leaks: int, test_leaks: int, clean: int
) -> None:
    if not (DATA / name).is_dir():
        pytest.skip(f"../shared/data/{name} is not there")
    data = DataConfig(task=str(DATA / name))
    task = read_task(find_source(data), data)
    keys = {split: task.splits[split].texts.keys() for split in SPLITS}
    counts = count_duplicates(keys["train"], keys["dev"], keys["test"])
    assert [len(keys[split]) for split in SPLITS] == sizes
    assert len(check_labels(task.splits, data)[0]) == classes
    assert counts["within"]["train"] == within_train
    assert (counts["dev_in_train"], counts["test_in_train"]) == (dev_leaks, test_leaks)
    assert len(clean_indices(keys["train"], keys["dev"], keys["test"])) == clean
