"""Starting the processes of a run through Ray Train, and starting them again when some were lost.

One worker is Train's local mode: the loop runs in this process. Several are a `TorchTrainer` whose worker actors have a
placement group of their own, NCCL on GPUs and gloo on CPUs between them; the launcher (a trial, `aang train`) waits,
hears of each evaluation and gets the record. Both run `_train_loop`. A run that lost workers goes on from the cell's
own checkpoint: nothing is ever read back from Ray's storage, which is a temporary folder.
"""

from __future__ import annotations

import logging
import os
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

import ray
from ray import train
from ray.exceptions import ActorDiedError, GetTimeoutError, RayActorError
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.exceptions import (
    WorkerGroupStartupFailedError,
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
    WorkerHealthCheckTimeoutError,
)
from ray.util.queue import Queue
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from aang_ray.config import RunConfig
from aang_ray.errors import RunFailure, UserError
from aang_ray.store.schema import CellRecord, HistoryRow
from aang_ray.train.checkpoint import CheckpointFiles
from aang_ray.train.control import Interrupted, RunControl
from aang_ray.train.device import choose_compute
from aang_ray.train.run import run_cell
from aang_ray.train.workers.group import TIMEOUT, WorkerLost, Workers

# --- train.watch: Listening to Ray while a run trains: whether its node drains, and whether its launcher is still there.


POLL_SECONDS = 1.0
"""Between two looks: a spot machine is taken two minutes after its notice, but a person waits for Ctrl-C."""

Sign = Callable[[], bool]

logger = logging.getLogger(__name__)


@contextmanager
def watching(draining: Sign, abandoned: Sign, pause: float = POLL_SECONDS) -> Iterator[RunControl]:
    """A `RunControl` that a thread of its own keeps up to date while the block runs; what was noticed once stays so."""
    control, over = RunControl(), threading.Event()

    def look() -> None:
        while not over.wait(pause):
            control.draining = control.draining or draining()
            control.stop = control.stop or abandoned()

    thread = threading.Thread(target=look, name="watch", daemon=True)
    thread.start()
    try:
        yield control
    finally:
        over.set()
        thread.join()


def nobody_left() -> bool:
    """Of a run whose launcher never goes before it."""
    return False


def node_drains() -> bool:
    """Whether the node of this process takes no new work and will go away: a spot notice, `ray drain-node`.

    A process that is not connected to Ray is on no node.
    """
    import ray
    from ray._private.state import state  # the public state API does not tell; Ray Train's own watcher asks here

    if not ray.is_initialized():
        return False
    try:
        return ray.get_runtime_context().get_node_id() in state.get_draining_nodes()
    except (ray.exceptions.RayError, RuntimeError) as error:
        logger.warning("Ray does not say whether this node drains: %s", error)  # the head restarts; asked again soon
        return False


# --- train.line: The line between a process and those that train for it: workers of a run, trials of a sweep.


class Line:
    """From those who train to who waits for them: evaluations go over it, and that it is cut says that nobody does."""

    def __init__(self, queue: Queue) -> None:
        self._queue = queue

    @classmethod
    def from_here(cls) -> Line:
        """A line that lasts as long as this node: kept anywhere else it would be one more machine to lose."""
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        return cls(Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here}))

    def evaluated(self, row: HistoryRow) -> None:
        """Tell the launcher; where it has gone the run soon hears of that elsewhere."""
        with suppress(RayActorError):  # or it is not reached right now: one line of progress
            self._queue.put(row)

    def cut(self) -> bool:
        """Whether the launcher has hung up."""
        try:
            ray.get(self._queue.actor.qsize.remote(), timeout=10)
        except ActorDiedError:
            return True
        except (RayActorError, GetTimeoutError):  # not reached right now
            return False
        return False

    def listen(self, heard: Callable[[HistoryRow], None]) -> None:
        """Hand on each evaluation until the other side has ended."""
        while (row := self._queue.get()) is not None:
            heard(row)

    def end(self) -> None:
        """No further evaluation comes."""
        try:
            self._queue.put(None)
        except ActorDiedError:  # the launcher hung up before
            return
        except RayActorError:  # not reached right now: better an error than a launcher that listens for ever
            self.close()

    def close(self) -> None:
        """Hang up."""
        ray.kill(self._queue.actor)


ATTEMPTS = 3
"""Times in a row that a run may lose workers without a newer checkpoint in between."""

PLACEMENT_MINUTES = 7 * 24 * 60
"""How long workers may wait for their resources. That they fit was asked before; spot machines may be away for days,
and on a full cluster a trial waits for the one before it."""

ABANDON_SECONDS = 60.0
"""How long an interrupted launcher lets the workers write their checkpoint."""

SETTINGS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # how soon the end or a death is seen; 2 s by default
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(60 * PLACEMENT_MINUTES),
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # each worker watches its own node, see `watch`
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths keep their meaning in a worker
}
"""Ray Train's settings by environment variable; what the user has set stays."""

LOST = (WorkerLost, RayActorError, WorkerHealthCheckFailedError, WorkerHealthCheckTimeoutError)
"""What is wrong with a worker that is gone, or whose peer is."""


class WorkerError(Exception):
    """An exception of one of several workers as text, with its traceback as a note: not every exception can travel."""


@dataclass(frozen=True)
class Job:
    """What a worker is told."""

    config: RunConfig
    checkpoints: str
    export: Path | None
    evaluated: Callable[[HistoryRow], None]
    """Called by the first worker."""
    abandoned: Sign
    until: int | None


def launch(
    config: RunConfig,
    *,
    checkpoints: str,
    on_evaluation: Callable[[HistoryRow], None],
    export: Path | None = None,
    until: int | None = None,
    abandoned: Sign = nobody_left,
) -> CellRecord:
    """Run a resolved configuration on `resources.workers` workers, from its checkpoint if it has one.

    With `until` it ends after that step, with its checkpoint written and a record that says `cut`. Every worker asks
    `abandoned` about once a second; when it is true all end after the step, with the checkpoint written.

    Needs a connection to a Ray cluster.

    Raises:
        UserError: for an input that is wrong.
        RunFailure: when workers find no place, or were lost `ATTEMPTS` times in a row without progress.
        Interrupted: when it was abandoned.
        WorkerError: for any other exception in one of several workers; a single worker's own is raised as it is.
    """
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    if config.resources.workers == 1:
        return _alone(Job(config, checkpoints, export, on_evaluation, abandoned, until))
    files = CheckpointFiles(checkpoints, config.cell)
    reached, lost = files.newest_step(), 0
    while True:
        try:
            return _together(config, checkpoints, on_evaluation, export, until, abandoned)
        except (train.TrainingFailedError, RayActorError) as error:
            cause = cause_of(error, config)
            if cause is not None:
                raise cause from None
            step = files.newest_step()
            lost = 1 if step > reached else lost + 1
            reached = step
            reason = describe_loss(error)
            if lost == ATTEMPTS:
                raise RunFailure(
                    f"workers were lost {ATTEMPTS} times in a row without a newer checkpoint, out of memory? lower "
                    f"batch.micro or give each worker more; the last time: {reason}"
                ) from error
            logger.warning("cell %s lost workers (%s); it goes on from step %d", config.cell, reason, step)


def cause_of(error: Exception, config: RunConfig) -> Exception | None:
    """What is wrong with the run itself; None where workers were merely lost, so that trying again makes sense.

    A worker that raises takes the others with it: one exception that is no loss is the cause of all.
    """
    if isinstance(error, train.WorkerGroupError):
        return next((failure for failure in error.worker_failures.values() if not isinstance(failure, LOST)), None)
    failure = error.controller_failure if isinstance(error, train.ControllerError) else error
    if isinstance(failure, WorkerGroupStartupTimeoutError):
        return RunFailure(f"{PLACEMENT_MINUTES} minutes were not enough to place {describe_need(config)}")
    return None if isinstance(failure, (WorkerGroupStartupFailedError, *LOST)) else failure


def describe_loss(error: Exception) -> str:
    """The kinds of a loss in a few words; the workers' logs say more."""
    failures = list(error.worker_failures.values()) if isinstance(error, train.WorkerGroupError) else [error]
    inner = [getattr(failure, "health_check_failure", failure) for failure in failures]
    return ", ".join(sorted({type(failure).__name__ for failure in inner}))


def describe_need(config: RunConfig) -> str:
    """The resources of a run's workers, for a person."""
    resources = config.resources
    gpus = f" and {resources.gpus_per_worker:g} GPU" if resources.gpus_per_worker else ""
    return f"{resources.workers} workers of {resources.cpus_per_worker:g} CPU{gpus} each"


def _alone(job: Job) -> CellRecord:
    trainer = TorchTrainer(
        _train_loop, train_loop_config={"job": job}, scaling_config=train.ScalingConfig(num_workers=0)
    )
    record: CellRecord = trainer.fit().return_value
    return record


def _together(
    config: RunConfig,
    checkpoints: str,
    on_evaluation: Callable[[HistoryRow], None],
    export: Path | None,
    until: int | None,
    abandoned: Sign,
) -> CellRecord:
    """One life of a worker group. However it is left, no worker trains on."""
    line = Line.from_here()
    outcome: Future[CellRecord | str] = Future()
    with tempfile.TemporaryDirectory(prefix="aang-train-", ignore_cleanup_errors=True) as folder:
        job = Job(config, checkpoints, export, line.evaluated, lambda: line.cut() or abandoned(), until)
        trainer = _trainer(job, folder)
        # On a thread of its own: `fit` takes over Ctrl-C otherwise, and this one hears of evaluations.
        fit = Thread(target=_fit, args=(trainer, line, outcome), name="fit", daemon=True)
        fit.start()
        try:
            line.listen(on_evaluation)
        finally:
            line.close()
            fit.join(ABANDON_SECONDS)
        result = outcome.result()
    if isinstance(result, str):
        raise Interrupted(result)
    return result


def _trainer(job: Job, folder: str) -> TorchTrainer:
    resources = job.config.resources
    share = {"CPU": resources.cpus_per_worker}
    if resources.gpus_per_worker:
        share["GPU"] = resources.gpus_per_worker
    return TorchTrainer(
        _train_loop,
        train_loop_config={"job": job},
        torch_config=TorchConfig(timeout_s=int(TIMEOUT.total_seconds())),
        scaling_config=train.ScalingConfig(
            num_workers=resources.workers, use_gpu=resources.gpus_per_worker > 0, resources_per_worker=share
        ),
        run_config=train.RunConfig(
            name=job.config.cell,
            storage_path=folder,
            # Train retries a bug as it does a lost machine; here `launch` tells them apart.
            failure_config=train.FailureConfig(max_failures=0, max_preemption_failures=0, controller_failure_limit=0),
            logging_config=train.LoggingConfig(log_level="ERROR"),
        ),
    )


def _fit(trainer: TorchTrainer, line: Line, outcome: Future[CellRecord | str]) -> None:
    try:
        outcome.set_result(trainer.fit().return_value)
    except BaseException as error:  # noqa: BLE001 (raised again by the thread that waits for the outcome)
        outcome.set_exception(error)
    finally:
        line.end()


def _train_loop(arguments: Mapping[str, Any]) -> CellRecord | str:
    """What every worker does; one of several that was told to stop says why."""
    job: Job = arguments["job"]
    workers = Workers.from_environment(choose_compute(job.config).device)
    try:
        with watching(node_drains, job.abandoned) as control:
            control.until = job.until
            return run_cell(
                job.config,
                on_evaluation=job.evaluated,
                checkpoints=job.checkpoints,
                export=job.export,
                control=control,
                workers=workers,
            )
    except (UserError, WorkerLost):
        raise
    except Interrupted as stop:
        if workers.size == 1:
            raise
        return stop.message  # Train takes whatever is raised for a failure
    except Exception as error:
        if workers.size == 1:
            raise
        told = WorkerError(f"{type(error).__name__}: {error}")
        told.add_note(f"in worker {workers.rank}:\n{traceback.format_exc()}")
        raise told from None
