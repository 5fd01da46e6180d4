"""Starts the processes that train a run, and restarts them after some were lost.

A run with one worker trains in the calling process. A run with several workers is a Ray `TorchTrainer`: the caller
waits in `launch`; Ray Train's controller, an actor, starts the workers and collects their reports; the workers train. A
`Channel` connects all. A run that lost workers continues from the cell's own checkpoint; nothing is read from Ray's
storage, which is a temporary folder.
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
from typing import Any

import ray
from ray import train
from ray.exceptions import ActorDiedError, GetTimeoutError, RayActorError, RayError, RayTaskError
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.queue import Queue
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from aang_ray.config import RunConfig
from aang_ray.errors import RunFailure, UserError
from aang_ray.store import CellRecord, HistoryRow, NotWritten, WeightRow
from aang_ray.train.checkpoint import CheckpointFiles
from aang_ray.train.control import Interrupted, RunControl
from aang_ray.train.device import choose_compute
from aang_ray.train.process import set_up_process
from aang_ray.train.record import Heartbeat, OnEvaluation
from aang_ray.train.run import run_cell
from aang_ray.train.workers.group import TIMEOUT, WorkerLost, Workers

ATTEMPTS = 3
"""Number of consecutive losses of workers, without a newer checkpoint in between, after which a run has failed."""

PLACEMENT_SECONDS = 7 * 24 * 3600
"""Maximum time that workers wait for their resources: spot machines may be away for days, and on a full cluster a trial
waits for an earlier one. A check before the start ensures that the cluster is large enough.
"""

STOP_SECONDS = 60.0
"""Maximum time that an interrupted caller waits for the workers to write their checkpoint."""

POLL_SECONDS = 1.0
"""Time between two checks for a reason to stop. A spot machine gives two minutes' notice, but a user who pressed
Ctrl-C is waiting."""

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
Event = tuple[HistoryRow, WeightRow | None] | Heartbeat
"""What comes over a channel: an evaluation, or a sign of life."""
OnBeat = Callable[[Heartbeat], None]

logger = logging.getLogger(__name__)


class WorkerError(Exception):
    """An exception of one of several workers as text, which can always be pickled, with its traceback as a note."""


class Channel:
    """A queue in an actor, over which workers send evaluations to the process that waits for them.

    A closed channel tells them to stop: the actor is killed, which every process that has the channel can detect.
    """

    def __init__(self, queue: Queue) -> None:
        self._queue = queue

    @classmethod
    def open(cls) -> Channel:
        """Return a channel whose actor runs on this node, so that no other machine's loss can close it."""
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        return cls(Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here}))

    def send(self, event: Event) -> None:
        """Send an evaluation or a sign of life to the waiting process; nothing happens if the channel is closed."""
        # If the actor is only unreachable for the moment, one line of progress is lost.
        with suppress(RayActorError):
            self._queue.put(event)

    def receive(self, finished: Check, pause: float = 0.2) -> Iterator[Event]:
        """Yield what arrives. Stop when `finished` returns true and the queue is empty."""
        while True:
            last = finished()  # called before the queue is read, so that no evaluation is missed
            yield from self._queue.get_nowait_batch(self._queue.size())
            if last:
                return
            time.sleep(pause)

    def closed(self) -> bool:
        """Return whether the waiting process has closed the channel or died. Workers should then stop."""
        try:
            ray.get(self._queue.actor.qsize.remote(), timeout=10)
        except ActorDiedError:
            return True
        except (RayActorError, GetTimeoutError):  # the actor cannot be reached at the moment
            return False
        return False

    def close(self) -> None:
        """Tell the processes at the other end to stop."""
        ray.kill(self._queue.actor)


class SendEvaluations(train.UserCallback):  # type: ignore[misc]
    """Ray Train callback, run by the controller, that sends the first worker's evaluations over a channel."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        self.channel.send(metrics[0]["evaluation"])


@contextmanager
def watching(draining: Check, abandoned: Check, pause: float = POLL_SECONDS) -> Iterator[RunControl]:
    """Yield a `RunControl` whose flags a thread sets when a check, made every `pause` seconds, returns true."""
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


def node_drains() -> bool:
    """Return whether this process's node will go away (a spot notice, `ray drain-node`); False outside of Ray.

    Nothing public tells: `ray.train.get_preemption_info` is a collective call of a worker group.
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
    """The arguments of `launch` that each worker needs."""

    config: RunConfig
    checkpoints: str
    export: Path | None
    on_done: Callable[[CellRecord], object] | None
    until: int | None
    abandoned: Check
    on_beat: OnBeat | None = None
    keep: str | None = None


def launch(
    config: RunConfig,
    *,
    checkpoints: str,
    on_evaluation: OnEvaluation,
    on_beat: OnBeat | None = None,
    export: Path | None = None,
    keep: str | None = None,
    on_done: Callable[[CellRecord], object] | None = None,
    until: int | None = None,
    abandoned: Check = lambda: False,
) -> CellRecord:
    """Run a resolved configuration on `resources.workers` workers, from its checkpoint if it has one.

    With several workers, the process must be connected to a Ray cluster.

    Args:
        config: The resolved configuration.
        checkpoints: Folder or URI of the checkpoints of all cells.
        on_evaluation: Called in this process after every evaluation.
        on_beat: Called in this process with the step between evaluations, every ten seconds.
        export: Folder to which the classifier is written; None for no export.
        keep: URI of a store that keeps the classifier; None: it is not kept.
        on_done: Called in the first worker with the record of a finished run, before the export.
        until: Write the checkpoint and stop after this step; the record's status is then `cut`.
        abandoned: Returns whether the run should stop because its caller no longer waits; every worker asks once a
            second.

    Returns:
        The record of the run, with status `failed` after a failure such as a loss that is not finite.

    Raises:
        UserError: For a wrong input.
        RunFailure: Workers could not be started, or were lost `ATTEMPTS` times in a row without progress.
        NotWritten: The checkpoint or the export cannot be written.
        Interrupted: The run was abandoned.
        WorkerError: For any other exception in one of several workers. A single worker raises its exception as it is.
    """
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    job = Job(config, checkpoints, export, on_done, until, abandoned, on_beat, keep)
    if config.resources.workers == 1:
        return _train(job, on_evaluation, Workers())
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
            logger.warning("cell %s lost workers (%s); it continues from step %d", config.cell, reason, step)


def error_of_run(error: Exception, config: RunConfig) -> Exception | None:
    """Return the error in the run itself; None if workers were only lost, so that another attempt makes sense.

    Workers raise only `UserError`, `NotWritten`, `WorkerError` and `WorkerLost` (see `_train_loop`); anything else that
    Ray Train reports means that a process was lost. When one worker raises, the others raise `WorkerLost`.
    """
    if isinstance(error, train.WorkerGroupError):
        failures = error.worker_failures.values()
        return next(
            (failure for failure in failures if isinstance(failure, (UserError, NotWritten, WorkerError))), None
        )
    failure = error.controller_failure if isinstance(error, train.ControllerError) else error
    if isinstance(failure, RayActorError):  # a worker died while the group started, or the controller itself
        return None
    resources = config.resources
    gpus = f" and {resources.gpus_per_worker:g} GPU" if resources.gpus_per_worker else ""
    need = f"{resources.workers} workers of {resources.cpus_per_worker:g} CPU{gpus} each"
    return RunFailure(f"Ray Train could not start or keep {need}: {type(failure).__name__}: {failure}")


def describe_loss(error: Exception) -> str:
    """Return the errors of lost workers, separated by commas: their types, and what they say if no process died.

    Anything may be among them: what a worker sends is unpickled by Ray Train's controller, and what fails there counts
    as a loss of the worker.
    """
    failures = [getattr(error, "controller_failure", error)]
    if isinstance(error, train.WorkerGroupError):
        failures = list(error.worker_failures.values())
    # Ray Train wraps the error of a worker that no longer responds.
    causes = [getattr(failure, "health_check_failure", failure) for failure in failures]
    return ", ".join(sorted(set(map(_in_words, causes))))


def _in_words(error: BaseException) -> str:
    error = error.cause if isinstance(error, RayTaskError) else error
    name, said = type(error).__name__, str(error).strip()
    return name if isinstance(error, (RayActorError, WorkerLost)) or not said else f"{name}: {said.splitlines()[-1]}"


def _train_group(job: Job, on_evaluation: OnEvaluation) -> CellRecord:
    """Train on a new group of workers. When this function returns or raises, the workers have been told to stop."""
    channel = Channel.open()
    outcome: Future[CellRecord | str] = Future()
    # The workers get no reference to `job` itself: what it calls in this process, a bar for example, cannot be pickled.
    abandoned = job.abandoned
    with tempfile.TemporaryDirectory(prefix="aang-train-", ignore_cleanup_errors=True) as folder:
        stops = replace(job, abandoned=lambda: channel.closed() or abandoned(), on_beat=channel.send)
        trainer = _trainer(stops, SendEvaluations(channel), folder)
        # `fit` runs in another thread, because in the main thread it would handle Ctrl-C itself and kill the workers.
        fit = threading.Thread(target=_fit, args=(trainer, outcome), name="fit", daemon=True)
        fit.start()
        try:
            for event in channel.receive(finished=outcome.done):
                if isinstance(event, tuple):
                    on_evaluation(*event)
                elif job.on_beat is not None:
                    job.on_beat(event)
        finally:
            channel.close()
            fit.join(STOP_SECONDS)
        result = outcome.result()
    if isinstance(result, str):
        raise Interrupted(result)
    return result


def _trainer(job: Job, callback: SendEvaluations, folder: str) -> TorchTrainer:
    resources = job.config.resources
    share = {"CPU": resources.cpus_per_worker}
    if resources.gpus_per_worker:
        share["GPU"] = resources.gpus_per_worker
    # `launch` counts losses, because Ray Train would also retry after a bug, and would not retry after a worker died
    # while the group started. Ray Train itself retries a failed start.
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
    """Train as one worker of a group. Return the record, or the message of `Interrupted` if the run was stopped."""
    job: Job = arguments["job"]
    context = train.get_context()
    rank = context.get_world_rank()
    logger.info(set_up_process(job.config.resources))

    def report(row: HistoryRow, weights: WeightRow | None) -> None:
        # Every worker must report, but only the first one's report is used.
        train.report({"evaluation": (row, weights)} if rank == 0 else {})

    try:
        return _train(job, report, Workers.connect(rank, context.get_world_size(), choose_compute(job.config).device))
    except (UserError, NotWritten, WorkerLost):
        raise
    except Interrupted as stop:
        return stop.message  # Ray Train treats any exception as a failure
    except Exception as error:  # noqa: BLE001 (raised again in a form that can be sent)
        told = WorkerError(f"{type(error).__name__}: {error}")
        told.add_note(f"in worker {rank}:\n{traceback.format_exc()}")
        raise told from None


def _train(job: Job, on_evaluation: OnEvaluation, workers: Workers) -> CellRecord:
    """Run the cell in this process, which is one of `workers`."""
    with watching(node_drains, job.abandoned) as control:
        control.until = job.until
        return run_cell(
            job.config,
            on_evaluation=on_evaluation,
            on_beat=job.on_beat if workers.first else None,
            checkpoints=job.checkpoints,
            export=job.export,
            keep=job.keep,
            on_done=job.on_done,
            control=control,
            workers=workers,
        )
