"""The Parquet store of finished runs, and files that appear whole or not at all."""

from aang_ray.store.files import NotWritten, is_disk_failure
from aang_ray.store.schema import SCHEMA_VERSION, CellRecord, HistoryRow, ResultRow, Scores, Status, WeightRow
from aang_ray.store.store import CellIsDone, Store

__all__ = [
    "SCHEMA_VERSION",
    "CellIsDone",
    "CellRecord",
    "HistoryRow",
    "NotWritten",
    "ResultRow",
    "Scores",
    "Status",
    "Store",
    "WeightRow",
    "is_disk_failure",
]
