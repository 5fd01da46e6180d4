"""From columns of anything to texts with labels; the first thing wrong is said with its file and row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from aang_ray.config import DataConfig
from aang_ray.data.table import Table
from aang_ray.data.texts import LabelledTexts, Split, Texts
from aang_ray.errors import UserError


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
