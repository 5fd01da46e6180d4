"""Running a sweep: the waiting cells of a plan as Ray Tune trials, side by side."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from aang_ray.errors import UserError
from aang_ray.store import Store
from aang_ray.sweep.cluster import own_cluster, ray_cluster
from aang_ray.sweep.plan import PlannedCell, concurrency
from aang_ray.sweep.progress import SweepProgress


@dataclass(frozen=True)
class SweepOutcome:
    """How a sweep ended."""

    cells: int
    done: int
    """Cells with a done row, those of earlier sweeps included."""
    failed: Mapping[str, str]
    """Title of each failed cell -> its error."""

    @property
    def remaining(self) -> int:
        """Cells without a row."""
        return self.cells - self.done - len(self.failed)

    @property
    def exit_code(self) -> int:
        """0 when every cell is done, else 1."""
        return 0 if self.done == self.cells else 1


def run_sweep(
    cells: Sequence[PlannedCell], store: Store, console: Console, *, keep_failed: bool, max_hours: float | None
) -> SweepOutcome:
    """Run the cells that have no done row, as many at once as the cluster's resources hold.

    Failed cells run again unless `keep_failed`. After `max_hours` no trial starts and running ones are ended without
    a row: running the sweep again starts them anew.

    Raises:
        UserError: when this machine cannot hold a single trial.
    """
    waiting = [cell for cell in cells if cell.state == "waiting" or (cell.state == "failed" and not keep_failed)]
    ended: dict[str, str] = {}
    errors: dict[str, str] = {}
    if waiting:
        ended, errors = _run(waiting, store, console, max_hours)
    titles = {cell.cell: cell.title for cell in cells}
    failed = {titles[cell]: error for cell, error in errors.items()}
    for cell in cells:
        if cell.state == "failed" and keep_failed:
            failed[cell.title] = "failed before (kept)"
    done = sum(cell.state == "done" for cell in cells) + sum(status != "failed" for status in ended.values())
    return SweepOutcome(len(cells), done, failed)


def _run(
    waiting: Sequence[PlannedCell], store: Store, console: Console, max_hours: float | None
) -> tuple[dict[str, str], dict[str, str]]:
    """How each of the cells ended, and the errors of those that failed."""
    with ray_cluster() as resources, SweepProgress(waiting, console) as progress:
        from aang_ray.sweep.monitor import Monitor

        _check_fits(waiting, resources)
        at_once = concurrency([cell.config for cell in waiting], resources, len(waiting))
        # On this machine trials share all cores; on another's cluster each keeps to what it reserves.
        share = int(resources.get("CPU", 1.0)) // at_once if own_cluster() else 1
        monitor = Monitor(waiting, store, progress)
        # Tune wants a folder for its own bookkeeping. Nothing is ever read back from it: the store remembers.
        with tempfile.TemporaryDirectory(prefix="aang-tune-", ignore_cleanup_errors=True) as folder:
            _fit(waiting, store.uri, share, at_once, monitor, folder, max_hours)
        return monitor.ended, monitor.errors


def _fit(
    waiting: Sequence[PlannedCell],
    store: str,
    share: int,
    at_once: int,
    monitor: Any,
    folder: str,
    max_hours: float | None,
) -> None:
    from ray import tune

    from aang_ray.sweep.trial import tune_trial

    configs = [_trial_config(cell, share) for cell in waiting]
    reserved = [cell.config.resources for cell in waiting]
    trainable = tune.with_resources(
        tune.with_parameters(tune_trial, cells=configs, store=store),
        lambda params: {"cpu": reserved[params["index"]].cpus, "gpu": reserved[params["index"]].gpus},
    )
    tune.Tuner(
        trainable,
        param_space={"index": tune.grid_search(list(range(len(waiting))))},
        tune_config=tune.TuneConfig(
            reuse_actors=True,  # a trial after the first starts in 0.1 s, not in 2-4 s
            max_concurrent_trials=at_once,
            time_budget_s=max_hours * 3600 if max_hours is not None else None,
            trial_name_creator=lambda trial: waiting[trial.config["index"]].cell,
            trial_dirname_creator=lambda trial: waiting[trial.config["index"]].cell,
        ),
        run_config=tune.RunConfig(name="sweep", storage_path=folder, verbose=0, callbacks=[monitor]),
    ).fit()


def _trial_config(cell: PlannedCell, share: int) -> dict[str, Any]:
    """The cell's configuration with its number of threads: its own, else its share of the cores or what it reserves."""
    resources = cell.config.resources
    threads = resources.threads or max(share, int(resources.cpus), 1)
    return cell.config.model_copy(update={"resources": resources.model_copy(update={"threads": threads})}).model_dump(
        mode="json"
    )


def _check_fits(waiting: Sequence[PlannedCell], resources: Mapping[str, float]) -> None:
    """A trial that never fits would wait for ever. Another's cluster may still grow, so it is not judged."""
    if not own_cluster():
        return
    for cell in waiting:
        wanted = {"CPU": cell.config.resources.cpus, "GPU": cell.config.resources.gpus}
        for name, amount in wanted.items():
            if amount > resources.get(name, 0.0):
                there = resources.get(name, 0.0)
                raise UserError(f"resources.{name.lower()}s: a trial wants {amount:g}, this machine has {there:g}")
