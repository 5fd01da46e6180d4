"""The Parquet store of finished runs. Ray schedules runs; the store remembers them.

    <root>/<table>/task=<task>/method=<method>/<cell>.parquet

holds one immutable file a run in each of the tables `results`, `history` and `weights`. Names in paths are URL-quoted.
Any reader of hive layouts opens the tables. A run exists when it has a file in `results`, which is written last.
"""

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
from aang_ray.store.files import Location, one_writer, open_location, publish, remove, remove_leftovers
from aang_ray.store.schema import (
    PARTITIONS,
    SCHEMA_VERSION,
    VERSION_KEY,
    CellRecord,
    Status,
    TableName,
    from_tables,
    to_tables,
    with_partitions,
)

SUFFIX = ".parquet"
_ORDER: tuple[TableName, ...] = ("history", "weights", "results")
"""The order of writing. A row of `results` stands for the files of all three tables, so it comes last."""
_READERS = 16
"""Threads that read files. The files are small, so most of the time is waiting for each of them."""


class CellIsDone(UserError):
    """The cell has a done row, which is never written again."""


@dataclass(frozen=True)
class CellFile:
    """One file of a table."""

    path: str
    cell: str
    task: str
    method: str


class Store:
    """The rows of finished runs below one root.

    Args:
        uri: A local folder, which need not exist yet, or any URI that pyarrow or fsspec opens.

    Raises:
        UserError: The URI is unknown, may not be read, or is a file.
    """

    def __init__(self, uri: str | Path) -> None:
        self._location = open_location(uri)

    @property
    def uri(self) -> str:
        """Where the store lies: an absolute path, or the URI as given."""
        return self._location.uri

    def exists(self) -> bool:
        """Return whether the root exists."""
        return self._location.exists()

    def check_writable(self) -> None:
        """Make the folder of a local store, before the hours of work that it is to keep.

        A remote store is not asked: only its first file shows whether it can be written.

        Raises:
            UserError: The folder cannot be made or written.
        """
        with one_writer(self._location):
            pass

    def write(self, record: CellRecord) -> None:
        """Add a run: all of it or, if the process is killed meanwhile, nothing. A failed or cut row is replaced.

        Raises:
            CellIsDone: The cell has a done row.
        """
        write_cell(self._location, record)

    def done(self) -> dict[str, Status]:
        """Return the status of every cell that has a row; nothing if the store does not exist."""
        rows = read_files(self._location, "results", list_files(self._location, "results"), ["cell", "status"])
        return dict(zip(rows.column("cell").to_pylist(), rows.column("status").to_pylist(), strict=True))

    def results(self, columns: Sequence[str] | None = None) -> pa.Table:
        """Return all rows of `results`, with `task` and `method`; none if the store does not exist.

        Args:
            columns: The columns to read; None stands for all.
        """
        return read_files(self._location, "results", list_files(self._location, "results"), columns)

    def history(self, cells: Collection[str] | None = None) -> pa.Table:
        """Return the evaluations of the given cells; None stands for all cells."""
        return self._logged("history", cells)

    def weights(self, cells: Collection[str] | None = None) -> pa.Table:
        """Return the weights over time of the given cells; None stands for all cells."""
        return self._logged("weights", cells)

    def record(self, cell: str) -> CellRecord:
        """Return everything that the store holds of one cell.

        Raises:
            UserError: The cell has no row.
        """
        found = [file for file in list_files(self._location, "results") if file.cell == cell]
        results = read_files(self._location, "results", found)
        if not results.num_rows:
            raise UserError(f"store {self.uri} has no row of cell {cell}")
        return from_tables({"results": results, "history": self.history({cell}), "weights": self.weights({cell})})

    def _logged(self, name: TableName, cells: Collection[str] | None) -> pa.Table:
        """Return the rows of a table whose cells have a row in `results`, too."""
        finished = {(file.task, file.method, file.cell) for file in list_files(self._location, "results")}
        files = [
            file
            for file in list_files(self._location, name)
            if (file.task, file.method, file.cell) in finished and (cells is None or file.cell in cells)
        ]
        return read_files(self._location, name, files)


def cell_path(location: Location, table: TableName, task: str, method: str, cell: str) -> str:
    """Return where the file of a cell in a table lies."""
    return location.path(table, f"task={quote(task, safe='')}", f"method={quote(method, safe='')}", f"{cell}{SUFFIX}")


def list_files(location: Location, table: TableName) -> list[CellFile]:
    """Return the files of a table in the order of their paths; none if the store does not exist."""
    selector = fs.FileSelector(location.path(table), allow_not_found=True, recursive=True)
    files = []
    for info in location.filesystem.get_file_info(selector):
        name = info.base_name
        if info.type == fs.FileType.File and name.endswith(SUFFIX) and not name.startswith((".", "_")):
            task, method = (unquote(part.partition("=")[2]) for part in info.path.split("/")[-3:-1])
            files.append(CellFile(info.path, name.removesuffix(SUFFIX), task, method))
    return sorted(files, key=lambda file: file.path)


def read_files(
    location: Location, table: TableName, files: Sequence[CellFile], columns: Sequence[str] | None = None
) -> pa.Table:
    """Return the rows of some files, in the order of the files.

    A file that was removed since it was listed has no rows: a failed row is being replaced.

    Args:
        location: The root of the store.
        table: The table that the files belong to.
        files: The files, as `list_files` returns them.
        columns: The columns to read, `task` and `method` included; None stands for all.

    Raises:
        UserError: A file is not whole, or this version cannot read it.
    """

    schema = with_partitions(table)
    if columns is not None:
        schema = pa.schema([schema.field(name) for name in columns], metadata=schema.metadata)
    with ThreadPoolExecutor(_READERS) as pool:
        parts = list(pool.map(lambda file: _read(location, file, schema), files))
    return pa.concat_tables([schema.empty_table(), *(part for part in parts if part is not None)])


def _read(location: Location, file: CellFile, schema: pa.Schema) -> pa.Table | None:
    """Return the rows of one file with the columns of a schema, or None if the file is gone.

    The file is opened once. `pyarrow.dataset` would open it twice, for its footer and for its rows, and another process
    may replace the file in between.

    Raises:
        UserError: The file is not whole, is of a newer version, or was written by something else.
    """
    try:
        with location.filesystem.open_input_file(file.path) as stream:
            parquet = pq.ParquetFile(stream)
            version = _check_version(parquet.schema_arrow, file.path)
            names = [name for name in schema.names if name not in PARTITIONS]
            table = parquet.read(columns=names, use_threads=False)  # several files are read at the same time already
    except FileNotFoundError:
        return None
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        raise UserError(
            f"{file.path} cannot be read as Parquet ({str(error).partition(chr(10))[0].rstrip('.')}); "
            f"delete it and run again: its cell alone is computed anew"
        ) from error
    partitions = {"task": file.task, "method": file.method}
    columns = []
    for field in schema:
        if field.name in partitions:
            columns.append(pa.array([partitions[field.name]] * table.num_rows, pa.string()))
        elif field.name in table.column_names:
            columns.append(table.column(field.name).cast(field.type))
        elif version < SCHEMA_VERSION and field.nullable:  # the column is younger than the file
            columns.append(pa.nulls(table.num_rows, field.type))
        else:
            raise UserError(
                f"{file.path} lacks the column {field.name}; it was not written by this program: move it away"
            )
    return pa.table(columns, schema=schema)


def _check_version(schema: pa.Schema, path: str) -> int:
    """Return the schema version of a file.

    Raises:
        UserError: The file states no version, or a newer one.
    """
    text = (schema.metadata or {}).get(VERSION_KEY, b"").decode(errors="replace")
    if not text.isdecimal():
        raise UserError(f"{path} states no schema version; it was not written by this program: move it away")
    if int(text) > SCHEMA_VERSION:
        raise UserError(
            f"{path} has schema version {text}, newer than version {SCHEMA_VERSION} that this program reads; "
            f"upgrade aang-ray"
        )
    return int(text)


def write_cell(location: Location, record: CellRecord) -> None:
    """Write the three files of a cell.

    An earlier row that is not done is removed first, so that a row of `results` always belongs to the history and
    weights of the same run.

    Raises:
        CellIsDone: The cell has a done row. It stays as it is.
    """
    files = {name: _serialise(table) for name, table in to_tables(record).items()}
    result = record.result
    with one_writer(location):
        remove_leftovers(location)
        # There is one earlier row at most, unless the task was renamed between two writers.
        earlier = [file for file in list_files(location, "results") if file.cell == result.cell]
        if "done" in read_files(location, "results", earlier, ["status"]).column("status").to_pylist():
            raise CellIsDone(
                f"cell {result.cell} is done already in store {location.uri}; a done row is never written again"
            )
        for old in earlier:
            remove(location, old.path)
            for name in ("history", "weights"):
                remove(location, cell_path(location, name, old.task, old.method, old.cell))
        for name in _ORDER:
            publish(location, cell_path(location, name, result.task, result.method, result.cell), files[name])


def _serialise(table: pa.Table) -> bytes:
    """Return a table as a Parquet file.

    It is made in memory: a table that cannot be written never touches the store.
    """
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    data: bytes = sink.getvalue().to_pybytes()
    return data
