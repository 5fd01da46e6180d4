"""The Parquet store of finished runs. Ray schedules runs; the store remembers them.

    <root>/<table>/task=<task>/method=<method>/<cell>.parquet
    <root>/<table>/task=<task>/method=<method>/packed/<digest>.parquet

holds one immutable file a run in each of the tables `results`, `history`, `weights` and `predictions`, or the rows of
many runs that are done in one packed file (`aang_ray.store.upkeep`). Names in paths are URL-quoted. Any reader of hive
layouts opens the tables. A run exists when it has a row in `results`, which is written last.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import fs

from aang_ray.errors import UserError
from aang_ray.store.files import (
    Location,
    NotWritten,
    one_writer,
    open_location,
    publish,
    remove,
    remove_leftovers,
)
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

SUFFIX, PACKED = ".parquet", "packed"
ORDER: tuple[TableName, ...] = ("predictions", "history", "weights", "results")
"""The order of writing. A row of `results` stands for the rows of all tables, so it comes last."""
_READERS, _LOCAL_READERS = 16, 4
"""Threads that read files of a remote and of a local store. Of remote ones, which are small, most time is waiting."""
_LOOKS = 5
"""How often a reader lists the files again because some were replaced or packed while it read."""


class CellIsDone(UserError):
    """The cell has a done row, which is never written again."""


@dataclass(frozen=True)
class CellFile:
    """One file of a table."""

    path: str
    cell: str | None
    """The run whose rows it holds; None for a packed file."""
    task: str
    method: str


class Store:
    """The rows of finished runs below one root: a local folder, which may not exist yet, or a URI of pyarrow or fsspec.

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
        """Make the folder of a local store, before the hours of work that it is to keep, and tidy it.

        A remote store is not asked: only its first file shows whether it can be written.

        Raises:
            UserError: The folder cannot be made or written.
        """
        try:
            with one_writer(self._location):
                remove_leftovers(self._location)
        except NotWritten as error:
            raise UserError(str(error)) from error

    def write(self, record: CellRecord) -> None:
        """Add a run: all of it or, if the process is killed meanwhile, nothing. A failed or cut row is replaced.

        Raises:
            CellIsDone: The cell has a done row.
            NotWritten: The store takes no more files.
        """
        result = record.result
        write_tables(self._location, result.cell, result.task, result.method, to_tables(record))

    def done(self) -> dict[str, Status]:
        """Return the status of every cell that has a row; nothing if the store does not exist."""
        rows = self.results(["cell", "status"])
        return dict(zip(rows.column("cell").to_pylist(), rows.column("status").to_pylist(), strict=True))

    def results(self, columns: Sequence[str] | None = None) -> pa.Table:
        """Return all rows of `results`, with `task` and `method`; none if the store does not exist.

        Args:
            columns: The columns to read; None stands for all.
        """
        return read_table(self._location, "results", None, columns)

    def history(self, cells: Collection[str] | None = None) -> pa.Table:
        """Return the evaluations of the given cells; None stands for all cells."""
        return self._logged("history", cells)

    def weights(self, cells: Collection[str] | None = None) -> pa.Table:
        """Return the weights over time of the given cells; None stands for all cells."""
        return self._logged("weights", cells)

    def predictions(self, cells: Collection[str] | None = None) -> pa.Table:
        """Return the predictions on dev and test of the given cells; None stands for all cells.

        Runs that are older than this table, that failed or that were cut short have none.
        """
        return self._logged("predictions", cells)

    def record(self, cell: str) -> CellRecord:
        """Return everything that the store holds of one cell.

        Raises:
            UserError: The cell has no row.
        """
        results = read_table(self._location, "results", {cell})
        if not results.num_rows:
            raise UserError(f"store {self.uri} has no row of cell {cell}")
        return from_tables({"results": results, "history": self.history({cell}), "weights": self.weights({cell})})

    def _logged(self, name: TableName, cells: Collection[str] | None) -> pa.Table:
        """Return the rows of a table whose cells have a row in `results`, too."""
        finished = set(read_table(self._location, "results", cells, ["cell"]).column("cell").to_pylist())
        return read_table(self._location, name, finished)


def cell_path(location: Location, table: TableName, task: str, method: str, cell: str) -> str:
    """Return where the file of a cell in a table lies."""
    return location.path(table, f"task={quote(task, safe='')}", f"method={quote(method, safe='')}", f"{cell}{SUFFIX}")


def list_files(location: Location, table: TableName, partition: tuple[str, str] | None = None) -> list[CellFile]:
    """Return the files of a table, or of one task and method in it, packed ones first; none if there is no store."""
    folder = cell_path(location, table, *partition, "").rpartition("/")[0] if partition else location.path(table)
    selector = fs.FileSelector(folder, allow_not_found=True, recursive=True)
    files = []
    for info in location.filesystem.get_file_info(selector):
        name, folders = info.base_name, info.path.split("/")[:-1]
        if info.type == fs.FileType.File and name.endswith(SUFFIX) and not name.startswith((".", "_")):
            packed = folders[-1] == PACKED
            partition = folders[-3:-1] if packed else folders[-2:]
            task, method = (unquote(part.partition("=")[2]) for part in partition)
            files.append(CellFile(info.path, None if packed else name.removesuffix(SUFFIX), task, method))
    return sorted(files, key=lambda file: (file.cell is not None, file.path))


def read_table(
    location: Location,
    table: TableName,
    cells: Collection[str] | None = None,
    columns: Sequence[str] | None = None,
    partition: tuple[str, str] | None = None,
) -> pa.Table:
    """Return the rows of the given cells in a table; None stands for all cells.

    While files are packed, a cell may be in a packed file and in one of its own: then the packed rows are taken. Files
    that go away between their listing and their reading were replaced or packed, and are looked for again.

    Args:
        location: The root of the store.
        table: The table.
        cells: The cells.
        columns: The columns to read, `task` and `method` included; None stands for all.
        partition: Read this task and method only.

    Raises:
        UserError: A file is not whole, or this version cannot read it.
    """
    wanted = None if cells is None else set(cells)
    names = None if columns is None else list(dict.fromkeys(["cell", *columns]))
    found = with_columns(table, names).empty_table()
    for look in range(_LOOKS):
        files = list_files(location, table, partition)
        seen: set[str] = set()
        parts = []
        for part in read_files(location, table, [file for file in files if file.cell is None], names):
            if part is None:
                continue
            own = set(pc.unique(part.column("cell")).to_pylist())
            take = (own if wanted is None else own & wanted) - seen
            seen |= own
            parts.append(
                part if take == own else part.filter(pc.is_in(part.column("cell"), pa.array(sorted(take), pa.string())))
            )
        single = [file for file in files if file.cell is not None and file.cell not in seen]
        read = read_files(location, table, [file for file in single if wanted is None or file.cell in wanted], names)
        found = pa.concat_tables([found.slice(0, 0), *parts, *(part for part in read if part is not None)])
        if all(part is not None for part in read) or look == _LOOKS - 1:
            break
    return found if columns is None else found.select(list(columns))


def with_columns(table: TableName, columns: Sequence[str] | None) -> pa.Schema:
    """Return the schema of some columns of a table as it is read; None stands for all."""
    schema = with_partitions(table)
    if columns is None:
        return schema
    return pa.schema([schema.field(name) for name in columns], metadata=schema.metadata)


def read_files(
    location: Location, table: TableName, files: Sequence[CellFile], columns: Sequence[str] | None = None
) -> list[pa.Table | None]:
    """Return the rows of each file; None for one that was removed since it was listed.

    Args:
        location: The root of the store.
        table: The table that the files belong to.
        files: The files, as `list_files` returns them.
        columns: The columns to read, `task` and `method` included; None stands for all.

    Raises:
        UserError: A file is not whole, or this version cannot read it.
    """
    schema = with_columns(table, columns)
    # Of local files the work is to decode them, which more threads than that only disturb.
    with ThreadPoolExecutor(_LOCAL_READERS if location.kind == "local" else _READERS) as pool:
        return list(pool.map(lambda file: _read(location, file, schema), files))


def _read(location: Location, file: CellFile, schema: pa.Schema) -> pa.Table | None:
    """Return the rows of one file with the columns of a schema, or None if the file is gone.

    The file is opened once: `pyarrow.dataset` opens it twice, and another process may replace it in between.
    """
    try:
        with location.filesystem.open_input_file(file.path) as stream:
            parquet = pq.ParquetFile(stream, page_checksum_verification=True)
            version = _check_version(parquet.schema_arrow, file.path)
            names = [name for name in schema.names if name not in PARTITIONS]
            table = parquet.read(columns=names, use_threads=False)  # several files are read at the same time already
        whole = _as_schema(table, file, schema, version)
        whole.validate(full=True)  # or a text that is not UTF-8 fails far away
    except FileNotFoundError:
        return None
    except (pa.ArrowException, OSError, ValueError, LookupError) as error:
        raise UserError(
            f"{file.path} cannot be read as Parquet ({str(error).partition(chr(10))[0].rstrip('.')}); "
            f"delete it and run again: its cell alone is computed anew"
        ) from error
    return whole


def _as_schema(table: pa.Table, file: CellFile, schema: pa.Schema, version: int) -> pa.Table:
    """Return a table with the columns of a schema: those of the file, and its partitions."""
    partitions = {"task": file.task, "method": file.method}
    columns = []
    for field in schema:
        if field.name in partitions:
            columns.append(pa.array([partitions[field.name]] * table.num_rows, pa.string()))
        elif field.name in table.column_names:
            column = table.column(field.name)
            if column.type != field.type:
                column = column.cast(field.type)
            if column.null_count and not field.nullable:
                raise ValueError(f"nulls in the column {field.name}")
            columns.append(column)
        elif version < SCHEMA_VERSION and field.nullable:  # the column is younger than the file
            columns.append(pa.nulls(table.num_rows, field.type))
        else:
            raise UserError(
                f"{file.path} lacks the column {field.name}; it was not written by this program: move it away"
            )
    return pa.table(columns, schema=schema)


def _check_version(schema: pa.Schema, path: str) -> int:
    """Return the schema version of a file; `UserError` if it states none, or a newer one."""
    text = (schema.metadata or {}).get(VERSION_KEY, b"").decode(errors="replace")
    if not text.isdecimal():
        raise UserError(f"{path} states no schema version; it was not written by this program: move it away")
    if int(text) > SCHEMA_VERSION:
        raise UserError(
            f"{path} has schema version {text}, newer than version {SCHEMA_VERSION} that this program reads; "
            f"upgrade aang-ray"
        )
    return int(text)


def write_tables(location: Location, cell: str, task: str, method: str, tables: Mapping[TableName, pa.Table]) -> None:
    """Write the files of a cell.

    An earlier row that is not done is removed first, so that a row of `results` always belongs to the other rows of the
    same run.

    Raises:
        CellIsDone: The cell has a done row. It stays as it is.
    """
    content = {name: serialise(table) for name, table in tables.items()}
    with one_writer(location):
        remove_leftovers(location)
        # There is one earlier row at most, unless the task was renamed between two writers.
        files = _files_of(location, cell)
        earlier = [file for file in files if file.cell is not None]
        parts = read_files(location, "results", earlier, ["cell", "status"])
        rows = [row for part in parts if part is not None for row in part.to_pylist()]
        packed = any(cell in _packed_cells(location, file) for file in files if file.cell is None)
        if packed or {"cell": cell, "status": "done"} in rows:
            raise CellIsDone(f"cell {cell} is done already in store {location.uri}; a done row is never written again")
        for old in earlier:
            remove(location, old.path)
            for name in ORDER[:-1]:
                remove(location, cell_path(location, name, old.task, old.method, str(old.cell)))
        for name in ORDER:
            if name in content:
                publish(location, cell_path(location, name, task, method, cell), content[name])


_CELLS_OF: dict[str, frozenset[str]] = {}
"""By path: the cells of packed files that this process has read."""


def _packed_cells(location: Location, file: CellFile) -> frozenset[str]:
    """Return the cells of a packed file of `results`, which are all done.

    A packed file is read once a process: it is named after its cells, and never changes.
    """
    if file.path not in _CELLS_OF:
        (part,) = read_files(location, "results", [file], ["cell"])
        if part is None:  # it was packed again
            return frozenset()
        _CELLS_OF[file.path] = frozenset(part.column("cell").to_pylist())
    return _CELLS_OF[file.path]


def _files_of(location: Location, cell: str) -> list[CellFile]:
    """Return the files of `results` that may hold a cell: its own in each partition, and packed ones.

    A partition may hold very many files, so it is not listed.
    """

    def folders(path: str) -> list[str]:
        infos = location.filesystem.get_file_info(fs.FileSelector(path, allow_not_found=True))
        return [info.path for info in infos if info.type == fs.FileType.Directory]

    tasks = folders(location.path("results"))
    methods = [method for task in tasks for method in folders(task)]
    paths = [f"{method}/{cell}{SUFFIX}" for method in methods]
    own = [info.path for info in location.filesystem.get_file_info(paths) if info.type == fs.FileType.File]
    packs = [fs.FileSelector(f"{method}/{PACKED}", allow_not_found=True) for method in methods]
    packed = [info.path for pack in packs for info in location.filesystem.get_file_info(pack)]
    return [
        CellFile(path, name, *(unquote(part.partition("=")[2]) for part in path.split("/")[at : at + 2]))
        for paths, name, at in ((own, cell, -3), (packed, None, -4))
        for path in paths
    ]


def serialise(table: pa.Table) -> bytes:
    """Return a table as a Parquet file, made in memory: a table that cannot be written never touches the store."""
    # One row gains nothing from dictionaries, statistics and compression: they double its file, and its reading takes
    # three times as long, which counts where a store holds 100,000 of them (benchmarks/store.py).
    several = table.num_rows > 1
    sink = pa.BufferOutputStream()
    pq.write_table(
        table,
        sink,
        compression="zstd" if several else "none",
        use_dictionary=several,
        write_statistics=several,
        write_page_checksum=True,
    )
    data: bytes = sink.getvalue().to_pybytes()
    return data
