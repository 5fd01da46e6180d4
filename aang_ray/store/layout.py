"""Names in a store: `<root>/<table>/task=<task>/method=<method>/<cell>.parquet`, names URL-quoted."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import quote, unquote

from pyarrow import fs

from aang_ray.store.location import Location
from aang_ray.store.schema import TableName

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
