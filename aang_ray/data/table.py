"""One file of rows: read through `datasets`, with the file and the row in every complaint."""

from __future__ import annotations

import csv
import glob
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aang_ray.data.cache import cache_folder
from aang_ray.data.hub import first_line
from aang_ray.errors import UserError

SUFFIXES = (".jsonl", ".csv", ".parquet")
# Opens a UTF-8 file with or without a byte-order mark.
_UTF8 = "utf-8-sig"


class MissingColumn(UserError):
    """A wanted column is not there."""


@dataclass(frozen=True)
class Table:
    """Chosen columns of a file; `rows` numbers them from 1, as lines of a .jsonl or .txt file."""

    where: str
    columns: dict[str, list[Any]]
    rows: list[int]


def read_table(path: Path, wanted: Sequence[str]) -> Table:
    """The wanted columns of a .jsonl, .csv or .parquet file; all others are ignored, whatever they hold.

    Raises:
        MissingColumn: for a column that is missing.
        UserError: for a file that is empty or unreadable, invalid UTF-8 or malformed JSON.
    """
    _require_content(path)
    match path.suffix.lower():
        case ".jsonl":
            return _read_jsonl(path, wanted)
        case ".csv":
            return _read_csv(path, wanted)
        case ".parquet":
            return _read_parquet(path, wanted)
    raise UserError(f"{path}: a table is a {', '.join(SUFFIXES)} file")


def read_lines(path: Path) -> Table:
    """The lines of a text file that are not blank, as column `text`.

    Raises:
        UserError: for a file that is empty or unreadable, or invalid UTF-8.
    """
    _require_content(path)
    _require_utf8(path)
    lines = _load("text", path, encoding=_UTF8)["text"]
    rows = [i for i, line in enumerate(lines) if line.strip()]
    return Table(str(path), {"text": [lines[i] for i in rows]}, [i + 1 for i in rows])


def require_columns(where: str, wanted: Sequence[str], found: Sequence[str]) -> None:
    """Complain of the first wanted column that is not among those found, or stands there twice."""
    for name in wanted:
        columns = f"{name!r}; columns found: {', '.join(found) or 'none'}"
        if name not in found:
            raise MissingColumn(f"{where}: no column {columns}")
        if found.count(name) > 1:
            raise UserError(f"{where}: more than one column {columns}")


def _read_jsonl(path: Path, wanted: Sequence[str]) -> Table:
    lines = read_lines(path)
    objects: list[dict[str, Any]] = []
    for row, line in zip(lines.rows, lines.columns["text"], strict=True):
        try:
            value = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}: row {row} is not valid JSON ({first_line(error)})") from error
        if not isinstance(value, dict):
            raise UserError(f"{path}: row {row} is not a JSON object")
        objects.append(value)
    found = {name: None for value in objects for name in value}
    require_columns(str(path), wanted, list(found))
    return Table(str(path), {name: [value.get(name) for value in objects] for name in wanted}, lines.rows)


def _read_csv(path: Path, wanted: Sequence[str]) -> Table:
    import datasets

    _require_utf8(path)
    with path.open(encoding=_UTF8, newline="") as file:
        header = next(csv.reader(file), [])
    require_columns(str(path), wanted, header)
    # Everything is text: "NA", "null" and "001" are labels like any other.
    features = datasets.Features({name: datasets.Value("string") for name in header})
    columns = _load("csv", path, encoding=_UTF8, features=features, keep_default_na=False)
    return _numbered(str(path), {name: columns[name] for name in wanted})


def _read_parquet(path: Path, wanted: Sequence[str]) -> Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        found = pq.read_schema(path).names
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: cannot be read as parquet ({first_line(error)})") from error
    require_columns(str(path), wanted, found)
    return _numbered(str(path), _load("parquet", path, columns=list(wanted)))


def _numbered(where: str, columns: dict[str, list[Any]]) -> Table:
    return Table(where, columns, list(range(1, len(next(iter(columns.values()))) + 1)))


def _load(builder: str, path: Path, **options: Any) -> dict[str, list[Any]]:
    """Read through `datasets`, whose own copy of the file goes away at once: it is found by name, not by content."""
    import datasets
    import pyarrow as pa

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    with tempfile.TemporaryDirectory(prefix=".reading-", dir=cache_folder()) as folder:
        # Not `load_dataset`, which reports every use of a reader, local files too, to the Hub.
        read = getattr(datasets.Dataset, f"from_{builder}")
        try:
            columns: dict[str, list[Any]] = read(
                glob.escape(str(path.absolute())), cache_dir=folder, **options
            ).to_dict()
        except (datasets.exceptions.DatasetsError, pa.ArrowException, OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read as {builder} ({first_line(error.__cause__ or error)})") from error
    return columns


def _require_content(path: Path) -> None:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    if size == 0:
        raise UserError(f"{path}: the file is empty")


def _require_utf8(path: Path) -> None:
    """Name the first row that is not UTF-8; rows of a .csv file are counted below the header."""
    number = 0
    try:
        with path.open("rb") as file:
            for line in file:
                number += 1
                line.decode("utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        row = _csv_row(path) if path.suffix.lower() == ".csv" else number
        place = f"row {row}" if row else "the header"
        raise UserError(f"{path}: {place} is not valid UTF-8 (byte {error.object[error.start]:#04x})") from error


def _csv_row(path: Path) -> int:
    """The record, counted from the header as 0, that holds the first byte that is not UTF-8."""
    with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        records = enumerate(csv.reader(file))
        return next(n for n, record in records if any("\udc80" <= char <= "\udcff" for char in "".join(record)))
