"""A store that version 0.1 wrote is read back as it was, and its table is printed as it was."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.frozen.frozen import HERE, STORE, printed, read_json, records


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A copy: readers may leave files of their own."""
    return shutil.copytree(STORE, tmp_path / "store")


def test_every_record_is_read_back(store: Path) -> None:
    assert records(store) == read_json("records.json")


@pytest.mark.parametrize(("output", "file"), [("markdown", "table.md"), ("json", "table.json")])
def test_the_table_is_printed_byte_for_byte(store: Path, output: str, file: str) -> None:
    expected = (HERE / file).read_bytes()
    assert printed("table", "--store", str(store), "--format", output).encode() == expected
