"""What counts as the same text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aang_ray.data.splits import clean_indices, count_duplicates, normalised


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


def test_counts_on_a_case_done_by_hand() -> None:
    train, dev, test = ["a", "a", "b", "a"], ["b", "c", "c"], ["a", "c", "d", "d", "a"]
    assert count_duplicates(train, dev, test) == {
        "within": {"train": 2, "dev": 1, "test": 2},
        "dev_in_train": 1,
        "test_in_train": 2,
        "test_in_dev": 1,
    }
    assert clean_indices(train, dev, test).tolist() == [2, 3]
