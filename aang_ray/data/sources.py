"""Finds what `data.task` names, and reads its texts: a built-in task, a folder, one labelled file or a Hub dataset."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from aang_ray.config import DataConfig
from aang_ray.config.load import require_file
from aang_ray.data.cache import cache_folder
from aang_ray.data.embedded import read_embedded
from aang_ray.data.pretrained import first_line, looks_like_path, require_on_hub
from aang_ray.data.read import (
    SPLITS,
    SUFFIXES,
    RawTask,
    Split,
    Table,
    labelled_texts,
    read_lines,
    read_table,
    require_columns,
    text_column,
    wanted_columns,
)
from aang_ray.data.splits import SPLIT_METHOD, split_one
from aang_ray.data.tasks import CARDS, Corpus, card_named
from aang_ray.errors import UserError

_SPLIT_NAMES: Mapping[Split, tuple[str, ...]] = {
    "train": ("train",),
    "dev": ("dev", "validation", "valid"),
    "test": ("test",),
}
"""Accepted names of each split in a folder or on the Hub."""
_CORPUS_NAMES: Mapping[Corpus, tuple[str, ...]] = {
    "in_domain": ("domain", "in_domain"),
    "out_of_domain": ("out_of_domain",),
}
_CORPUS_SUFFIXES = (".txt", *SUFFIXES)


@dataclass(frozen=True)
class Source:
    """Where an end task comes from."""

    kind: Literal["embedded", "folder", "saved", "file", "hub"]
    """`saved`: a folder that `save_to_disk` of the library `datasets` wrote, or with `data/SPLIT-*.parquet`, as on the
    Hub."""
    name: str
    """What the end task is called in results."""
    place: str
    """The folder, the file, the Hub id or the built-in name."""
    splits: Mapping[Split, Path]
    """Files of the splits of a folder."""
    corpora: Mapping[Corpus, Path]
    """Files of unlabelled text. Those of the configuration replace those found in the task's folder."""

    @property
    def hub(self) -> tuple[str, str | None, str]:
        """Return name, configuration and revision of `NAME[:CONFIGURATION][@REVISION]`."""
        rest, _, revision = self.place.partition("@")
        name, _, configuration = rest.partition(":")
        return name, configuration or None, revision or "main"


def find_source(data: DataConfig) -> Source:
    """Find what `data.task` names, without reading it: built-in tasks first, then folders and files, then the Hub.

    Raises:
        UserError: if a path does not exist, a folder lacks a split, a corpus does not exist, or the data of a built-in
            task are not part of the program and have to be given.
    """
    card, path = card_named(data.task), Path(data.task).expanduser()
    given = _given_corpora(data)
    if card is not None and card.embedded:
        return Source("embedded", card.name, card.name, {}, given)
    if data.task.strip() and path.is_dir():
        corpora = {kind: _one_file(path, names, _CORPUS_SUFFIXES) for kind, names in _CORPUS_NAMES.items()}
        found = {kind: file for kind, file in corpora.items() if file is not None}
        folder_card = card_named(path.absolute().name)
        name = folder_card.name if folder_card else path.absolute().name
        if _is_saved(path):
            return Source("saved", name, str(path), {}, found | given)
        return Source("folder", name, str(path), _split_files(path), found | given)
    if data.task.strip():
        require_file(path, f"data.task: {data.task}")
    if path.is_file():
        if path.suffix.lower() not in SUFFIXES:
            raise UserError(f"data.task: {data.task} is not a {', '.join(SUFFIXES)} file")
        return Source("file", path.stem, str(path), {}, given)
    if card is not None:
        raise UserError(
            f"data.task: the data of {data.task!r} are not part of this program ({card.origin}; {card.source}): "
            f"give a folder called {card.name} with train, dev and test as .jsonl, .csv or .parquet"
        )
    if looks_like_path(data.task) or path.suffix.lower() in SUFFIXES:
        raise UserError(f"data.task: there is no file or folder {data.task}; built-in tasks: {', '.join(CARDS)}")
    return Source("hub", data.task, data.task, {}, given)


def _is_saved(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")) or any(
        folder.glob("data/*.parquet")
    )


def _given_corpora(data: DataConfig) -> dict[Corpus, Path]:
    named: dict[Corpus, str | None] = {"in_domain": data.in_domain, "out_of_domain": data.out_of_domain}
    paths = {kind: Path(name).expanduser() for kind, name in named.items() if name is not None}
    for kind, path in paths.items():
        require_file(path, f"data.{kind}: {named[kind]}")
        if not path.is_file():
            raise UserError(f"data.{kind}: there is no file {named[kind]}")
        if path.suffix.lower() not in _CORPUS_SUFFIXES:
            raise UserError(f"data.{kind}: not a {', '.join(_CORPUS_SUFFIXES)} file: {named[kind]}")
    return paths


def _split_files(folder: Path) -> dict[Split, Path]:
    files: dict[Split, Path] = {}
    for split in SPLITS:
        file = _one_file(folder, _SPLIT_NAMES[split], SUFFIXES)
        if file is None:
            found = ", ".join(sorted(p.name for p in folder.iterdir())) or "nothing"
            names = " or ".join(f"{split}{suffix}" for suffix in SUFFIXES)
            raise UserError(f"{folder}: the split {split} is missing ({names}); found: {found}")
        files[split] = file
    return files


def _one_file(folder: Path, names: tuple[str, ...], suffixes: tuple[str, ...]) -> Path | None:
    found = [path for name in names for suffix in suffixes if (path := folder / f"{name}{suffix}").exists()]
    for path in found:
        require_file(path, str(path))
    if len(found) > 1:
        raise UserError(f"{folder}: only one of {', '.join(path.name for path in found)} may be there; remove the rest")
    return found[0] if found else None


def read_task(source: Source, data: DataConfig) -> RawTask:
    """Read the train, dev and test texts of an end task, with the columns and the split of `data`.

    Raises:
        UserError: for anything wrong with the data, with the file and the row.
    """
    if source.kind == "embedded":
        if data.text_b is not None:
            raise UserError(f"data.text_b: {source.name} has one text an example; leave it out")
        return read_embedded(source.name)
    wanted = wanted_columns(data)
    found: Mapping[Split, Table] | Table
    match source.kind:
        case "folder":
            found = {split: read_table(path, wanted) for split, path in source.splits.items()}
        case "file":
            found = read_table(Path(source.place), wanted)
        case "hub":
            found = read_hub(source, wanted)
        case "saved":
            found = read_saved(Path(source.place), wanted)
    if not isinstance(found, Table):
        splits = {split: labelled_texts(table, data) for split, table in found.items()}
        dropped = sum(len(table.rows) - len(splits[split]) for split, table in found.items())
        return RawTask(splits, "given", dropped=dropped)
    whole = labelled_texts(found, data)
    try:
        parts = split_one(whole.texts.keys(), whole.labels, data.dev_fraction, data.test_fraction, data.split_seed)
    except UserError as error:
        raise UserError(f"{found.where}: {error}") from None
    splits = {split: whole.take(part) for split, part in zip(SPLITS, parts, strict=True)}
    return RawTask(splits, SPLIT_METHOD, dropped=len(found.rows) - len(whole))


def read_passages(path: Path, column: str) -> list[str]:
    """Read unlabelled text: the lines of a .txt file, or the text column of a table.

    Raises:
        UserError: if the file cannot be read, has no such column, or a table has an empty text.
    """
    if path.suffix.lower() == ".txt":
        return text_column(read_lines(path), "text")
    return text_column(read_table(path, [column]), column)


def read_hub(source: Source, wanted: Sequence[str]) -> dict[Split, Table] | Table:
    """Download a Hub dataset: the three splits, or one table if it has a single split.

    Raises:
        UserError: if it cannot be loaded, or lacks a split or a column.
    """
    import datasets  # late: takes two seconds to import

    name, configuration, revision = source.hub
    instead = f"give a folder, a file or a built-in task ({', '.join(CARDS)})"
    require_on_hub("dataset", name, revision, f"data.task {source.place!r}", instead)
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    folder = str(cache_folder() / "datasets")
    try:
        loaded = datasets.load_dataset(name, configuration, revision=revision, cache_dir=folder)
    except (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError) as error:
        raise UserError(f"data.task: the dataset {source.place!r} could not be loaded ({first_line(error)})") from error
    return hub_tables(source.place, loaded, wanted)


def read_saved(folder: Path, wanted: Sequence[str]) -> dict[Split, Table] | Table:
    """Read a folder that the library `datasets` or a Hub dataset has left; returns and raises as `read_hub`."""
    import datasets  # late: takes two seconds to import

    datasets.disable_progress_bars()
    shards: dict[str, list[str]] = {}
    for path in sorted(folder.glob("data/*.parquet")):
        shards.setdefault(re.split(r"[-.]", path.name)[0], []).append(str(path))
    try:
        if shards:
            cache = str(cache_folder() / "datasets")
            loaded = {split: datasets.Dataset.from_parquet(files, cache_dir=cache) for split, files in shards.items()}
        else:
            loaded = datasets.load_from_disk(str(folder))
    except (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError, KeyError) as error:
        raise UserError(f"data.task: {folder} could not be read as a saved dataset ({first_line(error)})") from error
    return hub_tables(str(folder), {"train": loaded} if isinstance(loaded, datasets.Dataset) else loaded, wanted)


def hub_tables(where: str, loaded: Mapping[str, Any], wanted: Sequence[str]) -> dict[Split, Table] | Table:
    """Turn a mapping from split names to `datasets.Dataset` into tables; a single split becomes one table.

    Raises:
        UserError: if a split or a column is missing.
    """
    if len(loaded) == 1:
        return _hub_table(where, next(iter(loaded.values())), wanted)
    tables: dict[Split, Table] = {}
    for split, names in _SPLIT_NAMES.items():
        called = next((name for name in names if name in loaded), None)
        if called is None:
            raise UserError(f"{where}: the split {split} is missing ({' or '.join(names)}); found: {', '.join(loaded)}")
        tables[split] = _hub_table(f"{where} {called}", loaded[called], wanted)
    return tables


def _hub_table(where: str, dataset: Any, wanted: Sequence[str]) -> Table:
    """Return columns of values. Class labels are replaced by their names, and -1 (the Hub's "no label") by None."""
    require_columns(where, wanted, dataset.column_names)
    columns: dict[str, list[Any]] = dataset.select_columns(list(wanted)).to_dict()
    for name in wanted:
        class_names = getattr(dataset.features[name], "names", None)
        if class_names is not None:
            columns[name] = [None if v is None or v < 0 else class_names[v] for v in columns[name]]
    return Table(where, columns, list(range(1, len(dataset) + 1)))
