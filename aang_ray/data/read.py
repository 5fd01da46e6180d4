"""An end task's texts from wherever they lie, checked, and its unlabelled text."""

from __future__ import annotations

from pathlib import Path

from aang_ray.config import DataConfig
from aang_ray.data.embedded import read_embedded
from aang_ray.data.hub_task import read_hub
from aang_ray.data.source import Source
from aang_ray.data.splits import SPLIT_METHOD, split_one
from aang_ray.data.table import Table, read_lines, read_table
from aang_ray.data.texts import LabelledTexts, RawTask
from aang_ray.data.validate import labelled_texts, text_column, wanted_columns
from aang_ray.errors import UserError


def read_task(source: Source, data: DataConfig) -> RawTask:
    """Train, dev and test of an end task.

    Raises:
        UserError: for anything wrong with the data, with the file and the row.
    """
    if source.kind == "embedded":
        if data.text_b is not None:
            raise UserError(f"data.text_b: {source.name} has one text an example; leave it out")
        return read_embedded(source.name)
    wanted = wanted_columns(data)
    if source.kind == "folder":
        tables = {split: read_table(path, wanted) for split, path in source.splits.items()}
        return RawTask({split: labelled_texts(table, data) for split, table in tables.items()}, "given")
    found = read_table(Path(source.place), wanted) if source.kind == "file" else read_hub(source, wanted)
    if isinstance(found, Table):
        return _split(labelled_texts(found, data), data)
    return RawTask({split: labelled_texts(table, data) for split, table in found.items()}, "given")


def read_passages(path: Path, column: str) -> list[str]:
    """Unlabelled text: the lines of a .txt file, or the text column of a table.

    Raises:
        UserError: for a file that cannot be read, has no such column, or an empty text in a table.
    """
    if path.suffix.lower() == ".txt":
        return text_column(read_lines(path), "text")
    return text_column(read_table(path, [column]), column)


def _split(whole: LabelledTexts, data: DataConfig) -> RawTask:
    train, dev, test = split_one(
        whole.texts.keys(), whole.labels, data.dev_fraction, data.test_fraction, data.split_seed
    )
    parts = {"train": whole.take(train), "dev": whole.take(dev), "test": whole.take(test)}
    return RawTask({split: parts[split] for split in ("train", "dev", "test")}, SPLIT_METHOD)
