"""An end task that is a dataset on the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from aang_ray.data.cache import cache_folder
from aang_ray.data.cards import CARDS
from aang_ray.data.hub import first_line, require_on_hub
from aang_ray.data.source import SPLIT_NAMES, Source
from aang_ray.data.table import Table, require_columns
from aang_ray.data.texts import Split
from aang_ray.errors import UserError


def read_hub(source: Source, wanted: Sequence[str]) -> dict[Split, Table] | Table:
    """The three splits of a Hub dataset, or the single table of one that has a single split.

    Raises:
        UserError: where it cannot be loaded, lacks a split or a column.
    """
    import datasets

    name, configuration, revision = source.hub
    texts, images = (", ".join(n for n, card in CARDS.items() if card.images is kind) for kind in (False, True))
    instead = f"give a folder, a file or a built-in task ({texts}; of images: {images})"
    require_on_hub("dataset", name, revision, instead)
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    folder = str(cache_folder() / "datasets")
    try:
        loaded = datasets.load_dataset(name, configuration, revision=revision, cache_dir=folder)
    except (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError) as error:
        raise UserError(f"data.task: the dataset {source.place!r} could not be loaded ({first_line(error)})") from error
    return hub_tables(source.place, loaded, wanted)


def hub_tables(where: str, loaded: Mapping[str, Any], wanted: Sequence[str]) -> dict[Split, Table] | Table:
    """Tables of a mapping from split names to `datasets.Dataset`.

    Raises:
        UserError: for a split or a column that is missing.
    """
    if len(loaded) == 1:
        return _table(where, next(iter(loaded.values())), wanted)
    tables: dict[Split, Table] = {}
    for split, names in SPLIT_NAMES.items():
        called = next((name for name in names if name in loaded), None)
        if called is None:
            raise UserError(f"{where}: the split {split} is missing ({' or '.join(names)}); found: {', '.join(loaded)}")
        tables[split] = _table(f"{where} {called}", loaded[called], wanted)
    return tables


def _table(where: str, dataset: Any, wanted: Sequence[str]) -> Table:
    """Columns as values; class labels by their names, -1 (no label) as None."""
    require_columns(where, wanted, dataset.column_names)
    columns: dict[str, list[Any]] = dataset.select_columns(list(wanted)).to_dict()
    for name in wanted:
        class_names = getattr(dataset.features[name], "names", None)
        if class_names is not None:
            columns[name] = [None if v is None or v < 0 else class_names[v] for v in columns[name]]
    return Table(where, columns, list(range(1, len(dataset) + 1)))
