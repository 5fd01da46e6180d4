"""Reading a store's files, with a clear word about those that cannot be read."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.parquet as pq

from aang_ray.errors import UserError
from aang_ray.store.layout import CellFile
from aang_ray.store.location import Location
from aang_ray.store.schema import SCHEMA_VERSION, VERSION_KEY, TableName, with_partitions

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
