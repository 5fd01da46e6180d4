"""Care of a store: pack many small files into few, copy another store's runs, and check that all is as it should be."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.compute as pc

from aang_ray.config import RunConfig
from aang_ray.errors import UserError
from aang_ray.store.files import Location, one_writer, open_location, publish, remove
from aang_ray.store.schema import SCHEMAS, TableName
from aang_ray.store.store import (
    ORDER,
    PACKED,
    CellFile,
    CellIsDone,
    cell_path,
    list_files,
    read_files,
    read_table,
    serialise,
    write_tables,
)

LOOSE = 1000
"""Files of single runs in `results` above which the end of a sweep packs a local store."""


def compact(uri: str) -> tuple[int, int]:
    """Pack the files of all runs that are done: one file for each table, task and method.

    Rows of failed and cut runs may be replaced, so they keep files of their own. Packed files appear before the files
    that they replace go away, and readers take each run once, so readers and writers may go on meanwhile. A process
    that is killed leaves files twice; the next call removes them.

    Args:
        uri: The store.

    Returns:
        The number of files before and after.
    """
    location = open_location(uri)
    before = sum(len(list_files(location, name)) for name in ORDER)
    rows = read_table(location, "results", None, ["cell", "status", "task", "method"]).to_pylist()
    partitions: dict[tuple[str, str], set[str]] = {}
    for row in rows:
        if row["status"] == "done":
            partitions.setdefault((row["task"], row["method"]), set()).add(row["cell"])
    for (task, method), cells in partitions.items():
        with one_writer(location):
            _pack(location, task, method, cells)
    return before, sum(len(list_files(location, name)) for name in ORDER)


def compact_if_many(uri: str, loose: int = LOOSE) -> tuple[int, int] | None:
    """Pack a local store whose table `results` has very many files of single runs; return what `compact` returns.

    Reading a file takes about 1 ms, however small it is, so that tables of many thousand loose runs take minutes.
    A remote store is left as it is: there every file that is moved costs two requests.
    """
    location = open_location(uri)
    if location.kind != "local" or sum(file.cell is not None for file in list_files(location, "results")) <= loose:
        return None
    return compact(uri)


def _pack(location: Location, task: str, method: str, cells: set[str]) -> None:
    digest = hashlib.blake2b("".join(sorted(cells)).encode(), digest_size=8).hexdigest()
    old: list[CellFile] = []
    for name in ORDER:
        path = cell_path(location, name, task, method, f"{PACKED}/{digest}")
        files = list_files(location, name, (task, method))
        replaced = [file for file in files if file.path != path and (file.cell is None or file.cell in cells)]
        if replaced:
            rows = (
                read_table(location, name, cells, partition=(task, method)).sort_by("cell").select(SCHEMAS[name].names)
            )
            publish(location, path, serialise(rows.cast(SCHEMAS[name])))
            old += replaced
    for file in old:
        remove(location, file.path)


def merge(target: str, source: str) -> tuple[int, int]:
    """Copy the runs of one store into another that it does not have. A done run replaces a failed or cut one.

    Args:
        target: The store that gets the runs.
        source: The store that they are copied from; it stays as it is.

    Returns:
        How many runs were copied, and how many the target had already.
    """
    to, of = open_location(target), open_location(source)
    if not of.exists():
        raise UserError(f"there is no store at {of.uri}")
    there = read_table(to, "results", None, ["cell", "status"]).to_pylist()
    kept = {row["cell"] for row in there if row["status"] == "done"}
    present = {row["cell"] for row in there}
    tables = {name: _by_cell(read_table(of, name)) for name in ORDER}
    copied = 0
    for cell, result in tables["results"].items():
        (status,) = result.column("status").to_pylist()
        if cell in (kept if status == "done" else present):
            continue
        (task,), (method,) = (result.column(name).to_pylist() for name in ("task", "method"))
        # A run without history has a file of no rows; a run without predictions has no file.
        rows: dict[TableName, pa.Table] = {n: SCHEMAS[n].empty_table() for n in ORDER if n != "predictions"}
        rows |= {name: found[cell].select(SCHEMAS[name].names) for name, found in tables.items() if cell in found}
        try:
            write_tables(to, cell, task, method, rows)
        except CellIsDone:  # another process wrote it meanwhile
            continue
        copied += 1
    return copied, len(tables["results"]) - copied


def _by_cell(table: pa.Table) -> dict[str, pa.Table]:
    ordered = table.sort_by("cell")
    cells = ordered.column("cell").to_pylist()
    starts = [at for at, cell in enumerate(cells) if at == 0 or cells[at - 1] != cell]
    ends = zip(starts, [*starts[1:], len(cells)], strict=bool(starts))
    return {cells[start]: ordered.slice(start, end - start) for start, end in ends}


def verify(uri: str) -> list[str]:
    """Return what is wrong with a store, one line each; nothing if all is well.

    Every file must be readable; each run must have one row, whose name is the hash of its configuration; and no table
    may hold rows of a run that `results` does not have.

    Args:
        uri: The store.
    """
    location = open_location(uri)
    return list(_problems(location)) if location.exists() else [f"there is no store at {location.uri}"]


def _problems(location: Location) -> Iterator[str]:
    cells: dict[TableName, Counter[str]] = {}
    for name in ORDER:
        cells[name] = Counter()
        for file in list_files(location, name):
            try:
                (rows,) = read_files(location, name, [file])
            except UserError as error:
                yield str(error)
                continue
            if rows is None:
                continue
            own = pc.unique(rows.column("cell")).to_pylist()
            cells[name].update(own if rows.num_rows else [file.cell] if file.cell else [])
            if file.cell is not None and own not in ([], [file.cell]):
                yield f"{file.path}: holds rows of {', '.join(own)}"
            if name == "results":
                for row in rows.select(["cell", "config"]).to_pylist():
                    named = _cell_of(row["config"])
                    if named != row["cell"]:
                        yield f"{file.path}: cell {row['cell']} has a configuration of the name {named}"
        for cell, count in cells[name].items():
            if count > 1:
                yield f"{name}: cell {cell} is in {count} files (`aang store compact` keeps one)"
    for name in ORDER[:-1]:
        for cell in sorted(cells[name].keys() - cells["results"].keys()):
            yield f"{name}: cell {cell} has no row in results (its writer was stopped; running it again replaces it)"


def _cell_of(config: str) -> str:
    try:
        return RunConfig.stored(json.loads(config)).cell
    except ValueError as error:
        return f"– (it is not valid: {str(error).splitlines()[0]})"
