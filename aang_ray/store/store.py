"""The Parquet store of finished cells: what remembers, while Ray schedules."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from aang_ray.errors import UserError
from aang_ray.store.files import Location, one_writer, open_location, publish, remove, sweep_leftovers
from aang_ray.store.schema import (
    SCHEMA_VERSION,
    VERSION_KEY,
    CellRecord,
    Status,
    TableName,
    from_tables,
    to_tables,
    with_partitions,
)

# --- store.layout: Names in a store: `<root>/<table>/task=<task>/method=<method>/<cell>.parquet`, names URL-quoted.


SUFFIX = ".parquet"


@dataclass(frozen=True)
class CellFile:
    """One file of a table."""

    path: str
    cell: str
    task: str
    method: str


def cell_path(location: Location, table: TableName, task: str, method: str, cell: str) -> str:
    """Where a cell's file of a table lies."""
    return location.path(table, f"task={quote(task, safe='')}", f"method={quote(method, safe='')}", f"{cell}{SUFFIX}")


def list_files(location: Location, table: TableName) -> list[CellFile]:
    """The files of a table, by path; none where the store does not exist. Hidden files are no rows."""
    selector = fs.FileSelector(location.path(table), allow_not_found=True, recursive=True)
    found = [_parse(info) for info in location.filesystem.get_file_info(selector) if _is_row(info)]
    return sorted(found, key=lambda file: file.path)


def _is_row(info: fs.FileInfo) -> bool:
    name = info.base_name
    return info.type == fs.FileType.File and name.endswith(SUFFIX) and not name.startswith((".", "_"))


def _parse(info: fs.FileInfo) -> CellFile:
    task, method, name = info.path.split("/")[-3:]
    return CellFile(
        path=info.path,
        cell=name.removesuffix(SUFFIX),
        task=unquote(task.removeprefix("task=")),
        method=unquote(method.removeprefix("method=")),
    )


# --- store.read: Reading a store's files, with a clear word about those that cannot be read.


_READERS = 16  # files are small: the wait for each is what takes time


def read_files(
    location: Location, table: TableName, files: Sequence[CellFile], columns: Sequence[str] | None = None
) -> pa.Table:
    """The rows of `files`, partitions included, in the files' order.

    A file that vanished since it was listed (a failed row that is being replaced) has no rows. Raises `UserError` for
    a file that is not whole or is of a newer schema.
    """
    schema = with_partitions(table)
    if columns is not None:
        schema = pa.schema([schema.field(name) for name in columns], metadata=schema.metadata)
    with ThreadPoolExecutor(_READERS) as pool:
        parts = list(pool.map(lambda file: _read(location, file, schema), files))
    return pa.concat_tables([schema.empty_table(), *(part for part in parts if part is not None)])


def _read(location: Location, file: CellFile, schema: pa.Schema) -> pa.Table | None:
    try:
        with location.filesystem.open_input_file(file.path) as stream:
            parquet = pq.ParquetFile(stream)
            version = _check_version(parquet.schema_arrow, file.path)
            partitions = {"task": file.task, "method": file.method}
            names = [name for name in schema.names if name not in partitions]
            table = parquet.read(columns=names, use_threads=False)  # files are read side by side already
    except FileNotFoundError:
        return None
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        raise UserError(
            f"{file.path} cannot be read as Parquet ({str(error).partition(chr(10))[0].rstrip('.')}); "
            f"delete it and run again: its cell alone is computed anew"
        ) from error
    columns = [
        pa.array([partitions[field.name]] * table.num_rows, pa.string())
        if field.name in partitions
        else _column(table, field, file.path, version)
        for field in schema
    ]
    return pa.table(columns, schema=schema)


def _column(table: pa.Table, field: pa.Field, path: str, version: int) -> pa.ChunkedArray:
    if field.name not in table.column_names:
        if version < SCHEMA_VERSION and field.nullable:
            return pa.nulls(table.num_rows, field.type)  # the column is younger than the file
        raise UserError(f"{path} lacks the column {field.name}; it was not written by this program: move it away")
    return table.column(field.name).cast(field.type)


def _check_version(schema: pa.Schema, path: str) -> int:
    """The schema version of a file."""
    text = (schema.metadata or {}).get(VERSION_KEY, b"").decode(errors="replace")
    if not text.isdecimal():
        raise UserError(f"{path} states no schema version; it was not written by this program: move it away")
    if int(text) > SCHEMA_VERSION:
        raise UserError(
            f"{path} has schema version {text}, newer than version {SCHEMA_VERSION} that this program reads; "
            f"upgrade aang-ray"
        )
    return int(text)


# --- store.write: Writing a finished cell so that a kill at any moment leaves either a whole row or none.


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
