"""Classify the texts of a stream: rows are read, classified and written a block at a time."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from io import TextIOWrapper
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TextIO

from aang_ray.errors import UserError
from aang_ray.train.export import Classifier

BLOCK = 2048
"""Texts that are read before they are classified: sorted by length, they need little padding."""
DIGITS = 6
"""Decimal places of the probabilities."""
Form = Literal["jsonl", "csv", "lines"]


def form_of(path: Path | None) -> Form:
    """Return the form of an input by its ending: JSON lines, CSV, or else one text a line, as on stdin.

    Raises:
        UserError: For a Parquet file, which is no stream.
    """
    suffix = "" if path is None else path.suffix.lower()
    if suffix == ".parquet":
        raise UserError(f"--input {path}: give a .jsonl or .csv file, or one text a line")
    return "jsonl" if suffix == ".jsonl" else "csv" if suffix == ".csv" else "lines"


def read_rows(stream: Iterable[str], form: Form, columns: tuple[str, ...], where: str) -> Iterator[tuple[str, ...]]:
    """Yield the text, or the two texts, of every row. Blank lines are no rows.

    Args:
        stream: The lines.
        form: `jsonl`, `csv` (with a header), or `lines`: one text a line, the two texts of a pair separated by a tab.
        columns: Names of one column, or of two for pairs.
        where: Names the input in messages.

    Raises:
        UserError: For the first row that is malformed, or lacks a text; it says which.
    """
    yield from _checked(_rows(stream, form, columns, where), columns, where)


def _checked(
    rows: Iterable[tuple[int, tuple[Any, ...]]], columns: tuple[str, ...], where: str
) -> Iterator[tuple[str, ...]]:
    """Yield rows whose cells are all texts. The arguments are those of `read_rows`."""
    try:
        for number, row in rows:
            for name, text in zip(columns, row, strict=True):
                if not isinstance(text, str):
                    found = "has no text" if text is None else f"has {json.dumps(text)[:40]}, which is no text,"
                    raise UserError(f"{where}: row {number} {found} in column {name!r}")
            yield row
    except csv.Error as error:
        raise UserError(f"{where}: cannot be read as csv ({error})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: is not valid UTF-8 (byte {error.object[error.start]:#04x})") from error


def _rows(
    stream: Iterable[str], form: Form, columns: tuple[str, ...], where: str
) -> Iterator[tuple[int, tuple[Any, ...]]]:
    """Yield the number of each row, from 1 (in CSV without the header), and its cells."""
    if form == "csv":
        # One text may be longer than the default allows.
        csv.field_size_limit(2**31 - 1)
        reader = csv.DictReader(stream)
        missing = [name for name in columns if name not in (reader.fieldnames or ())]
        if missing:
            there = ", ".join(reader.fieldnames or ()) or "none"
            raise UserError(f"{where}: no column {missing[0]!r}; columns found: {there}")
        for number, cells in enumerate(reader, start=1):
            yield number, tuple(cells[name] for name in columns)
        return
    for number, line in enumerate(stream, start=1):
        text = line.rstrip("\r\n")
        if not text.strip():
            continue
        if form == "jsonl":
            yield number, _object(text, columns, f"{where}: row {number}")
        else:
            parts = tuple(text.split("\t")) if len(columns) > 1 else (text,)
            if len(parts) != len(columns):
                raise UserError(f"{where}: row {number} has {len(parts)} parts; a pair is two texts with a tab between")
            yield number, parts


def _object(line: str, columns: tuple[str, ...], where: str) -> tuple[Any, ...]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is no valid JSON ({getattr(error, 'msg', 'nested too deeply')})") from error
    if not isinstance(value, dict):
        raise UserError(f"{where} is no JSON object")
    return tuple(value.get(name) for name in columns)


@dataclass(frozen=True)
class LabelledRows:
    """The rows of a file."""

    rows: list[tuple[str, ...]]
    """The text, or the two texts, of each row."""
    labels: list[str] | None
    """The true labels; None: the file has none."""


def read_labelled(path: Path, columns: tuple[str, ...], label: str | None, default: str, form: Form) -> LabelledRows:
    """Return all rows of a file, with their labels if it has them.

    Args:
        path: The file.
        columns: Names of one column of text, or of two for pairs.
        label: Column of the labels, which must be there; None: `default`, if the first row has it.
        default: See `label`.
        form: The form of the file. One of lines has no labels.

    Raises:
        UserError: For a file that cannot be read or is empty, or a row that is malformed, or lacks a text or a label.
    """
    where, named = str(path), label or default
    if form == "lines" and label is not None:
        raise UserError(f"--label {label}: {path} has one text a line and no columns")
    try:
        with path.open(encoding="utf-8-sig", newline="" if form == "csv" else "\n") as stream:
            if form != "lines" and (label is not None or _first_row_has(stream, form, named)):
                stream.seek(0)
                found = list(_labelled(stream, form, columns, named, where))
                rows, labels = [row for row, _ in found], [one for _, one in found]
            else:
                stream.seek(0)
                rows, labels = list(read_rows(stream, form, columns, where)), None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    if not rows:
        raise UserError(f"{path}: has no rows")
    return LabelledRows(rows, labels)


def _first_row_has(stream: TextIO, form: Form, column: str) -> bool:
    first = next((line for line in stream if line.strip()), "")
    if form == "csv":
        return column in next(csv.reader([first]), [])
    try:
        found = json.loads(first)
    except (ValueError, RecursionError):
        return False  # the reader of the rows says what is wrong
    return isinstance(found, dict) and column in found


def _labelled(
    stream: TextIO, form: Form, columns: tuple[str, ...], label: str, where: str
) -> Iterator[tuple[tuple[str, ...], str]]:
    labels: list[Any] = []

    def texts_alone() -> Iterator[tuple[int, tuple[Any, ...]]]:
        for number, cells in _rows(stream, form, (*columns, label), where):
            labels.append(cells[-1])
            yield number, cells[:-1]

    for number, row in enumerate(_checked(texts_alone(), columns, where), start=1):
        if not isinstance(labels[-1], str | int) or labels[-1] == "":
            raise UserError(f"{where}: row {number} has no label in column {label!r}")
        yield row, str(labels[-1])


def compare_models(
    first: Classifier,
    second: Classifier,
    path: Path,
    form: Form | None,
    columns: tuple[str | None, str | None, str | None],
) -> tuple[LabelledRows, list[tuple[list[str], Any]]]:
    """Classify the rows of a file with two models.

    Args:
        first, second: The models.
        path: The file.
        form: Its form; None: by its ending.
        columns: Names of the columns of the text, the second text and the label; None: those of the first model's task.

    Returns:
        The rows, and of each model the labels and the probabilities [E, C] that it gives them.

    Raises:
        UserError: One model is of pairs and the other is not, or the file cannot be used.
    """
    pairs = first.card["text_pairs"]
    if second.card["text_pairs"] != pairs:
        raise UserError("compare: one model classifies pairs of texts, the other single texts")
    data = first.card["result"]["config"]["data"]
    read = read_labelled(path, _text_columns(first, columns[:2]), columns[2], data["label"], form or form_of(path))
    texts: Any = [row if pairs else row[0] for row in read.rows]
    if read.labels is not None and not {*read.labels} & {*first.labels, *second.labels}:
        raise UserError(
            f"{path}: none of its labels is one of the models'; it has {', '.join(sorted({*read.labels})[:5])}, the "
            f"first model {', '.join(first.labels[:5])}"
        )
    return read, [model.predict(texts) for model in (first, second)]


def _text_columns(classifier: Classifier, columns: tuple[str | None, str | None]) -> tuple[str, ...]:
    """Return the names of the columns of a model's texts: those that are given, else those of its task."""
    data = classifier.card["result"]["config"]["data"]
    if classifier.card["text_pairs"]:
        return columns[0] or data["text"], columns[1] or data["text_b"]
    if columns[1] is not None:
        raise UserError(f"--text-b {columns[1]}: this model was trained on single texts")
    return (columns[0] or data["text"],)


def predict_stream(
    classifier: Classifier,
    path: Path | None,
    output: TextIO,
    form: Form | None = None,
    columns: tuple[str | None, str | None] = (None, None),
) -> int:
    """Classify all rows of an input, and write one JSON line for each, in order. A bar on stderr shows how far it is.

    Args:
        classifier: The model.
        path: The input; None: stdin.
        output: Gets `{"text": ..., "label": ..., "probabilities": {LABEL: ...}}`, with `text_b` for pairs.
        form: The form of the input; None: by its ending.
        columns: Names of the columns of the text and of the second text; None: those of the model's task.

    Returns:
        The number of rows.

    Raises:
        UserError: For an input that cannot be read, or is malformed.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    form = form or form_of(path)
    names = _text_columns(classifier, columns)
    console = Console(stderr=True)
    # Where the answers go to the same terminal, they show the progress, and a bar would be mixed with them.
    hidden = not console.is_terminal or output.isatty()
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[texts]:,} texts"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=hidden,
    )
    rows = 0
    with ExitStack() as stack:
        stack.enter_context(bar)
        job = bar.add_task("classifying", total=None, texts=0)
        how: dict[str, Any] = {"encoding": "utf-8-sig", "newline": "" if form == "csv" else "\n"}
        if path is None:
            stream: Any = TextIOWrapper(sys.stdin.buffer, **how)
        else:
            try:
                bar.update(job, total=path.stat().st_size)
                stream = stack.enter_context(bar.open(path, "r", task_id=job, **how))
            except OSError as error:
                raise UserError(f"--input {path}: {error.strerror}") from error
        found = read_rows(stream, form, names, str(path or "stdin"))
        while block := tuple(islice(found, BLOCK)):
            _write(classifier, block, output)
            rows += len(block)
            bar.update(job, texts=rows)
    return rows


def _write(classifier: Classifier, block: tuple[tuple[str, ...], ...], output: TextIO) -> None:
    pairs = classifier.card["text_pairs"]
    labels, probabilities_EC = classifier.predict([row if pairs else row[0] for row in block])  # type: ignore[arg-type]
    for row, label, probabilities_C in zip(block, labels, probabilities_EC.tolist(), strict=True):
        answer = {
            **dict(zip(("text", "text_b"), row, strict=False)),
            "label": label,
            "probabilities": {
                name: round(value, DIGITS) for name, value in zip(classifier.labels, probabilities_C, strict=True)
            },
        }
        output.write(json.dumps(answer, ensure_ascii=False) + "\n")
    output.flush()
