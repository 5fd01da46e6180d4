"""The published snippets themselves, fetched once into the user's own cache."""

from __future__ import annotations

import pytest

from aang_ray.data.embedded import read_embedded
from aang_ray.data.read import SPLITS
from aang_ray.data.splits import count_duplicates
from aang_ray.errors import UserError


@pytest.mark.parametrize(
    ("name", "sizes", "snippets"), [("movie", [1000, 500, 1500], 10605), ("tweets", [800, 400, 1200], 4200)]
)
def test_sizes_and_no_leak(name: str, sizes: list[int], snippets: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AANG_CACHE")
    try:
        task = read_embedded(name)
    except UserError as error:
        pytest.skip(f"the data cannot be fetched: {error}")
    keys = {split: task.splits[split].texts.keys() for split in SPLITS}
    assert [len(keys[split]) for split in SPLITS] == sizes
    assert count_duplicates(keys["train"], keys["dev"], keys["test"]) == {
        "within": {"train": 0, "dev": 0, "test": 0},
        "dev_in_train": 0,
        "test_in_train": 0,
        "test_in_dev": 0,
    }
    # Nearly every snippet is used once: few stand in the file twice.
    assert task.in_domain is not None
    assert snippets - 100 < sum(sizes) + len(task.in_domain) <= snippets
    assert set(task.splits["train"].labels) == {"negative", "positive"}
