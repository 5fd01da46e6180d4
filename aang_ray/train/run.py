"""One cell from its configuration to its rows."""

from __future__ import annotations

import logging
import platform
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import aang_ray
from aang_ray.config.run import RunConfig
from aang_ray.errors import RunFailure
from aang_ray.store.schema import CellRecord, HistoryRow, ResultRow
from aang_ray.train.checkpoint import Checkpointer, CheckpointFiles
from aang_ray.train.control import RunControl, StepLimitReached
from aang_ray.train.device import Compute, choose_compute, is_out_of_memory
from aang_ray.train.export import check_export, export_model
from aang_ray.train.loop import Finished, Trainer
from aang_ray.train.setup import build
from aang_ray.train.workers.group import Workers

# --- train.versions: Versions of what a result depends on.


_PACKAGES = ("torch", "transformers", "tokenizers", "datasets", "numpy", "scikit-learn", "ray", "torchjd")


def versions() -> dict[str, str]:
    """Python, this package, and the packages that compute."""
    found = {name: version(name) for name in _PACKAGES}
    return {"python": platform.python_version(), "aang-ray": aang_ray.__version__, **found}


logger = logging.getLogger(__name__)


def run_cell(
    config: RunConfig,
    *,
    on_evaluation: Callable[[HistoryRow], None] | None = None,
    checkpoints: Path | str | None = None,
    export: Path | None = None,
    control: RunControl | None = None,
    workers: Workers | None = None,
) -> CellRecord:
    """Run a resolved configuration; a run that cannot go on is a failed row.

    With `checkpoints` (a folder or any URI that a store may have) the run's state is kept in `<checkpoints>/<cell>`,
    written every `resources.checkpoint_minutes`, on SIGTERM and on Ctrl-C, and a run that has a checkpoint goes on from
    it: on the same device with as many threads it ends with the very numbers of a run that was not stopped. Whoever
    writes the row removes it with `discard`. `control` holds the reasons to stop or to save that come from outside.
    With `export` a run that is done leaves its classifier in that folder. Several `workers` each call this with the
    same arguments and return the same record; `on_evaluation` is called in each, and the first alone writes files.

    Raises:
        UserError: for an input that is wrong, before anything was trained.
        Interrupted, KeyboardInterrupt: after SIGTERM or Ctrl-C, with `checkpoints` once the state is written.
        WorkerLost: if another worker ended before the run did.
    """
    if export is not None:
        check_export(export, config.data)
    compute = choose_compute(config)
    logger.info("cell %s: %s on %s, %s", config.cell, config.row_name, compute.device_name, compute.precision)
    checkpointer = None
    if checkpoints is not None:
        minutes = config.resources.checkpoint_minutes
        checkpointer = Checkpointer(CheckpointFiles(checkpoints, config.cell), compute, minutes, workers, control)
    trainer = Trainer(build(config, compute, workers), on_evaluation, checkpointer)
    try:
        finished = trainer.run()
    except StepLimitReached:
        return _cut(trainer, compute)
    except RunFailure as failure:
        return _failed(trainer, compute, str(failure))
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        line = "out of memory: lower batch.micro, data.max_tokens, batch.auxiliary or encoder.layers"
        return _failed(trainer, compute, line)
    record = _done(trainer, compute, finished)
    if export is not None and trainer.setup.workers.first:
        export_model(export, trainer.setup, record.result)
    return record


def _done(trainer: Trainer, compute: Compute, finished: Finished) -> CellRecord:
    progress, scores = finished.progress, finished.scores
    before = progress.before
    result = ResultRow(
        **_identity(trainer.config),
        **_effort(trainer, compute),
        status="done",
        error=None,
        log_tail=None,
        dev=scores.dev,
        test=scores.test,
        test_clean=scores.test_clean,
        dev_before=None if before is None else before.dev,
        test_before=None if before is None else before.test,
        test_clean_before=None if before is None else before.test_clean,
        test_clean_low=None if finished.clean_interval is None else finished.clean_interval[0],
        test_clean_high=None if finished.clean_interval is None else finished.clean_interval[1],
        majority=progress.majority,
        best_step=progress.best_step,
        seconds=finished.seconds,
    )
    return CellRecord(result, tuple(progress.history), tuple(progress.weights))


def _cut(trainer: Trainer, compute: Compute) -> CellRecord:
    """Dev as it decided so far, and no test score: test is for whole runs."""
    progress = trainer.progress
    best = next((row.dev for row in progress.history if row.step == progress.best_step), None)
    result = ResultRow(
        **_identity(trainer.config),
        **_effort(trainer, compute),
        status="cut",
        error=None,
        log_tail=None,
        dev=best,
        test=None,
        test_clean=None,
        majority=progress.majority,
        best_step=progress.best_step,
        seconds=trainer.seconds,
    )
    return CellRecord(result, tuple(progress.history), tuple(progress.weights))


def _failed(trainer: Trainer, compute: Compute, error: str) -> CellRecord:
    progress = trainer.progress
    last = progress.history[-1] if progress.history else None
    result = ResultRow(
        **_identity(trainer.config),
        **_effort(trainer, compute),
        status="failed",
        error=error,
        log_tail=f"last evaluation: {last}" if last else "no evaluation before",
        dev=None,
        test=None,
        test_clean=None,
        majority=None,
        best_step=None,
        seconds=trainer.seconds,
    )
    return CellRecord(result, tuple(progress.history), tuple(progress.weights))


def _identity(config: RunConfig) -> dict[str, Any]:
    """What names the cell."""
    auxiliary = config.method.auxiliary
    return {
        "cell": config.cell,
        "group": config.group,
        "row": config.row_name,
        "task": config.task_name,
        "method": config.method.name,
        "space": config.space if auxiliary else None,
        "n": str(config.n) if auxiliary else None,
        "seed": config.seed,
        "config": config.model_dump(mode="json"),
        "metric": config.data.metric,
    }


def _effort(trainer: Trainer, compute: Compute) -> dict[str, Any]:
    """What the run took, and on what."""
    return {
        "steps": trainer.progress.steps,
        "examples": trainer.progress.examples,
        "tokens": trainer.progress.tokens,
        "device": compute.device_name,
        "precision": compute.precision,
        "versions": versions(),
        "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
