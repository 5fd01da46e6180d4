"""When a run's checkpoint is written and read: every so many minutes, before it obeys a signal, at its start."""

from __future__ import annotations

import hashlib
import io
import logging
import pickle
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from pyarrow import fs
from safetensors import SafetensorError
from torch import Tensor

from aang_ray.errors import UserError
from aang_ray.store.files import open_location, publish, remove
from aang_ray.train.control import AfterStep, RunControl, StepLimitReached
from aang_ray.train.device import Compute, is_out_of_memory
from aang_ray.train.workers.group import Workers

# --- train.checkpoint_files: The files of one run's checkpoint: `<checkpoints>/<cell>/last-<step>-<digest>.pt` and `best-...safetensors`.
#
# Each appears whole or not at all, under a name that holds a digest of its content, and is removed once a newer one
# is there: a kill at any moment leaves a checkpoint that can be read, or none where none was written yet.


FORMAT = 1
FOLDER = ".checkpoints"
_LAST, _BEST = "last", "best"


@dataclass(frozen=True)
class Checkpoint:
    """What a run goes on from."""

    path: str
    state: dict[str, Any]
    kept: dict[str, Tensor]
    """Parameters of the best model so far; empty before the first evaluation."""


class CheckpointFiles:
    """Last state and best model of one cell below a folder or URI; nothing is there before the first `save`."""

    def __init__(self, checkpoints: Path | str, cell: str) -> None:
        above = open_location(checkpoints)
        # With the cell's own folder as root, what a killed writer left is removed with the next checkpoint.
        self._location = replace(above, root=above.path(cell))
        self._cell = cell
        self._best_step, self._best_name = -1, ""

    def save(self, step: int, state: Mapping[str, Any], best_step: int, kept: Mapping[str, Tensor]) -> str:
        """Write the state after a step (tensors, numbers, strings, lists, dicts), and the best model where it is new.

        Returns the path of the state. Older files are removed when all is durable.
        """
        best = self._save_best(best_step, kept) if kept else ""
        stream = io.BytesIO()
        torch.save({"format": FORMAT, "cell": self._cell, "best": best, "state": dict(state)}, stream)
        last = self._publish(_LAST, step, ".pt", stream.getvalue())
        for name in self._names() - {best, last}:
            remove(self._location, self._location.path(name))
        return self._location.path(last)

    def load(self) -> Checkpoint | None:
        """The newest state with its best model; None where the cell has no checkpoint.

        Raises:
            UserError: as `read`.
        """
        name = self.newest()
        return self.read(name) if name else None

    def newest(self) -> str:
        """Name of the newest state; empty where the cell has no checkpoint."""
        return max((name for name in self._names() if name.startswith(_LAST)), default="")

    def newest_step(self) -> int:
        """Steps done in the newest state; 0 where the cell has no checkpoint."""
        name = self.newest()
        return _step(name) if name else 0

    def read(self, name: str) -> Checkpoint:
        """The state of this name with its best model.

        Raises:
            UserError: for a file that is not whole, or of another configuration or a newer version.
        """
        path = self._location.path(name)
        content = self._parse(path, self._read(name))
        best = content["best"]
        if not best:
            return Checkpoint(path, content["state"], {})
        self._best_step, self._best_name = _step(best), best
        return Checkpoint(path, content["state"], self._read_best(best))

    @property
    def folder(self) -> str:
        """Where the files are, as the filesystem names it."""
        return self._location.root

    def discard(self) -> None:
        """Delete the cell's folder if it is there."""
        filesystem, root = self._location.filesystem, self._location.root
        if filesystem.get_file_info(root).type == fs.FileType.Directory:
            filesystem.delete_dir(root)

    def unusable(self, path: str, reason: str) -> UserError:
        """The error of a checkpoint that a run cannot go on from."""
        return UserError(f"checkpoint {path}: {reason}; delete {self._location.root} to start this run anew")

    def _save_best(self, step: int, kept: Mapping[str, Tensor]) -> str:
        if step != self._best_step or self._best_name not in self._names():
            data = safetensors.torch.save({name: value.contiguous() for name, value in kept.items()})
            self._best_step, self._best_name = step, self._publish(_BEST, step, ".safetensors", data)
        return self._best_name

    def _publish(self, kind: str, step: int, suffix: str, data: bytes) -> str:
        name = f"{kind}-{step:010d}-{_digest(data)}{suffix}"
        publish(self._location, self._location.path(name), data)
        return name

    def _names(self) -> set[str]:
        selector = fs.FileSelector(self._location.root, allow_not_found=True)
        infos = self._location.filesystem.get_file_info(selector)
        return {info.base_name for info in infos if info.type == fs.FileType.File}

    def _read(self, name: str) -> bytes:
        path = self._location.path(name)
        try:
            with self._location.filesystem.open_input_file(path) as stream:
                data: bytes = stream.read()
        except FileNotFoundError:
            raise self.unusable(path, "is missing") from None
        if _digest(data) != name.partition(".")[0].rpartition("-")[2]:
            raise self.unusable(path, "is damaged: its content is not what its name says")
        return data

    def _parse(self, path: str, data: bytes) -> dict[str, Any]:
        try:
            content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
            raise self.unusable(path, "is no state of a run") from error
        if not isinstance(content, dict) or not {"format", "cell", "best", "state"} <= content.keys():
            raise self.unusable(path, "is no state of a run")
        if content["format"] != FORMAT:
            raise self.unusable(path, f"has format {content['format']}, this version reads format {FORMAT}")
        if content["cell"] != self._cell:
            raise self.unusable(path, f"belongs to another configuration (cell {content['cell']}, not {self._cell})")
        return content

    def _read_best(self, name: str) -> dict[str, Tensor]:
        try:
            kept: dict[str, Tensor] = safetensors.torch.load(self._read(name))
        except SafetensorError as error:
            raise self.unusable(self._location.path(name), "is no safetensors file") from error
        return kept


def checkpoint_folder(store: str | Path) -> str:
    """Where the runs of a store keep their checkpoints: `<store>/.checkpoints`, which holds no rows for its readers.

    The options of a URI (`s3://bucket/folder?region=...`) stay at its end.
    """
    address, mark, options = str(store).partition("?") if "://" in str(store) else (str(store), "", "")
    return f"{address.rstrip('/')}/{FOLDER}{mark}{options}"


def discard(checkpoints: Path | str, cell: str) -> None:
    """Delete a cell's checkpoint, if there is one: for when its row is written."""
    CheckpointFiles(checkpoints, cell).discard()


def discard_done(checkpoints: Path | str, done: Collection[str]) -> None:
    """Delete what a kill between a cell's row and the end of its checkpoint has left of these cells."""
    location = open_location(checkpoints)
    infos = location.filesystem.get_file_info(fs.FileSelector(location.root, allow_not_found=True))
    for info in infos:
        if info.type == fs.FileType.Directory and info.base_name in done:
            location.filesystem.delete_dir(info.path)


def _step(name: str) -> int:
    return int(name.split("-")[1])


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=8).hexdigest()


logger = logging.getLogger(__name__)


class Checkpointer:
    """Writes a run's checkpoint when it is due and stops the run when its `RunControl` says so.

    With several workers the first one writes the files. All workers agree in one small message after each step.
    """

    def __init__(
        self,
        files: CheckpointFiles,
        compute: Compute,
        minutes: float,
        workers: Workers | None = None,
        control: RunControl | None = None,
    ) -> None:
        """Take the files to write; `minutes` between two checkpoints, 0 to write one after every step."""
        self._files = files
        self._compute = f"{compute.device_name}, {compute.precision}"
        self._save_seconds = 60 * minutes
        self._workers = workers or Workers.alone()
        self._control = control or RunControl()
        self._saved_at = time.monotonic()

    def delaying_signals(self) -> AbstractContextManager[object]:
        """Context in which SIGTERM and Ctrl-C wait for the end of the step."""
        return self._control.signals

    def after_step(
        self, step: int, state: Callable[[], dict[str, Any]], best_step: int, kept: Mapping[str, Tensor]
    ) -> None:
        """Write a checkpoint if one is due, and stop if there is a reason to. All workers call this after each step.

        Args:
            step: Steps that are done.
            state: Returns the state to write.
            best_step: The step that the best model is from.
            kept: Parameters of the best model so far.

        Raises:
            StepLimitReached: after the step that `RunControl.until` names.
            Interrupted: after SIGTERM, or when the driver has gone.
            KeyboardInterrupt: after Ctrl-C.
        """
        wanted = self._control.after_step(step, time.monotonic() - self._saved_at, self._save_seconds)
        action = AfterStep(self._workers.max_host([wanted])[0])
        if action == AfterStep.CONTINUE:
            return
        content = {"compute": self._compute, **state()}  # on all workers: a sharded optimiser is gathered for it
        if self._workers.first:
            self._files.save(step, content, best_step, kept)
        self._saved_at = time.monotonic()
        if action > AfterStep.SAVE:
            self._workers.wait_for_all()  # a worker that leaves before the file is written could be taken for lost
            raise self._control.stop_error(action, step, self._files.folder)

    def after_resume(self, step: int) -> None:
        """Check whether a resumed run has already reached its step limit.

        Raises:
            StepLimitReached: if so: its process ended after the checkpoint and before the row was written.
        """
        if self._control.limit_reached(step):
            raise StepLimitReached

    def resume(self, restore: Callable[[Mapping[str, Any], dict[str, Tensor]], None]) -> bool:
        """Hand the newest state and the best model's parameters to `restore`; False where there is none.

        Of several workers the first chooses the file, and all read it.

        Raises:
            UserError: for a checkpoint that cannot be read or is another run's.
        """
        name = self._workers.text_of(self._files.newest() if self._workers.first else "", 0)
        if not name:
            return False
        found = self._files.read(name)
        try:
            restore(found.state, found.kept)
            begun = found.state["compute"]
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and is_out_of_memory(error):
                raise
            reason = str(error).partition("\n")[0]
            raise self._files.unusable(found.path, f"does not fit this version ({reason})") from error
        logger.info("the run goes on from %s", found.path)
        if begun != self._compute:
            logger.warning("begun on %s, resumed on %s: the numbers may differ by rounding", begun, self._compute)
        return True
