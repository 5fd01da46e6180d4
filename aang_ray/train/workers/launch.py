"""Starts the processes that train a run, and starts them again when some were lost.

A run of one worker trains in the calling process. A run of several is a Ray `TorchTrainer`; three kinds of processes
take part in it:

- the caller (`aang train`, or a trial of a sweep) waits in `launch` and calls `on_evaluation`;
- Ray Train's controller, an actor, starts the workers and collects what they report (`SendEvaluations`);
- the workers, actors too, train (`_train_loop`) and call `ray.train.report` after every evaluation.

A `Channel` connects the caller with the others. A run that lost workers continues from the cell's own checkpoint:
nothing is read back from Ray's storage, which is a temporary folder.
"""

from __future__ import annotations

import logging
import os
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray import train
from ray.exceptions import ActorDiedError, GetTimeoutError, RayActorError, RayError
from ray.train.torch import TorchConfig, TorchTrainer
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

if TYPE_CHECKING:

    class UserCallback:
        """Ray carries no types; this stands for its base class."""

else:
    from ray.train import UserCallback

ATTEMPTS = 3
"""Number of consecutive losses of workers, without a newer checkpoint in between, after which a run has failed."""

PLACEMENT_SECONDS = 7 * 24 * 3600
"""How long workers may wait for their resources: spot machines may be away for days, and on a full cluster a trial
waits for the one before it. That the cluster could hold the workers at all was checked before."""

STOP_SECONDS = 60.0
"""How long an interrupted caller waits for the workers to write their checkpoint."""

POLL_SECONDS = 1.0
"""Time between two checks for a reason to stop: a spot machine gives two minutes' notice, but a person waits for
Ctrl-C."""

SETTINGS = {
    # How often the controller polls its workers. A report waits for the next poll: 0.1 s each, 1.8 s by default.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(PLACEMENT_SECONDS),
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # every worker checks its own node, see `watching`
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths keep their meaning in a worker
}
"""Environment variables that configure Ray Train; a value that the user has set stays."""

Check = Callable[[], bool]
OnEvaluation = Callable[[HistoryRow], None]

logger = logging.getLogger(__name__)


class WorkerError(Exception):
    """An exception of one of several workers as text, with its traceback as a note: not every exception can be sent."""


class Channel:
    """Connects a process that waits with the processes that work for it: evaluations go to it, its stop goes to them.

    It is a queue in an actor. Closing it ends the actor, which every process that holds the channel can notice.
    """

    def __init__(self, queue: Queue) -> None:
        self._queue = queue

    @classmethod
    def open(cls) -> Channel:
        """Return a channel whose actor runs on this node: elsewhere it would be one more machine that can be lost."""
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        return cls(Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here}))

    def send(self, row: HistoryRow) -> None:
        """Send an evaluation to the process that waits; without effect once it has closed the channel."""
        with suppress(RayActorError):  # or the actor cannot be reached right now, which costs one line of progress
            self._queue.put(row)

    def receive(self, finished: Check, pause: float = 0.2) -> Iterator[HistoryRow]:
        """Yield evaluations as they come, until `finished` is true and all that were sent before are yielded."""
        while True:
            last = finished()  # asked before the queue is read, so that nothing is left in it
            yield from self._queue.get_nowait_batch(self._queue.size())
            if last:
                return
            time.sleep(pause)

    def closed(self) -> bool:
        """Return whether the process that waits has closed the channel or died: the work is to stop."""
        try:
            ray.get(self._queue.actor.qsize.remote(), timeout=10)
        except ActorDiedError:
            return True
        except (RayActorError, GetTimeoutError):  # it cannot be reached right now
            return False
        return False

    def close(self) -> None:
        """Tell the processes at the other end to stop."""
        ray.kill(self._queue.actor)


class SendEvaluations(UserCallback):
    """Ray Train callback, run by the controller, that sends the first worker's evaluations over a channel."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        self.channel.send(metrics[0]["evaluation"])


@contextmanager
def watching(draining: Check, abandoned: Check, pause: float = POLL_SECONDS) -> Iterator[RunControl]:
    """Yield flags that a thread sets as soon as one of the checks is true; a flag that is set stays set.

    Args:
        draining: Whether the machine will go away soon.
        abandoned: Whether nobody waits for the run any more.
        pause: Seconds between two rounds of checks.
    """
    control, over = RunControl(), threading.Event()

    def check() -> None:
        while not over.wait(pause):
            control.draining = control.draining or draining()
            control.stop = control.stop or abandoned()

    thread = threading.Thread(target=check, name="watch", daemon=True)
    thread.start()
    try:
        yield control
    finally:
        over.set()
        thread.join()


def never() -> bool:
    """Return False: the caller outlives its run."""
    return False


def node_drains() -> bool:
    """Return whether this process's node will go away (a spot notice, `ray drain-node`); False outside of Ray.

    Nothing public tells: `ray.train.get_preemption_info` is a collective call of a worker group, and a run of one
    worker has none.
    """
    from ray._private.state import state  # Ray Train's own watcher asks here, too

    if not ray.is_initialized():
        return False
    try:
        return ray.get_runtime_context().get_node_id() in state.get_draining_nodes()
    except (RayError, RuntimeError) as error:
        logger.warning("Ray does not say whether this node drains: %s", error)  # the head restarts; asked again soon
        return False


@dataclass(frozen=True)
class Job:
    """What a process needs to know to train a run."""

    config: RunConfig
    checkpoints: str
    export: Path | None
    until: int | None
    abandoned: Check


def launch(
    config: RunConfig,
    *,
    checkpoints: str,
    on_evaluation: OnEvaluation,
    export: Path | None = None,
    until: int | None = None,
    abandoned: Check = never,
) -> CellRecord:
    """Run a resolved configuration on `resources.workers` workers, from its checkpoint if it has one.

    Needs a connection to a Ray cluster if there are several workers.

    Args:
        config: The run.
        checkpoints: Folder or URI of the checkpoints of all cells.
        on_evaluation: Called in this process after every evaluation.
        export: Folder that receives the classifier.
        until: Stop after this step, with the checkpoint written; the record's status is then `cut`.
        abandoned: Whether nobody waits for the run any more. Every worker calls it about once a second; when it
            returns true all of them write the checkpoint and end.

    Returns:
        The record of the run; also of one that failed as a run, such as by a loss that is not finite.

    Raises:
        UserError: For an input that is wrong.
        RunFailure: If workers could not be started, or were lost `ATTEMPTS` times in a row without progress.
        Interrupted: When the run was abandoned.
        WorkerError: For any other exception in one of several workers; that of a single worker is raised as it is.
    """
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    job = Job(config, checkpoints, export, until, abandoned)
    if config.resources.workers == 1:
        return _train(job, on_evaluation, Workers.alone())
    files, losses = CheckpointFiles(checkpoints, config.cell), 0
    step = files.newest_step()
    while True:
        try:
            return _train_group(job, on_evaluation)
        except (train.TrainingFailedError, RayActorError) as error:
            bug = error_of_run(error, config)
            if bug is not None:
                raise bug from None
            before, step = step, files.newest_step()
            losses = 1 if step > before else losses + 1
            reason = describe_loss(error)
            if losses == ATTEMPTS:
                raise RunFailure(
                    f"workers were lost {ATTEMPTS} times in a row without a newer checkpoint, out of memory? lower "
                    f"batch.micro or give each worker more; the last time: {reason}"
                ) from error
            logger.warning("cell %s lost workers (%s); it goes on from step %d", config.cell, reason, step)


def error_of_run(error: Exception, config: RunConfig) -> Exception | None:
    """Return what is wrong with the run itself; None if workers were merely lost and another attempt makes sense.

    A worker that raises takes the others with it, so one exception that is no loss is the cause of all. Workers raise
    nothing but `UserError`, `WorkerError` and `WorkerLost` (see `_train_loop`); whatever else Ray Train reports is the
    loss of a process.
    """
    if isinstance(error, train.WorkerGroupError):
        failures = error.worker_failures.values()
        return next((failure for failure in failures if isinstance(failure, (UserError, WorkerError))), None)
    failure = error.controller_failure if isinstance(error, train.ControllerError) else error
    if isinstance(failure, RayActorError):  # a worker died while the group started, or the controller itself
        return None
    resources = config.resources
    gpus = f" and {resources.gpus_per_worker:g} GPU" if resources.gpus_per_worker else ""
    need = f"{resources.workers} workers of {resources.cpus_per_worker:g} CPU{gpus} each"
    return RunFailure(f"Ray Train could not start or keep {need}: {type(failure).__name__}: {failure}")


def describe_loss(error: Exception) -> str:
    """Return the kinds of errors of a loss in a few words; the workers' logs have the details."""
    failures = [getattr(error, "controller_failure", error)]
    if isinstance(error, train.WorkerGroupError):
        failures = list(error.worker_failures.values())
    # Ray Train wraps the error of a worker that no longer answers.
    return ", ".join(sorted({type(getattr(failure, "health_check_failure", failure)).__name__ for failure in failures}))


def _train_group(job: Job, on_evaluation: OnEvaluation) -> CellRecord:
    """Train on a new group of workers. However this function ends, no worker trains on."""
    channel = Channel.open()
    outcome: Future[CellRecord | str] = Future()
    with tempfile.TemporaryDirectory(prefix="aang-train-", ignore_cleanup_errors=True) as folder:
        stops = replace(job, abandoned=lambda: channel.closed() or job.abandoned())
        trainer = _trainer(stops, SendEvaluations(channel), folder)
        # In another thread: `fit` in the main thread would handle Ctrl-C itself and kill the workers.
        fit = threading.Thread(target=_fit, args=(trainer, outcome), name="fit", daemon=True)
        fit.start()
        try:
            for row in channel.receive(finished=outcome.done):
                on_evaluation(row)
        finally:
            channel.close()
            fit.join(STOP_SECONDS)
        result = outcome.result()
    if isinstance(result, str):
        raise Interrupted(result)
    return result


def _trainer(job: Job, callback: UserCallback, folder: str) -> TorchTrainer:
    resources = job.config.resources
    share = {"CPU": resources.cpus_per_worker}
    if resources.gpus_per_worker:
        share["GPU"] = resources.gpus_per_worker
    # Losses are counted in `launch`: Ray Train would retry a bug as well, and would not retry a worker that died while
    # the group started. It retries a failed start itself.
    failures = train.FailureConfig(max_failures=0, max_preemption_failures=0, controller_failure_limit=ATTEMPTS - 1)
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
            callbacks=[callback],
            failure_config=failures,
            logging_config=train.LoggingConfig(log_level="ERROR"),
        ),
    )


def _fit(trainer: TorchTrainer, outcome: Future[CellRecord | str]) -> None:
    try:
        outcome.set_result(trainer.fit().return_value)
    except BaseException as error:  # noqa: BLE001 (raised again by the thread that waits for the outcome)
        outcome.set_exception(error)


def _train_loop(arguments: Mapping[str, Any]) -> CellRecord | str:
    """Train as one worker of a group; return the record, or the message of a run that was told to stop."""
    job: Job = arguments["job"]
    context = train.get_context()
    rank = context.get_world_rank()

    def report(row: HistoryRow) -> None:  # every worker must report, but what the first one says is enough
        train.report({"evaluation": row} if rank == 0 else {})

    try:
        return _train(job, report, Workers.connect(rank, context.get_world_size(), choose_compute(job.config).device))
    except (UserError, WorkerLost):
        raise
    except Interrupted as stop:
        return stop.message  # Ray Train takes any exception for a failure
    except Exception as error:  # noqa: BLE001 (raised again in a form that can be sent)
        told = WorkerError(f"{type(error).__name__}: {error}")
        told.add_note(f"in worker {rank}:\n{traceback.format_exc()}")
        raise told from None


def _train(job: Job, on_evaluation: OnEvaluation, workers: Workers) -> CellRecord:
    """Run the cell in this process, as one of `workers`."""
    with watching(node_drains, job.abandoned) as control:
        control.until = job.until
        return run_cell(
            job.config,
            on_evaluation=on_evaluation,
            checkpoints=job.checkpoints,
            export=job.export,
            control=control,
            workers=workers,
        )
