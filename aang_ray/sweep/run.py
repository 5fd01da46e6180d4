"""Running what a strategy chooses as Ray Tune trials, side by side, on whatever cluster there is."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console

from aang_ray.errors import UserError
from aang_ray.store import Store
from aang_ray.sweep.capacity import Capacity, check_placeable, describe_nodes
from aang_ray.sweep.cluster import own_cluster, ray_cluster
from aang_ray.sweep.jobs import Job, Strategy
from aang_ray.sweep.needs import Need, trials_at_once
from aang_ray.sweep.progress import SweepProgress
from aang_ray.sweep.queue import Queue
from aang_ray.train.control import StopSignals


@dataclass(frozen=True)
class Ends:
    """How the cells ended that had jobs in this run of a sweep."""

    status: Mapping[str, str] = field(default_factory=dict)
    """Cell -> how its last job ended: `done`, `elsewhere`, `cut` or `failed`."""
    errors: Mapping[str, str] = field(default_factory=dict)
    """Failed cell -> its error in one line."""


def run_jobs(
    strategy: Strategy,
    needs: Sequence[Need],
    store: Store,
    console: Console,
    progress: SweepProgress,
    max_hours: float | None,
) -> Ends:
    """Run the jobs of a strategy until it has no more, as many at once as the cluster has room for.

    `needs` are those of its cells. After `max_hours`, Ctrl-C or SIGTERM no trial starts and running ones end with their
    checkpoints written: running the sweep again goes on from there.

    Raises:
        UserError: when a trial fits neither a node of the cluster nor one that it could get.
        Interrupted, KeyboardInterrupt: after SIGTERM or Ctrl-C.
    """
    with ray_cluster():
        from aang_ray.sweep.ending import Ending
        from aang_ray.sweep.feeder import Feeder
        from aang_ray.sweep.monitor import Monitor
        from aang_ray.train.workers.launch import Channel

        capacity = Capacity()
        check_fits(needs, capacity)
        at_once = trials_at_once(needs, capacity.nodes)
        queue = Queue(strategy, capacity.room)
        feeder = Feeder(queue, _parameters(at_once, capacity))
        monitor = Monitor(queue, feeder.jobs, store, progress)
        line = Channel.open()
        # Tune wants a folder for its own bookkeeping. Nothing is ever read back from it: the store remembers.
        with (
            StopSignals() as signals,
            tempfile.TemporaryDirectory(prefix="aang-tune-", ignore_cleanup_errors=True) as folder,
            progress,
        ):
            ending = Ending(queue, monitor, progress, line.close, lambda: signals.received, max_hours)
            _fit(feeder, {"store": store.uri, "line": line}, monitor, ending, folder)
        return Ends(monitor.ended, monitor.errors)


def _fit(feeder: Any, told: Mapping[str, Any], monitor: Any, ending: Any, folder: str) -> None:
    from ray import tune

    from aang_ray.sweep.trial import tune_trial

    trainable = tune.with_resources(
        tune.with_parameters(tune_trial, **told), lambda params: {"cpu": params["cpu"], "gpu": params["gpu"]}
    )
    tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(
            search_alg=feeder,
            num_samples=-1,  # until the queue has no more
            reuse_actors=True,  # a trial after the first starts in 0.1 s, not in 2-4 s
            trial_name_creator=lambda trial: trial.config["cell"],
            trial_dirname_creator=lambda trial: f"{trial.config['cell']}-{trial.trial_id}",
        ),
        run_config=tune.RunConfig(name="sweep", storage_path=folder, verbose=0, callbacks=[monitor], stop=ending),
    ).fit()


def _parameters(at_once: int, capacity: Capacity) -> Callable[[Job], dict[str, Any]]:
    """What a trial is told. Trials of this machine share all its cores; on a cluster each keeps to what it reserves."""
    cores = sum(int(node.get("CPU", 1.0)) for node in capacity.nodes) if own_cluster() else 1

    def prepare(job: Job) -> dict[str, Any]:
        need, resources = job.need, job.cell.config.resources
        threads = resources.threads or max(cores // (at_once * need.workers), int(need.cpus), 1)
        told = {"threads": threads, "cpus_per_worker": need.worker_cpus if need.nested else resources.cpus_per_worker}
        config = job.cell.config.model_copy(update={"resources": resources.model_copy(update=told)})
        return {
            "cell": job.cell.cell,
            "run": config.model_dump_json(),
            "until": job.until,
            "cpu": need.trial["cpu"],
            "gpu": need.trial["gpu"],
        }

    return prepare


def check_fits(needs: Sequence[Need], capacity: Capacity) -> None:
    """A trial that never fits would wait for ever. This machine does not grow, another's cluster may.

    Raises:
        UserError: for a trial that fits neither a node nor one that the cluster could get.
    """
    if not own_cluster():
        check_placeable(needs)
        return
    for need in set(needs):
        if not need.held_by(capacity.nodes):
            raise UserError(f"resources: a trial needs {need}, this machine has {describe_nodes(capacity.nodes)}")
