"""Writing a finished cell so that a kill at any moment leaves either a whole row or none."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq

from aang_ray.errors import UserError
from aang_ray.store.layout import CellFile, cell_path, list_files
from aang_ray.store.location import Location
from aang_ray.store.publish import one_writer, publish, remove, sweep_leftovers
from aang_ray.store.read import read_files
from aang_ray.store.records import to_tables
from aang_ray.store.rows import CellRecord
from aang_ray.store.schema import TableName

_ORDER: tuple[TableName, ...] = ("history", "weights", "results")  # the results row last: it stands for all three


class CellIsDone(UserError):
    """The cell has a done row, which is never written again."""


def write_cell(location: Location, record: CellRecord) -> None:
    """Write the three files of a cell.

    A failed row gives way to a later one: it is removed first, so that a results row always belongs to the history
    and weights beside it. Raises `CellIsDone` where the cell has a done row, and leaves that untouched.
    """
    files = {name: _serialise(table) for name, table in to_tables(record).items()}
    result = record.result
    with one_writer(location):
        sweep_leftovers(location)
        for old in _failed_rows(location, result.cell):
            remove(location, old.path)
            for name in ("history", "weights"):
                remove(location, cell_path(location, name, old.task, old.method, old.cell))
        for name in _ORDER:
            publish(location, cell_path(location, name, result.task, result.method, result.cell), files[name])


def _failed_rows(location: Location, cell: str) -> list[CellFile]:
    """The failed rows of a cell (one at most, unless its task was renamed between two writers)."""
    rows = [file for file in list_files(location, "results") if file.cell == cell]
    statuses = read_files(location, "results", rows, ["status"]).column("status").to_pylist()
    if "done" in statuses:
        raise CellIsDone(f"cell {cell} is done already in store {location.uri}; a done row is never written again")
    return rows


def _serialise(table: pa.Table) -> bytes:
    """The whole file in memory: one that cannot be made never touches the store."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    data: bytes = sink.getvalue().to_pybytes()
    return data
