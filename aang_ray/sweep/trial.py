"""What one Tune trial does: run a cell, write its row, report how it went."""

from __future__ import annotations

import ctypes
import gc
import json
import logging
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

from aang_ray.config import RunConfig, parse_config
from aang_ray.errors import RunFailure, UserError
from aang_ray.store import CellRecord, HistoryRow, Store, WeightRow, is_disk_failure
from aang_ray.sweep.progress import Evaluation
from aang_ray.train.control import Interrupted
from aang_ray.train.record import Heartbeat, failed_record, take_rows, write_row

if TYPE_CHECKING:
    from aang_ray.train.workers.launch import Channel

logger = logging.getLogger(__name__)


def tune_trial(config: Mapping[str, Any], store: str, channel: Channel) -> None:
    """The Tune trainable.

    Trials share processes, so all that a cell depends on is in its configuration, the number of threads included.

    Args:
        config: Under `trial` the run as JSON (`run`), its `rungs`, and whether the store is to `keep` its model.
        store: URI of the store.
        channel: `channel.closed()` is true when the sweep wants its trials to stop.
    """
    import ray
    from ray import tune

    package = logging.getLogger("aang_ray")
    if not package.handlers:  # the process may have run a trial before
        # Ray keeps what a process prints, so that the row of one that died can hold the end of its log.
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        package.addHandler(handler)
        package.setLevel(logging.INFO)
    run = parse_config(json.loads(config["trial"]["run"]), "trial")
    if channel.closed():
        tune.report({"status": "not started"})
        return
    from aang_ray.train.process import set_up_process

    logger.info("cell %s starts", run.cell)  # so that the log of a process that dies early names its cell
    logger.info(set_up_process(run.resources))
    actor = ray.get_runtime_context().get_actor_id()

    def report(values: dict[str, Any]) -> None:
        tune.report({"actor": actor, **values})

    report({"step": 0})
    try:
        run_and_store(run, Store(store), report, config["trial"]["rungs"], channel.closed, keep=config["trial"]["keep"])
    except Interrupted:
        report({"status": "stopped"})
    except OSError as error:
        if not is_disk_failure(error):
            raise
        # Trying again is of no use, and other cells use the same disk and store.
        logger.exception("cell %s cannot write", run.cell)
        report({"status": "cannot write", "error": str(error)})


def run_and_store(
    config: RunConfig,
    store: Store,
    report: Callable[[dict[str, Any]], None],
    rungs: Iterable[tuple[float, int]] = (),
    abandoned: Callable[[], bool] = lambda: False,
    *,
    keep: bool = False,
) -> None:
    """Run a cell, from its checkpoint if it has one, and write its row before reporting the end.

    So a driver that dies loses nothing. The checkpoint of a cell that is done is removed. With `keep`, the store keeps
    the model (`train.keep`).

    At each rung (a share of the run, and its step) the run writes its checkpoint and a row with status `cut`, and
    reports its best dev score so far (`rung`, `dev`). Then it continues from the checkpoint, unless the scheduler ends
    the trial in that report: Tune gives a function that it ends no time to write anything. A rung that an earlier
    attempt has passed is reported from its row.

    Each evaluation reports the fields of `Evaluation`, a sign of life `step`, `seconds` and `loss`; a run that
    continues from a checkpoint first reports `resumed` and the `step`. The end reports `status`, with scores or the
    error: `done`, `failed`, or `elsewhere` for a cell that another process has done in the meantime.

    Raises:
        Interrupted: It was `abandoned`; its checkpoint is written.
        OSError: The row, the checkpoint or another file cannot be written. A checkpoint that is there stays.
    """
    from aang_ray.train.checkpoint import CheckpointFiles, checkpoint_folder, discard

    take_rows(store)
    checkpoints = checkpoint_folder(store.uri)
    status = store.done().get(config.cell)
    if status == "done":
        report(outcome(store.record(config.cell)) | {"status": "elsewhere"})
        return
    reached = CheckpointFiles(checkpoints, config.cell).newest_step()
    if reached:
        report({"resumed": True, "step": reached})
    history = store.record(config.cell).history if reached and status == "cut" else ()
    metric = config.data.metric or "accuracy"

    def evaluated(row: HistoryRow, weights: WeightRow | None) -> None:
        report(asdict(Evaluation.of(config, row, weights)))

    def beat(sign: Heartbeat) -> None:
        report({"step": sign.step, "seconds": sign.seconds, "loss": sign.loss})

    own: dict[str, Any] = {"on_evaluation": evaluated, "on_beat": beat, "checkpoints": checkpoints}
    if keep:
        own |= {"keep": store.uri, "on_done": partial(write_row, store)}
    scored = max((row.step for row in history), default=0)
    for share, until in [*rungs, (1.0, None)]:
        # A rung that the run has passed is judged by its row, if the row reaches so far. If the run stands at the rung
        # itself without such a row (its process died before writing it), `_run` writes the row without training.
        if until is not None and (until <= scored or until < reached):
            scores = [getattr(row.dev, metric) for row in history if row.step <= until and row.dev is not None]
            if scores and until <= scored:
                report({"rung": share, "dev": max(scores), "step": until})
            continue
        record = _run(config, abandoned, until=until, **own)
        # The process stays for the next trial, and others may share the GPU.
        _free_memory()
        end = outcome(record)
        # A run whose model is kept has written its row before.
        if not write_row(store, record) and not (keep and store.record(config.cell).result == record.result):
            end["status"] = "elsewhere"
        if end["status"] != "cut":
            break
        if end.get("dev") is not None:
            report({"rung": share, "dev": end["dev"], "step": end["step"]})
    if end["status"] in ("done", "elsewhere"):
        discard(checkpoints, config.cell)
    report(end)


def _run(config: RunConfig, abandoned: Callable[[], bool], **arguments: Any) -> CellRecord:
    """Run a cell by `launch`, up to a step or to its end; an exception is a failed record, unless it is the disk's."""
    from aang_ray.train.workers.launch import WorkerError, launch

    try:
        return launch(config, abandoned=abandoned, **arguments)
    except Exception as error:
        if is_disk_failure(error):
            raise
        logger.exception("cell %s failed", config.cell)
        whole_sentence = isinstance(error, UserError | RunFailure | WorkerError)
        message = str(error) if whole_sentence else f"{type(error).__name__}: {error}"
        return failed_record(config, message, traceback.format_exc())


def outcome(record: CellRecord) -> dict[str, Any]:
    """The end of a cell in a few plain values."""
    row = record.result
    values: dict[str, Any] = {name: getattr(row, name) for name in ("status", "seconds", "metric", "error")}
    values["step"] = row.steps
    if row.dev is not None:
        values["dev"] = getattr(row.dev, row.metric)
    if row.test is not None:
        values |= {"test": getattr(row.test, row.metric), "majority": bool(row.majority)}
    return values


def _free_memory() -> None:
    """Release what a run used: its process stays for the next trial, and others may share the GPU."""
    import torch

    gc.collect()  # a model and its optimiser refer to each other
    torch.cuda.empty_cache()  # does nothing where no GPU was used
    # No tensor is left, but glibc keeps freed blocks between others that live on. Five runs of 13 heads in one process
    # had 1.0 to 1.4 GB after each run, and 0.55 GB after this call.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have none
    if trim is not None:
        trim(0)
