"""One file of rows: read through `datasets`, with the file and the row in every complaint."""

from __future__ import annotations

import csv
import glob
import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from aang_ray.config import DataConfig
from aang_ray.data.cache import cache_folder
from aang_ray.data.pretrained import first_line
from aang_ray.data.splits import normalised
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


# --- data.texts: Texts and labels as read, before they become tokens.


Split = Literal["train", "dev", "test"]
SPLITS: tuple[Split, ...] = ("train", "dev", "test")


@dataclass(frozen=True)
class Texts:
    """N texts, or N pairs of texts."""

    first: Sequence[str]
    second: Sequence[str] | None = None

    def __len__(self) -> int:
        return len(self.first)

    def keys(self) -> list[str]:
        """What each text, or pair, is compared by."""
        if self.second is None:
            return [normalised(text) for text in self.first]
        return [f"{normalised(a)}\x1f{normalised(b)}" for a, b in zip(self.first, self.second, strict=True)]

    def passages(self) -> list[str]:
        """Each text as unlabelled text; the texts of a pair are joined by a space."""
        if self.second is None:
            return list(self.first)
        return [f"{a} {b}" for a, b in zip(self.first, self.second, strict=True)]

    def sides(self) -> Iterable[str]:
        """Every text of every pair, and the pairs as passages."""
        yield from self.passages()
        if self.second is not None:
            yield from self.first
            yield from self.second

    def take(self, indices: Iterable[int]) -> Texts:
        """The chosen texts."""
        chosen = list(indices)
        second = None if self.second is None else [self.second[i] for i in chosen]
        return Texts([self.first[i] for i in chosen], second)


@dataclass(frozen=True)
class LabelledTexts:
    """A split as read, with the place of every row for messages about it."""

    texts: Texts
    labels: Sequence[str]
    where: str
    rows: Sequence[int]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Iterable[int]) -> LabelledTexts:
        """The chosen examples."""
        chosen = list(indices)
        labels, rows = [self.labels[i] for i in chosen], [self.rows[i] for i in chosen]
        return LabelledTexts(self.texts.take(chosen), labels, self.where, rows)


@dataclass(frozen=True)
class RawTask:
    """An end task as read: its splits, and the unlabelled text that its source brings along."""

    splits: dict[Split, LabelledTexts]
    method: str
    """How the splits came about."""
    in_domain: Sequence[str] | None = None


# --- data.validate: From columns of anything to texts with labels; the first thing wrong is said with its file and row.


def wanted_columns(data: DataConfig) -> list[str]:
    """The columns that the configuration names."""
    return [name for name in (data.text, data.text_b, data.label) if name is not None]


def labelled_texts(table: Table, data: DataConfig) -> LabelledTexts:
    """Texts and labels of a table; labels that are integers or booleans become strings.

    Raises:
        UserError: for a table without rows, an empty text, a text that is not text, a label that is
            missing or neither string, integer nor boolean.
    """
    if not table.rows:
        raise UserError(f"{table.where}: there are no rows")
    second = None if data.text_b is None else text_column(table, data.text_b)
    labels = [_label(value, table, i, data.label) for i, value in enumerate(table.columns[data.label])]
    return LabelledTexts(Texts(text_column(table, data.text), second), labels, table.where, table.rows)


def text_column(table: Table, name: str) -> list[str]:
    """A column of texts, each of which is a string with something in it."""
    return [_text(value, table, i, name) for i, value in enumerate(table.columns[name])]


def check_labels(splits: Mapping[Split, LabelledTexts]) -> tuple[str, ...]:
    """The sorted label set, which is train's.

    Raises:
        UserError: for a train split of one class, or a label in dev or test that train lacks.
    """
    train = splits["train"]
    names = sorted(set(train.labels))
    if len(names) < 2:
        raise UserError(f"{train.where}: the train split has one class only ({names[0]!r})")
    for split in ("dev", "test"):
        given = splits[split]
        for row, label in zip(given.rows, given.labels, strict=True):
            if label not in names:
                shown = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
                raise UserError(
                    f"{given.where}: row {row} has the label {label!r}, which train lacks; train has {shown}"
                )
    return tuple(names)


def _text(value: Any, table: Table, index: int, column: str) -> str:
    place = f"{table.where}: row {table.rows[index]}"
    if value is None or (isinstance(value, str) and not value.strip()):
        raise UserError(f"{place} has an empty text (column {column!r})")
    if not isinstance(value, str):
        raise UserError(f"{place}: column {column!r} holds {type(value).__name__}, not text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{place}: column {column!r} is not valid Unicode (a lone surrogate)") from error
    return value


def _label(value: Any, table: Table, index: int, column: str) -> str:
    place = f"{table.where}: row {table.rows[index]}"
    if value is None or value == "":
        raise UserError(f"{place} has no label (column {column!r})")
    if not isinstance(value, str | int):
        raise UserError(
            f"{place}: a label is a string, an integer or a boolean, got {type(value).__name__} (column {column!r}); "
            "multi-label tasks and regression are not supported"
        )
    return str(value)
