"""What one Ray Tune trial does: run a cell, write its row, say how it went."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from aang_ray.config import RunConfig, parse_config
from aang_ray.store import CellIsDone, CellRecord, HistoryRow, Store
from aang_ray.sweep.failure import failed_record
from aang_ray.sweep.heartbeat import Heartbeat

logger = logging.getLogger(__name__)

Report = Callable[[dict[str, Any]], None]


def tune_trial(params: Mapping[str, Any], cells: Sequence[Mapping[str, Any]], store: str) -> None:
    """The Tune trainable: `params["index"]` chooses one of the sweep's configurations.

    Trials share processes, so all that a cell depends on is in its configuration, the number of threads included.
    """
    from ray import tune

    config = parse_config(cells[params["index"]], "trial")
    run_and_store(config, Store(store), tune.report)


def run_and_store(config: RunConfig, store: Store, report: Report) -> None:
    """Run a cell, from its checkpoint if it has one, and write its row before saying so.

    So a driver that dies loses nothing.

    Each evaluation on dev reports `step`, `steps` and `dev`; the end reports `status` (`done`, `failed`, or `elsewhere`
    for a cell that another sweep on the same store has done in the meantime) with scores or the error.
    """
    from aang_ray.train.checkpoint_files import checkpoint_folder, discard
    from aang_ray.train.run import run_cell

    checkpoints = checkpoint_folder(store.uri)
    if store.done().get(config.cell) == "done":
        report({"status": "elsewhere"})
        return

    with Heartbeat(store.uri, config) as heart:

        def evaluated(row: HistoryRow) -> None:
            heart.evaluated(row)
            report({"step": row.step, "steps": config.schedule.steps, "seconds": row.seconds})

        try:
            record = run_cell(config, on_evaluation=evaluated, checkpoints=checkpoints)
        except Exception as error:  # the sweep goes on whatever a cell does; the row says what it was
            logger.exception("cell %s failed", config.cell)
            record = failed_record(config, f"{type(error).__name__}: {error}", traceback.format_exc())
        try:
            store.write(record)
            end = outcome(record)
        except CellIsDone:
            end = {"status": "elsewhere"}
        if end["status"] != "failed":
            discard(checkpoints, config.cell)
    report(end)


def outcome(record: CellRecord) -> dict[str, Any]:
    """The end of a cell in a few plain values."""
    row = record.result
    values: dict[str, Any] = {"status": row.status, "seconds": row.seconds, "metric": row.metric, "error": row.error}
    if row.dev is not None and row.test is not None:
        values |= {"dev": getattr(row.dev, row.metric), "test": getattr(row.test, row.metric)}
        values["majority"] = bool(row.majority)
    return values
