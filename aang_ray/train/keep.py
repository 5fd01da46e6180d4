"""Models that a sweep keeps in its store, so that their export needs no training.

`<store>/.models/<cell>.tar` holds the folder that `export_model` writes. One file appears whole or not at all on any
filesystem. While a sweep runs, the best seed so far of each configuration is kept: which configuration will be the best
of its row is known at the end. Then `keep_only` removes the others.
"""

from __future__ import annotations

import io
import tarfile
import tempfile
from collections.abc import Collection
from pathlib import Path

from pyarrow import fs

from aang_ray.errors import UserError
from aang_ray.store import CellRecord, Store
from aang_ray.store.files import Location, NotWritten, new_folder, open_location, publish, remove
from aang_ray.train.export import export_model
from aang_ray.train.setup import Setup

FOLDER, SUFFIX = ".models", ".tar"


def keep_model(store: str, setup: Setup, record: CellRecord) -> None:
    """Keep the model of a finished run, unless a better seed of its configuration has a kept one.

    Args:
        store: URI of the store, which has the row of the run.
        setup: The parts of the run, with its best model.
        record: Its record.

    Raises:
        NotWritten: The store takes no more files.
    """
    location = open_location(store)
    better = _best(Store(store), record.result.group, {*kept_models(location), record.result.cell})
    if better != record.result.cell:
        return
    with tempfile.TemporaryDirectory(prefix="aang-model-") as folder:
        model = Path(folder) / "model"
        export_model(model, setup, record)
        archive = io.BytesIO()
        with tarfile.open(fileobj=archive, mode="w") as tar:
            for file in sorted(model.iterdir()):
                tar.add(file, file.name)
    publish(location, _path(location, record.result.cell), archive.getvalue())
    _drop_worse(location, Store(store), record.result.group)


def _drop_worse(location: Location, store: Store, group: str) -> None:
    """Remove the kept models of a configuration, except that of the best seed."""
    kept = kept_models(location)
    best = _best(store, group, kept)
    rows = store.results(["cell", "group"]).to_pylist()
    for cell in kept & {row["cell"] for row in rows if row["group"] == group} - {best}:
        remove(location, _path(location, cell))


def _best(store: Store, group: str, cells: Collection[str]) -> str | None:
    """Return that of some cells of a configuration with the best dev score, of equal ones that of the lowest seed."""
    rows = store.results(["cell", "group", "status", "dev_score", "seed"]).to_pylist()
    found = [row for row in rows if row["group"] == group and row["cell"] in cells and row["status"] == "done"]
    return max(found, key=lambda row: (row["dev_score"], -row["seed"]))["cell"] if found else None


def kept_models(location: Location) -> set[str]:
    """Return the cells of a store whose models are kept."""
    infos = location.filesystem.get_file_info(fs.FileSelector(location.path(FOLDER), allow_not_found=True))
    return {info.base_name.removesuffix(SUFFIX) for info in infos if info.base_name.endswith(SUFFIX)}


def keep_only(store: Store, rows: Collection[tuple[str, Collection[str]]]) -> int:
    """Remove kept models of a table that are not the best of their row.

    Args:
        store: The store.
        rows: Of each row in each column of the table, the best cell and all its cells. Where the model of the best cell
            was never kept, those of the others stay.

    Returns:
        The number of models that are kept.
    """
    location = open_location(store.uri)
    kept = kept_models(location)
    for best, cells in rows:
        for cell in kept & set(cells) - {best} if best in kept else ():
            remove(location, _path(location, cell))
    return len(kept_models(location))


def unpack_model(store: Store, cell: str, folder: Path) -> bool:
    """Write the kept model of a run into a folder; return False if the store keeps none.

    Args:
        store: The store.
        cell: Name of the run.
        folder: The folder; an earlier export there is replaced.

    Raises:
        UserError: The folder cannot take an export, or the kept model is damaged.
        NotWritten: It cannot be written.
    """
    location = open_location(store.uri)
    path = _path(location, cell)
    try:
        with location.filesystem.open_input_file(path) as stream:
            data = stream.read()
    except FileNotFoundError:
        return False
    try:
        with new_folder(folder.absolute(), replace=True) as draft, tarfile.open(fileobj=io.BytesIO(data)) as tar:
            tar.extractall(draft, filter="data")
    except tarfile.TarError as error:
        raise UserError(f"{path} is damaged ({error}); delete it, and the run is trained again") from error
    except OSError as error:
        raise NotWritten(f"export {folder} cannot be written: {error.strerror or error}") from error
    return True


def _path(location: Location, cell: str) -> str:
    return location.path(FOLDER, f"{cell}{SUFFIX}")
