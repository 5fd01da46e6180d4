"""The Parquet store: schema, write, read."""

from aang_ray.store.rows import CellRecord, HistoryRow, ResultRow, Scores, Status, WeightRow
from aang_ray.store.schema import SCHEMA_VERSION
from aang_ray.store.store import Store
from aang_ray.store.write import CellIsDone

__all__ = [
    "SCHEMA_VERSION",
    "CellIsDone",
    "CellRecord",
    "HistoryRow",
    "ResultRow",
    "Scores",
    "Status",
    "Store",
    "WeightRow",
]
