"""A run's checkpoint: the files that hold it, and when they are written and read.

A cell has two files in the folder `<checkpoints>/<cell>`: its state, `last-<step>-<digest>.pt`, and its best model,
`best-<step>-<digest>.safetensors`. Each is written atomically under a name that holds a digest of its content, and is
removed after a newer one is written. So a process may be killed at any moment.
"""

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

FORMAT = 1
FOLDER = ".checkpoints"
_LAST, _BEST = "last", "best"

logger = logging.getLogger(__name__)


class Checkpointer:
    """Writes a run's checkpoint when it is due and stops the run when its `RunControl` asks for it.

    Args:
        files: The cell's checkpoint files, which the first worker writes.
        compute: Device and precision, which are stored in the checkpoint.
        minutes: Time between two checkpoints; 0 writes one after every step.
        workers: The workers of the run; None for this process alone.
        control: Reasons to save or to stop; None for signals only.
    """

    def __init__(
        self,
        files: CheckpointFiles,
        compute: Compute,
        minutes: float,
        workers: Workers | None = None,
        control: RunControl | None = None,
    ) -> None:
        self._files = files
        self._compute = f"{compute.device_name}, {compute.precision}"
        self._save_seconds = 60 * minutes
        self._workers = workers or Workers()
        self._control = control or RunControl()
        self._saved_at = time.monotonic()

    def delaying_signals(self) -> AbstractContextManager[object]:
        """Return a context in which SIGTERM and Ctrl-C wait for the end of the step."""
        return self._control.signals

    def resume(self, restore: Callable[[Mapping[str, Any], dict[str, Tensor]], None]) -> bool:
        """Restore the newest checkpoint, which the first worker chooses; return False if there is none.

        Raises:
            UserError: For a checkpoint that cannot be read, or that belongs to another run.
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
        logger.info("the run continues from %s", found.path)
        if begun != self._compute:
            logger.warning("begun on %s, resumed on %s: the numbers may differ by rounding", begun, self._compute)
        return True

    def after_resume(self, step: int) -> None:
        """Raise `StepLimitReached` if a resumed run is at its limit: its process ended before the row was written."""
        if self._control.limit_reached(step):
            raise StepLimitReached

    def after_step(
        self, step: int, state: Callable[[], dict[str, Any]], best_step: int, best_model: Mapping[str, Tensor]
    ) -> None:
        """Write a checkpoint if one is due, and stop if there is a reason to. All workers call this after each step.

        Args:
            step: Number of completed steps.
            state: Returns the state to write.
            best_step: Step after which the best model was saved.
            best_model: Parameters of the best model; empty before the first evaluation.

        Raises:
            StepLimitReached: After step `RunControl.until`.
            Interrupted: After SIGTERM, or when the driver process has ended.
            KeyboardInterrupt: After Ctrl-C.
        """
        wanted = self._control.after_step(step, time.monotonic() - self._saved_at, self._save_seconds)
        action = AfterStep(self._workers.max_host([wanted])[0])
        if action == AfterStep.CONTINUE:
            return
        content = {"compute": self._compute, **state()}  # on all workers: a sharded optimiser is gathered for it
        if self._workers.first:
            self._files.save(step, content, best_step, best_model)
        self._saved_at = time.monotonic()
        if action > AfterStep.SAVE:
            self._workers.wait_for_all()  # a worker that ends before the file is written would look lost
            raise self._control.stop_error(action, step, self._files.folder)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read."""

    path: str
    state: dict[str, Any]
    kept: dict[str, Tensor]
    """Parameters of the best model so far; empty before the first evaluation."""


class CheckpointFiles:
    """The checkpoint files of one cell, below a folder or URI. The first `save` creates them."""

    def __init__(self, checkpoints: Path | str, cell: str) -> None:
        above = open_location(checkpoints)
        # With the cell's own folder as root, temporary files of a killed process are removed with the next checkpoint.
        self._location = replace(above, root=above.path(cell))
        self._cell = cell
        self._best_step, self._best_name = -1, ""

    @property
    def folder(self) -> str:
        """The folder of the files, as their filesystem names it."""
        return self._location.root

    def save(self, step: int, state: Mapping[str, Any], best_step: int, best_model: Mapping[str, Tensor]) -> str:
        """Write the state after a step, and the best model (empty at first) if it is new; then delete older files."""
        if best_model and (best_step != self._best_step or self._best_name not in self._names()):
            data = safetensors.torch.save({name: value.contiguous() for name, value in best_model.items()})
            self._best_step, self._best_name = best_step, self._publish(_BEST, best_step, ".safetensors", data)
        best = self._best_name if best_model else ""
        stream = io.BytesIO()
        torch.save({"format": FORMAT, "cell": self._cell, "best": best, "state": dict(state)}, stream)
        last = self._publish(_LAST, step, ".pt", stream.getvalue())
        for name in self._names() - {best, last}:
            remove(self._location, self._location.path(name))
        return self._location.path(last)

    def load(self) -> Checkpoint | None:
        name = self.newest()
        return self.read(name) if name else None

    def newest(self) -> str:
        """Return the file name of the newest state; empty if there is none."""
        return max((name for name in self._names() if name.startswith(_LAST)), default="")

    def newest_step(self) -> int:
        """Return the number of completed steps in the newest state; 0 if there is none."""
        name = self.newest()
        return _step(name) if name else 0

    def read(self, name: str) -> Checkpoint:
        """Return the state in a file together with the best model that it refers to.

        Raises:
            UserError: For a file that is missing, damaged, of another configuration, or of another format.
        """
        path = self._location.path(name)
        content = self._parse(path, self._read(name))
        best = content["best"]
        if not best:
            return Checkpoint(path, content["state"], {})
        self._best_step, self._best_name = _step(best), best
        try:
            best_model: dict[str, Tensor] = safetensors.torch.load(self._read(best))
        except SafetensorError as error:
            raise self.unusable(self._location.path(best), "is no safetensors file") from error
        return Checkpoint(path, content["state"], best_model)

    def discard(self) -> None:
        """Delete the cell's folder if it exists."""
        filesystem, root = self._location.filesystem, self._location.root
        if filesystem.get_file_info(root).type == fs.FileType.Directory:
            filesystem.delete_dir(root)

    def unusable(self, path: str, reason: str) -> UserError:
        """Return the error for a checkpoint that a run cannot continue from."""
        return UserError(f"checkpoint {path}: {reason}; delete {self._location.root} to start this run anew")

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


def checkpoint_folder(store: str | Path) -> str:
    """Return `<store>/.checkpoints`, which readers of rows ignore. A URI's `?options` stay at the end."""
    address, mark, options = str(store).partition("?") if "://" in str(store) else (str(store), "", "")
    return f"{address.rstrip('/')}/{FOLDER}{mark}{options}"


def discard(checkpoints: Path | str, cell: str) -> None:
    """Delete a cell's checkpoint if it exists; called after the cell's row is written."""
    CheckpointFiles(checkpoints, cell).discard()


def discard_done(checkpoints: Path | str, done: Collection[str]) -> None:
    """Delete checkpoints of cells that have a row already: their process was killed between writing and deleting."""
    location = open_location(checkpoints)
    infos = location.filesystem.get_file_info(fs.FileSelector(location.root, allow_not_found=True))
    for info in infos:
        if info.type == fs.FileType.Directory and info.base_name in done:
            location.filesystem.delete_dir(info.path)


def _step(name: str) -> int:
    return int(name.split("-")[1])


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=8).hexdigest()
