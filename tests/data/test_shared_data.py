"""The leaks of two public data sets, counted against what is known of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from aang_ray.config import DataConfig
from aang_ray.data.read import SPLITS, check_labels
from aang_ray.data.sources import find_source, read_task
from aang_ray.data.splits import clean_indices, count_duplicates

DATA = Path(__file__).parents[2] / ".." / "shared" / "data"


@pytest.mark.parametrize(
    ("name", "sizes", "classes", "within_train", "dev_leaks", "test_leaks", "clean"),
    [
        ("citation_intent", [1688, 114, 139], 6, 418, 43, 52, 85),
        ("sciie", [3219, 455, 974], 7, 4, 0, 0, 974),
    ],
)
def test_known_counts(
    name: str, sizes: list[int], classes: int, within_train: int, dev_leaks: int, test_leaks: int, clean: int
) -> None:
    if not (DATA / name).is_dir():
        pytest.skip(f"../shared/data/{name} is not there")
    data = DataConfig(task=str(DATA / name))
    task = read_task(find_source(data), data)
    keys = {split: task.splits[split].texts.keys() for split in SPLITS}
    counts = count_duplicates(keys["train"], keys["dev"], keys["test"])
    assert [len(keys[split]) for split in SPLITS] == sizes
    assert len(check_labels(task.splits)) == classes
    assert counts["within"]["train"] == within_train
    assert (counts["dev_in_train"], counts["test_in_train"]) == (dev_leaks, test_leaks)
    assert len(clean_indices(keys["train"], keys["dev"], keys["test"])) == clean
