"""What one Ray Tune trial does: run a cell, write its row, say how it went."""

from __future__ import annotations

import gc
import json
import logging
import traceback
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from aang_ray.config import RunConfig, parse_config
from aang_ray.errors import RunFailure, UserError
from aang_ray.store import CellIsDone, CellRecord, HistoryRow, Store
from aang_ray.sweep.heartbeat import Heartbeat
from aang_ray.train.control import Interrupted
from aang_ray.train.record import failed_record

if TYPE_CHECKING:
    from aang_ray.train.workers.launch import Channel

logger = logging.getLogger(__name__)

Report = Callable[[dict[str, Any]], None]


def tune_trial(params: Mapping[str, Any], store: str, line: Channel) -> None:
    """The Tune trainable: `params` hold a configuration (`run`, as JSON) and the step to stop at (`until`), if any.

    The sweep closes the channel (`line`) when its trials are to stop.

    Trials share processes, so all that a cell depends on is in its configuration, the number of threads included.
    """
    from ray import tune

    _log_to_stderr()
    config = parse_config(json.loads(params["run"]), "trial")
    logger.info("cell %s begins", config.cell)  # before its first sign of life: whoever dies early has a last word
    try:
        run_and_store(config, Store(store), tune.report, params["until"], line.closed)
    except Interrupted:
        tune.report({"status": "stopped"})
    finally:
        _make_room()


def _log_to_stderr() -> None:
    """Ray keeps what a process prints, so that a row of one that died can end with its last words."""
    package = logging.getLogger("aang_ray")
    if not package.handlers:  # the process may have run a trial before
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        package.addHandler(handler)
        package.setLevel(logging.INFO)


def _make_room() -> None:
    """Give back what a trial held: its process stays for the next, and others may share the GPU."""
    import torch

    gc.collect()  # a model and its optimiser refer to each other
    torch.cuda.empty_cache()  # nothing to do where no GPU was used


def run_and_store(
    config: RunConfig,
    store: Store,
    report: Report,
    until: int | None = None,
    abandoned: Callable[[], bool] = lambda: False,
) -> None:
    """Run a cell, from its checkpoint if it has one, to its end or a step, and write its row before saying so.

    So a driver that dies loses nothing. The checkpoint of a cell that is done is removed.

    A run that goes on from a checkpoint first reports from which step (`resumed`). Each evaluation reports `step` and
    `steps`; the end reports `status` (`done`, `failed`, `cut` for one that stopped at `until`, or `elsewhere` for a
    cell that another sweep on the same store has done in the meantime) with scores or the error.

    Raises:
        Interrupted: when it was `abandoned`, with the checkpoint written.
    """
    from aang_ray.train.checkpoint import CheckpointFiles, checkpoint_folder, discard
    from aang_ray.train.workers.launch import WorkerError, launch

    checkpoints = checkpoint_folder(store.uri)
    if store.done().get(config.cell) == "done":
        report({"status": "elsewhere"})
        return

    with Heartbeat(store.uri, config) as heart:

        def evaluated(row: HistoryRow) -> None:
            heart.evaluated(row)
            report({"step": row.step, "steps": config.total_steps, "seconds": row.seconds})

        reached = CheckpointFiles(checkpoints, config.cell).newest_step()
        if reached:
            report({"resumed": reached, "step": reached, "steps": config.total_steps})
        try:
            record = launch(config, on_evaluation=evaluated, checkpoints=checkpoints, until=until, abandoned=abandoned)
        except (UserError, RunFailure, WorkerError) as error:  # their messages are whole sentences
            logger.exception("cell %s failed", config.cell)
            record = failed_record(config, str(error), traceback.format_exc())
        except Exception as error:  # the sweep goes on whatever a cell does; the row says what it was
            logger.exception("cell %s failed", config.cell)
            record = failed_record(config, f"{type(error).__name__}: {error}", traceback.format_exc())
        try:
            store.write(record)
            end = outcome(record)
        except CellIsDone:
            end = {"status": "elsewhere"}
        if end["status"] in ("done", "elsewhere"):
            discard(checkpoints, config.cell)
    report(end)


def outcome(record: CellRecord) -> dict[str, Any]:
    """The end of a cell in a few plain values."""
    row = record.result
    values: dict[str, Any] = {"status": row.status, "seconds": row.seconds, "metric": row.metric, "error": row.error}
    if row.dev is not None:
        values |= {"dev": getattr(row.dev, row.metric), "step": row.steps}
    if row.test is not None:
        values |= {"test": getattr(row.test, row.metric), "majority": bool(row.majority)}
    return values
