"""SQL over the tables of a store."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from aang_ray.errors import UserError
from aang_ray.report.query import query
from aang_ray.store import Store

Write = Callable[..., None]


def test_tables_are_queried_by_their_names(store: Store, write: Write) -> None:
    for seed in range(2):
        write(store, seed=seed, test=0.6 + seed / 10)
    frame = query(store, 'select "row", avg(test_score) as mean, count(*) as n from results group by "row"')
    assert frame.to_dict("records") == [{"row": "finetune", "mean": pytest.approx(0.65), "n": 2}]
    assert query(store, "select count(*) as n from history join results using (cell)")["n"].tolist() == [0]
    assert query(store, "select count(*) as n from predictions")["n"].tolist() == [0]


def test_a_query_neither_reads_nor_writes_files(store: Store, write: Write, tmp_path: Path) -> None:
    write(store)
    (tmp_path / "secret.csv").write_text("a\n1\n")
    for sql in (
        f"select * from read_csv('{tmp_path}/secret.csv')",
        f"copy results to '{tmp_path}/out.csv'",
        "select nonsense from results",
    ):
        with pytest.raises(UserError, match=r"^query: ") as caught:
            query(store, sql)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "out.csv").exists()


def test_without_duckdb_the_extra_is_named(store: Store, write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    write(store)
    monkeypatch.setitem(sys.modules, "duckdb", None)
    with pytest.raises(UserError, match=r"pip install 'aang-ray\[query\]'"):
        query(store, "select 1")


def test_a_store_that_does_not_exist_is_one_line(store: Store) -> None:
    with pytest.raises(UserError, match="there is no store at"):
        query(store, "select * from results")
