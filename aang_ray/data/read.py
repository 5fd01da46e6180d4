"""Reads one file of rows, and checks texts and labels. Every error names the file and the row.

CSV is parsed by pandas, Parquet by pyarrow, JSONL one line at a time by `json`: pandas and pyarrow would guess types
(a text that looks like a date becomes one) and fail at columns of mixed types that nobody asked for.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from aang_ray.config import DataConfig
from aang_ray.data.pretrained import first_line
from aang_ray.data.splits import normalised
from aang_ray.errors import UserError

Split = Literal["train", "dev", "test"]
SPLITS: tuple[Split, ...] = ("train", "dev", "test")
SUFFIXES = (".jsonl", ".csv", ".parquet")


class MissingColumn(UserError):
    """A table lacks a column that is needed."""


@dataclass(frozen=True)
class Table:
    """Chosen columns of a file."""

    where: str
    """The file, as error messages name it."""
    columns: dict[str, list[Any]]
    rows: list[int]
    """Number of each row, from 1; in a .jsonl or .txt file, of the line."""


@dataclass(frozen=True)
class Texts:
    """N texts, or N pairs of texts."""

    first: Sequence[str]
    second: Sequence[str] | None = None

    def __len__(self) -> int:
        return len(self.first)

    def keys(self) -> list[str]:
        """Return the normalised form that each text, or pair, is compared by."""
        if self.second is None:
            return [normalised(text) for text in self.first]
        return [f"{normalised(a)}\x1f{normalised(b)}" for a, b in zip(self.first, self.second, strict=True)]

    def passages(self) -> list[str]:
        """Return each text as unlabelled text; the two texts of a pair are joined by a space."""
        if self.second is None:
            return list(self.first)
        return [f"{a} {b}" for a, b in zip(self.first, self.second, strict=True)]

    def sides(self) -> list[str]:
        """Return all passages and, of pairs, also each text by itself."""
        return self.passages() if self.second is None else [*self.passages(), *self.first, *self.second]

    def take(self, indices: Iterable[int]) -> Texts:
        chosen = list(indices)
        second = None if self.second is None else [self.second[i] for i in chosen]
        return Texts([self.first[i] for i in chosen], second)


@dataclass(frozen=True)
class LabelledTexts:
    """A split as read, before tokenisation; `where` and `rows` as in `Table`."""

    texts: Texts
    labels: Sequence[str]
    where: str
    rows: Sequence[int]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Iterable[int]) -> LabelledTexts:
        chosen = list(indices)
        labels, rows = [self.labels[i] for i in chosen], [self.rows[i] for i in chosen]
        return LabelledTexts(self.texts.take(chosen), labels, self.where, rows)


@dataclass(frozen=True)
class RawTask:
    """An end task as read, before tokenisation."""

    splits: dict[Split, LabelledTexts]
    method: str
    """How the splits were made."""
    in_domain: Sequence[str] | None = None
    """Unlabelled text that comes with the task."""


def read_table(path: Path, wanted: Sequence[str]) -> Table:
    """Read the wanted columns of a .jsonl, .csv or .parquet file; others are ignored, whatever they hold.

    Raises:
        MissingColumn: if a column is missing.
        UserError: if the file is empty, cannot be read, is not valid UTF-8 or is malformed.
    """
    match path.suffix.lower():
        case ".jsonl":
            return _read_jsonl(path, wanted)
        case ".csv":
            return _read_csv(path, wanted)
        case ".parquet":
            return _read_parquet(path, wanted)
    raise UserError(f"{path}: a table is a {', '.join(SUFFIXES)} file")


def read_lines(path: Path) -> Table:
    """Read the lines of a text file that are not blank, as the column `text`.

    Raises:
        UserError: if the file is empty, cannot be read or is not valid UTF-8.
    """
    # Not `splitlines`: it would also cut at U+2028 and other characters that occur inside texts.
    lines = io.StringIO(_read_utf8(path), newline=None).read().split("\n")
    rows = [number for number, line in enumerate(lines, start=1) if line.strip()]
    return Table(str(path), {"text": [lines[number - 1] for number in rows]}, rows)


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
    import pandas as pd

    content = _read_utf8(path)
    require_columns(str(path), wanted, next(csv.reader(io.StringIO(content, newline="")), []))
    try:
        # Every cell is text: "NA", "null" and "001" are labels like any other.
        frame = pd.read_csv(io.StringIO(content, newline=""), dtype=object, na_filter=False)
    except ValueError as error:
        raise UserError(f"{path}: cannot be read as csv ({first_line(error)})") from error
    if not isinstance(frame.index, pd.RangeIndex):  # pandas took surplus cells for an index and shifted the columns
        raise UserError(f"{path}: cannot be read as csv (rows have more fields than the header)")
    return Table(str(path), {name: frame[name].tolist() for name in wanted}, list(range(1, len(frame) + 1)))


def _read_parquet(path: Path, wanted: Sequence[str]) -> Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    _require_content(path)
    try:
        with pq.ParquetFile(path) as file:
            require_columns(str(path), wanted, file.schema_arrow.names)
            columns = file.read(columns=list(wanted)).to_pydict()
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: cannot be read as parquet ({first_line(error)})") from error
    return Table(str(path), columns, list(range(1, len(columns[wanted[0]]) + 1)))


def require_columns(where: str, wanted: Sequence[str], found: Sequence[str]) -> None:
    """Check that every wanted column is there once.

    Raises:
        MissingColumn: if one is missing.
        UserError: if one is there more than once.
    """
    for name in wanted:
        columns = f"{name!r}; columns found: {', '.join(found) or 'none'}"
        if name not in found:
            raise MissingColumn(f"{where}: no column {columns}")
        if found.count(name) > 1:
            raise UserError(f"{where}: more than one column {columns}")


def _require_content(path: Path) -> None:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    if size == 0:
        raise UserError(f"{path}: the file is empty")


def _read_utf8(path: Path) -> str:
    """Return a file's content without a byte-order mark; an error names the first row that is not UTF-8."""
    _require_content(path)
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        before = error.object[: error.start].decode()
        if path.suffix.lower() == ".csv":
            # Quoted cells may hold line breaks: count the records up to the bad byte ("?"). The header is record 0.
            row = len(list(csv.reader(io.StringIO(f"{before}?", newline="")))) - 1
        else:
            row = before.count("\n") + 1
        place = f"row {row}" if row else "the header"
        raise UserError(f"{path}: {place} is not valid UTF-8 (byte {error.object[error.start]:#04x})") from error


def wanted_columns(data: DataConfig) -> list[str]:
    """Return the columns that the configuration names."""
    return [name for name in (data.text, data.text_b, data.label) if name is not None]


def labelled_texts(table: Table, data: DataConfig) -> LabelledTexts:
    """Return the checked texts and labels of a table. Integers and booleans become strings as labels.

    Raises:
        UserError: if there are no rows, a text is empty or no string, or a label is no string, integer or boolean.
    """
    if not table.rows:
        raise UserError(f"{table.where}: there are no rows")
    second = None if data.text_b is None else text_column(table, data.text_b)
    texts = Texts(text_column(table, data.text), second)
    for row, value in zip(table.rows, table.columns[data.label], strict=True):
        place = f"{table.where}: row {row}"
        if value is None or value == "":
            raise UserError(f"{place} has no label (column {data.label!r})")
        if not isinstance(value, str | int):
            raise UserError(
                f"{place}: a label is a string, an integer or a boolean, got {type(value).__name__} "
                f"(column {data.label!r}); multi-label tasks and regression are not supported"
            )
    return LabelledTexts(texts, [str(value) for value in table.columns[data.label]], table.where, table.rows)


def text_column(table: Table, name: str) -> list[str]:
    """Return a column of texts.

    Raises:
        UserError: if a value is empty, no string, or a string that UTF-8 cannot encode.
    """
    for row, value in zip(table.rows, table.columns[name], strict=True):
        place = f"{table.where}: row {row}"
        if value is None or (isinstance(value, str) and not value.strip()):
            raise UserError(f"{place} has an empty text (column {name!r})")
        if not isinstance(value, str):
            raise UserError(f"{place}: column {name!r} holds {type(value).__name__}, not text")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"{place}: column {name!r} is not valid Unicode (a lone surrogate)") from error
    return table.columns[name]


def check_labels(splits: Mapping[Split, LabelledTexts]) -> tuple[str, ...]:
    """Return the sorted label set of train, which the other splits must keep to.

    Raises:
        UserError: if train has a single class, or dev or test has a label that train lacks.
    """
    train = splits["train"]
    names = sorted(set(train.labels))
    if len(names) < 2:
        raise UserError(f"{train.where}: the train split has one class only ({names[0]!r})")
    for split in (splits["dev"], splits["test"]):
        for row, label in zip(split.rows, split.labels, strict=True):
            if label not in names:
                shown = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
                raise UserError(
                    f"{split.where}: row {row} has the label {label!r}, which train lacks; train has {shown}"
                )
    return tuple(names)
