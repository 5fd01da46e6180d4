"""SQL over the tables of a store, by DuckDB."""

from __future__ import annotations

import re

import pandas as pd

from aang_ray.errors import UserError
from aang_ray.store import Store

TABLES = ("results", "history", "weights", "predictions")


def query(store: Store, sql: str) -> pd.DataFrame:
    """Return the answer to a query.

    Args:
        store: The store.
        sql: SQL in which `results`, `history`, `weights` and `predictions` are tables. It cannot read or write files.

    Raises:
        UserError: for SQL that DuckDB refuses, a store that does not exist, or if DuckDB is missing.
    """
    try:
        import duckdb
    except ImportError as error:
        raise UserError("queries need DuckDB: pip install 'aang-ray[query]'") from error
    if not store.exists():
        raise UserError(f"there is no store at {store.uri}")
    with duckdb.connect(config={"enable_external_access": False}) as connection:
        # Only what the query names is read: predictions are large.
        for name in TABLES:
            if re.search(rf"\b{name}\b", sql, re.IGNORECASE):
                connection.register(name, getattr(store, name)())
        try:
            answer = connection.execute(sql)
            return answer.df() if answer.description else pd.DataFrame()
        except duckdb.Error as error:
            raise UserError(f"query: {' '.join(str(error).split())}") from error
