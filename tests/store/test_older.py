"""Stores that earlier versions wrote stay readable."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from aang_ray.errors import UserError
from aang_ray.store import CellRecord, Store
from tests.store.conftest import MakeRecord

COMMITTED = Path(__file__).parents[2] / "benchmarks" / "results" / "store"


def as_version_1(folder: Path) -> None:
    """Rewrite a store's files as the first version wrote them: without the columns that are younger."""
    for path in folder.rglob("*.parquet"):
        table = pq.ParquetFile(path).read()
        younger = [name for name in table.column_names if "_before" in name or name == "stage"]
        table = table.drop_columns(younger).replace_schema_metadata({"aang_ray.schema": "1"})
        pq.write_table(table, path)


def test_columns_that_a_file_is_too_old_for_are_null(tmp_path: Path, make_record: MakeRecord) -> None:
    store, old = Store(tmp_path), make_record(1)
    scores = old.result.dev
    staged = tuple(replace(row, stage="train") for row in old.history)
    store.write(CellRecord(replace(old.result, dev_before=scores, test_before=scores), staged, old.weights))
    as_version_1(tmp_path)
    assert store.record(old.result.cell) == old
    new = CellRecord(replace(make_record(2).result, dev_before=scores), staged, old.weights)
    store.write(new)
    assert store.record(new.result.cell) == new
    assert store.results()["dev_before_score"].to_pylist() == [None, 0.501]
    assert store.history()["stage"].to_pylist() == [None] * 3 + ["train"] * 3


def test_a_column_that_every_version_has_must_be_there(tmp_path: Path, make_record: MakeRecord) -> None:
    store = Store(tmp_path)
    store.write(make_record(1))
    as_version_1(tmp_path)
    (path,) = (tmp_path / "results").rglob("*.parquet")
    table = pq.ParquetFile(path).read()
    pq.write_table(table.drop_columns(["seed"]), path)
    with pytest.raises(UserError, match="lacks the column seed"):
        store.results()


def test_a_file_of_this_version_has_all_columns(tmp_path: Path, make_record: MakeRecord) -> None:
    """A nullable column may lack in an older file alone: elsewhere its absence is damage."""
    store = Store(tmp_path)
    store.write(make_record(1))
    (path,) = (tmp_path / "results").rglob("*.parquet")
    table = pq.ParquetFile(path).read()
    pq.write_table(table.drop_columns(["dev_before_score"]), path)
    with pytest.raises(UserError, match="lacks the column dev_before_score"):
        store.results()


def test_the_committed_store_is_readable() -> None:
    store = Store(COMMITTED)
    rows = store.results().to_pylist()
    assert rows
    assert {row["cell"] for row in rows} == set(store.history()["cell"].to_pylist())
    store.weights()
