"""The Parquet store of finished cells: what remembers, while Ray schedules."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import pyarrow as pa

from aang_ray.errors import UserError
from aang_ray.store.layout import CellFile, list_files
from aang_ray.store.location import open_location
from aang_ray.store.publish import one_writer
from aang_ray.store.read import read_files
from aang_ray.store.records import from_tables
from aang_ray.store.rows import CellRecord, Status
from aang_ray.store.schema import TableName
from aang_ray.store.write import write_cell


class Store:
    """Rows of finished cells below one root, which is a local folder or any URI that pyarrow or fsspec opens.

    `<root>/<table>/task=<task>/method=<method>/<cell>.parquet` holds one immutable file a cell in each of the tables
    `results`, `history` and `weights`. A cell is there when it has a file in `results`: that is written last.
    """

    def __init__(self, uri: str | Path) -> None:
        self._location = open_location(uri)

    @property
    def uri(self) -> str:
        """Where the store lies: an absolute path, or the URI as given."""
        return self._location.uri

    def exists(self) -> bool:
        """Whether there is anything at the root."""
        return self._location.exists()

    def check_writable(self) -> None:
        """Make the folder of a local store, before hours of work that it is to keep.

        Raises `UserError` where it cannot be made or written. What a remote store takes is seen by the first file.
        """
        with one_writer(self._location):
            pass

    def write(self, record: CellRecord) -> None:
        """Add a cell: all of it or, when killed on the way, nothing.

        A failed row is replaced. Raises `CellIsDone` (a `UserError`) for a cell that has a done row.
        """
        write_cell(self._location, record)

    def done(self) -> dict[str, Status]:
        """Status of every cell that has a row; empty where the store does not exist."""
        rows = read_files(self._location, "results", list_files(self._location, "results"), ["cell", "status"])
        return dict(zip(rows.column("cell").to_pylist(), rows.column("status").to_pylist(), strict=True))

    def results(self) -> pa.Table:
        """All rows of `results`, `task` and `method` included; none where the store does not exist."""
        return read_files(self._location, "results", list_files(self._location, "results"))

    def history(self, cells: Collection[str] | None = None) -> pa.Table:
        """The evaluations of the given cells, or of all."""
        return self._logged("history", cells)

    def weights(self, cells: Collection[str] | None = None) -> pa.Table:
        """The weights over time of the given cells, or of all."""
        return self._logged("weights", cells)

    def record(self, cell: str) -> CellRecord:
        """Everything that one cell left. Raises `UserError` for a cell without a row."""
        found = [file for file in list_files(self._location, "results") if file.cell == cell]
        results = read_files(self._location, "results", found)
        if not results.num_rows:
            raise UserError(f"store {self.uri} has no row of cell {cell}")
        return from_tables({"results": results, "history": self.history({cell}), "weights": self.weights({cell})})

    def _logged(self, name: TableName, cells: Collection[str] | None) -> pa.Table:
        finished = {(file.task, file.method, file.cell) for file in list_files(self._location, "results")}

        def wanted(file: CellFile) -> bool:
            there = (file.task, file.method, file.cell) in finished
            return there and (cells is None or file.cell in cells)

        files = [file for file in list_files(self._location, name) if wanted(file)]
        return read_files(self._location, name, files)
