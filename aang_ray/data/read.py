"""Reads one file of rows, and checks texts and labels. Every error names the file and the row.

CSV is parsed by pandas, Parquet by pyarrow, JSONL one line at a time by `json`: pandas and pyarrow would guess types
(a text that looks like a date becomes one) and fail at columns of mixed types that nobody asked for.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from aang_ray.config import DataConfig
from aang_ray.config.load import shown
from aang_ray.data.pretrained import first_line
from aang_ray.data.splits import normalised
from aang_ray.errors import UserError

Split = Literal["train", "dev", "test"]
SPLITS: tuple[Split, ...] = ("train", "dev", "test")
SUFFIXES = (".jsonl", ".csv", ".parquet")
_ROWS, _NAMES = 5, 20
"""How many rows (of how many kinds) and labels a message names."""


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
    dropped: int = 0
    """Number of rows that `data.bad_rows` has left out."""


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
    wrong: list[tuple[int, str]] = []
    for index, line in enumerate(lines.columns["text"]):
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            wrong.append((index, f"no valid JSON ({error.msg})"))
            continue
        except RecursionError:
            wrong.append((index, "no valid JSON (nested too deeply)"))
            continue
        except ValueError:  # Python refuses to read numbers of more than 4,300 digits
            wrong.append((index, "no valid JSON (a number of too many digits)"))
            continue
        if isinstance(value, dict):
            objects.append(value)
        else:
            wrong.append((index, "no JSON object"))
    _without(wrong, str(path), lines.rows)
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
    columns = {name: frame[name].tolist() for name in wanted}
    _refuse_swallowed_rows(path, list(frame.columns), columns, wanted)
    return Table(str(path), columns, list(range(1, len(frame) + 1)))


def _refuse_swallowed_rows(
    path: Path, header: list[str], columns: Mapping[str, list[str]], wanted: Sequence[str]
) -> None:
    """Refuse a cell that holds whole rows: the quote before them is not closed, and a later one has ended the cell.

    A line inside a cell counts as a row if it has as many fields as the header, and a label that other rows have, too.
    """
    at = header.index(wanted[-1])  # the label, or the only column of unlabelled text
    labels = set(columns[wanted[-1]])
    for row, cells in enumerate(zip(*columns.values(), strict=True), start=1):
        lines = [line for cell in cells if "\n" in cell for line in cell.split("\n")[1:-1]]
        found = [fields for fields in csv.reader(lines) if len(fields) == len(header) > 1 and fields[at] in labels]
        if found:
            raise UserError(f"{path}: row {row}: a quote is not closed, its text holds {len(found)} whole rows")


def _read_parquet(path: Path, wanted: Sequence[str]) -> Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    _require_content(path)
    try:
        with pq.ParquetFile(path) as file:
            require_columns(str(path), wanted, file.schema_arrow.names)
            columns = file.read(columns=list(wanted)).to_pydict()
    except (pa.ArrowException, OSError, ValueError, OverflowError, LookupError) as error:
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
    """Return the texts and labels of a table. Integers and booleans become strings as labels.

    Raises:
        UserError: if there are no rows; or a text is empty or no string, or a label is no string, integer or boolean,
            unless `data.bad_rows` drops these rows.
    """
    wrong = [*_wrong_texts(table, data.text), *(() if data.text_b is None else _wrong_texts(table, data.text_b))]
    column = f"(column {data.label!r})"
    for index, value in enumerate(table.columns[data.label]):
        if value is None or value == "":
            wrong.append((index, f"no label {column}"))
        elif not isinstance(value, str | int):
            wrong.append((index, f"a label of type {type(value).__name__} {column}; {_LABELS}"))
    rows = _without(wrong, table.where, table.rows, drop=data.bad_rows == "drop")
    second = None if data.text_b is None else table.columns[data.text_b]
    labels = [str(value) for value in table.columns[data.label]]
    return LabelledTexts(Texts(table.columns[data.text], second), labels, table.where, table.rows).take(rows)


_LABELS = "a label is a string, an integer or a boolean; multi-label tasks and regression are not supported"


def text_column(table: Table, name: str) -> list[str]:
    """Return a column of texts.

    Raises:
        UserError: if there are no rows, or a value is empty, no string, or a string that UTF-8 cannot encode.
    """
    _without(_wrong_texts(table, name), table.where, table.rows)
    return table.columns[name]


def _wrong_texts(table: Table, name: str) -> Iterator[tuple[int, str]]:
    """Yield the index of each value of a column that is no text, and what it is."""
    for index, value in enumerate(table.columns[name]):
        if value is None or (isinstance(value, str) and not value.strip()):
            yield index, f"an empty text (column {name!r})"
        elif not isinstance(value, str):
            yield index, f"{type(value).__name__} in place of a text (column {name!r})"
        elif any("\ud800" <= letter <= "\udfff" for letter in value):
            yield index, f"a text that is not valid Unicode, a lone surrogate (column {name!r})"


def _without(wrong: Iterable[tuple[int, str]], where: str, rows: Sequence[int], drop: bool | None = None) -> list[int]:
    """Return the indices of the rows that are not wrong.

    Args:
        wrong: Index of a row, and what is wrong with it.
        where: The file, for messages.
        rows: Number of each row in the file.
        drop: Whether wrong rows are left out; else they are an error, which tells all rows of a kind at once. None: no
            setting could leave them out.

    Raises:
        UserError: if there are wrong rows, or no others.
    """
    kinds: dict[str, list[int]] = {}
    for index, kind in wrong:
        kinds.setdefault(kind, []).append(index)
    if kinds and not drop:
        several = [f"{_rows([rows[index] for index in found])} {kind}" for kind, found in kinds.items()]
        more = f"; and {len(several) - _ROWS:,} more such labels or kinds" if len(several) > _ROWS else ""
        told = "; ".join(several[:_ROWS]) + more
        hint = "" if drop is None else " (data.bad_rows=drop leaves such rows out)"
        raise UserError(f"{where}: {told}{hint}")
    left = sorted(set(range(len(rows))).difference(*kinds.values()))
    if not left:
        raise UserError(f"{where}: there are no rows{' that can be used' if rows else ''}")
    return left


def _rows(numbers: Sequence[int]) -> str:
    """Return `row 3 has`, or `7 rows (1, 2, 5, 8, 9, ...) have`."""
    if len(numbers) == 1:
        return f"row {numbers[0]} has"
    return f"{len(numbers)} rows ({', '.join(map(str, numbers[:_ROWS]))}{', ...' if len(numbers) > _ROWS else ''}) have"


def check_labels(
    splits: Mapping[Split, LabelledTexts], data: DataConfig
) -> tuple[tuple[str, ...], dict[Split, LabelledTexts]]:
    """Return the sorted label set of train, which the other splits must keep to, and the splits.

    Raises:
        UserError: if train has a single class; or dev or test has a label that train lacks, unless `data.bad_rows`
            drops these rows.
    """
    train = splits["train"]
    names = sorted(set(train.labels))
    if len(names) < 2:
        raise UserError(f"{train.where}: the train split has one class only ({names[0]!r})")
    allowed = ", ".join(names[:_NAMES]) + (", ..." if len(names) > _NAMES else "")
    known, checked = set(names), dict(splits)
    for name in ("dev", "test"):
        split = splits[name]
        wrong = [
            (index, f"the label {shown(label)}, which train lacks; train has {allowed}")
            for index, label in enumerate(split.labels)
            if label not in known
        ]
        checked[name] = split.take(_without(wrong, split.where, split.rows, drop=data.bad_rows == "drop"))
    return tuple(names), checked
