"""The store's three tables as Arrow schemas.

`task` and `method` are not columns of the files: they are the hive partitions of the path, and every reader of hive
layouts (pyarrow, pandas, DuckDB, Spark) adds them. Scores are flat columns, `<view>_<score>`, so that they can be
queried by name; the configuration is JSON.
"""

from __future__ import annotations

from typing import Literal

import pyarrow as pa

SCHEMA_VERSION = 2
"""2 added `stage` and made dev nullable in `history`, and added the views before a final fine-tuning to `results`.

One rule reads older files: a nullable column that a file of an older version lacks is null.
"""
VERSION_KEY = b"aang_ray.schema"

TableName = Literal["results", "history", "weights"]
PARTITIONS = ("task", "method")
VIEWS = ("dev", "test", "test_clean", "dev_before", "test_before", "test_clean_before")

_NUMBERS = pa.map_(pa.string(), pa.float64())
_COUNTS = pa.map_(pa.string(), pa.int64())
_STRINGS = pa.map_(pa.string(), pa.string())


def _field(name: str, kind: pa.DataType) -> pa.Field:
    return pa.field(name, kind, nullable=False)


def _scores(view: str, *, nullable: bool) -> list[pa.Field]:
    """The columns of one view; all of them are null where the view was never scored."""
    columns = {
        "accuracy": pa.float64(),
        "macro_f1": pa.float64(),
        "loss": pa.float64(),
        "examples": pa.int64(),
        "per_class": _COUNTS,
    }
    return [pa.field(f"{view}_{name}", kind, nullable=nullable) for name, kind in columns.items()]


_RESULTS = [
    _field("cell", pa.string()),
    _field("group", pa.string()),
    _field("row", pa.string()),
    pa.field("space", pa.string()),
    pa.field("n", pa.string()),
    _field("seed", pa.int64()),
    _field("status", pa.string()),
    pa.field("error", pa.string()),
    pa.field("log_tail", pa.string()),
    _field("metric", pa.string()),
    # `<view>_score` repeats the score that `metric` names, for queries over tasks of different metrics.
    *(pa.field(f"{view}_score", pa.float64()) for view in VIEWS),
    *(column for view in VIEWS for column in _scores(view, nullable=True)),
    pa.field("test_clean_low", pa.float64()),
    pa.field("test_clean_high", pa.float64()),
    pa.field("majority", pa.bool_()),
    pa.field("best_step", pa.int64()),
    _field("steps", pa.int64()),
    _field("examples", pa.int64()),
    _field("tokens", pa.int64()),
    _field("seconds", pa.float64()),
    _field("device", pa.string()),
    _field("precision", pa.string()),
    _field("versions", _STRINGS),
    _field("finished_at", pa.string()),
    _field("config", pa.string()),
]

_HISTORY = [
    _field("cell", pa.string()),
    _field("step", pa.int64()),
    *_scores("dev", nullable=True),
    _field("losses", _NUMBERS),
    _field("seconds", pa.float64()),
    _field("examples", pa.int64()),
    _field("tokens", pa.int64()),
    pa.field("stage", pa.string()),
]

_WEIGHTS = [
    _field("cell", pa.string()),
    _field("step", pa.int64()),
    _field("end_task_weight", pa.float64()),
    _field("weights", _NUMBERS),
    _field("factors", pa.map_(pa.string(), _NUMBERS)),
    _field("health", _NUMBERS),
]

_VERSION = {VERSION_KEY: str(SCHEMA_VERSION).encode()}

SCHEMAS: dict[TableName, pa.Schema] = {
    "results": pa.schema(_RESULTS, metadata=_VERSION),
    "history": pa.schema(_HISTORY, metadata=_VERSION),
    "weights": pa.schema(_WEIGHTS, metadata=_VERSION),
}
"""Columns of the files."""


def with_partitions(name: TableName) -> pa.Schema:
    """The columns of a table as read: those of the files, then the partitions of the path."""
    schema = SCHEMAS[name]
    for partition in PARTITIONS:
        schema = schema.append(_field(partition, pa.string()))
    return schema
