"""Run one cell, from its configuration to its record."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

from aang_ray.config.run import RunConfig
from aang_ray.errors import RunFailure
from aang_ray.store.files import NotWritten
from aang_ray.store.schema import CellRecord, HistoryRow
from aang_ray.train.checkpoint import Checkpointer, CheckpointFiles
from aang_ray.train.control import RunControl, StepLimitReached
from aang_ray.train.device import choose_compute, is_out_of_memory
from aang_ray.train.export import check_export, export_model
from aang_ray.train.keep import keep_model
from aang_ray.train.loop import Trainer
from aang_ray.train.record import Heartbeat, OnEvaluation, cell_record
from aang_ray.train.setup import build
from aang_ray.train.workers.group import Workers

logger = logging.getLogger(__name__)


def run_cell(
    config: RunConfig,
    *,
    on_evaluation: OnEvaluation | None = None,
    on_beat: Callable[[Heartbeat], None] | None = None,
    checkpoints: Path | str | None = None,
    export: Path | None = None,
    keep: str | None = None,
    on_done: Callable[[CellRecord], object] | None = None,
    control: RunControl | None = None,
    workers: Workers | None = None,
) -> CellRecord:
    """Run a resolved configuration and return its record. A `RunFailure` or lack of memory gives a failed record.

    With several workers, all call this function with the same arguments and return the same record. Only the first
    worker writes files.

    Args:
        config: The resolved configuration (see `plan.resolve`).
        on_evaluation: Called after each evaluation on dev with its rows of history and weights, in every worker.
        on_beat: Called with the step between evaluations, every ten seconds, in every worker.
        checkpoints: Folder or URI of `<cell>`, in which the state is written every `resources.checkpoint_minutes`, on
        SIGTERM and on Ctrl-C, and from which the run continues, with exactly the results of an uninterrupted one on the
        same device and number of threads. The caller deletes it with `checkpoint.discard`. None: no checkpoints.
        export: Folder to which a finished run writes its classifier; None for no export.
        keep: URI of a store that keeps the classifier of a finished run; None: it is not kept.
        on_done: Called in the first worker with the record of a finished run, before its classifier is written.
        control: Other reasons to save or to stop; needs `checkpoints`.
        workers: The worker group that this process belongs to.

    Raises:
        UserError: For a wrong input, before anything is trained.
        Interrupted, KeyboardInterrupt: After SIGTERM or Ctrl-C; with `checkpoints`, the state is written.
        WorkerLost: Another worker ended before the run did.
        NotWritten: The checkpoint or the export cannot be written.
    """
    if export is not None:
        check_export(export, config.data)
    compute = choose_compute(config)
    logger.info("cell %s: %s on %s, %s", config.cell, config.row_name, compute.device_name, compute.precision)
    checkpointer = None
    if checkpoints is not None:
        minutes = config.resources.checkpoint_minutes
        checkpointer = Checkpointer(CheckpointFiles(checkpoints, config.cell), compute, minutes, workers, control)

    def evaluated(row: HistoryRow) -> None:
        if on_evaluation is not None:
            on_evaluation(row, trainer.weights)

    trainer = Trainer(build(config, compute, workers), evaluated, checkpointer, on_beat)
    record_of = partial(cell_record, config, device=compute.device_name, precision=compute.precision)
    try:
        finished = trainer.run()
    except StepLimitReached:
        return record_of(trainer.progress, "cut", seconds=trainer.seconds)
    except RunFailure as failure:
        error = str(failure)
    except RuntimeError as failure:
        if not is_out_of_memory(failure):
            raise
        error = "out of memory: lower batch.micro, data.max_tokens, batch.auxiliary or encoder.layers"
    else:
        record = record_of(
            finished.progress,
            "done",
            seconds=trainer.seconds,
            scores=finished.scores,
            clean_interval=finished.clean_interval,
            predictions=finished.predictions,
        )
        if (export is not None or keep is not None) and trainer.setup.workers.first:
            if on_done is not None:
                on_done(record)
            try:
                if export is not None:
                    export_model(export, trainer.setup, record)
                if keep is not None:
                    keep_model(keep, trainer.setup, record)
            except NotWritten:
                trainer.save()
                raise
        return record
    history = trainer.progress.history
    log = f"last evaluation: {history[-1]}" if history else "no evaluation before"
    return record_of(trainer.progress, "failed", seconds=trainer.seconds, error=error, log=log)
