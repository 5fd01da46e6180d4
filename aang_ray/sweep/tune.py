"""Ray Tune as the engine of a sweep: trials side by side, retries, early stopping of runs, stopping of the sweep.

Tune schedules, the store remembers. Nothing is ever read back from Tune's own folder, which is temporary: a sweep that
is started again gives Tune the cells that are not done, and each continues from its own checkpoint.
"""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from signal import Signals
from types import SimpleNamespace
from typing import Any

from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler
from rich.console import Console

from aang_ray.config import RunConfig
from aang_ray.errors import RunFailure
from aang_ray.store import Store
from aang_ray.sweep.callback import RETRIES, SweepCallback
from aang_ray.sweep.cluster import KeptLogs, check_fits, has_autoscaler, living_nodes, own_cluster, ray_cluster
from aang_ray.sweep.plan import Need, PlannedCell, trials_at_once
from aang_ray.sweep.progress import ProgressFile, ProgressLines
from aang_ray.sweep.search import Searches
from aang_ray.sweep.spec import Asha
from aang_ray.sweep.trial import tune_trial
from aang_ray.train.control import StopSignals

AHEAD = 8
"""Trials of a cluster that wait for resources beyond those that run: their requests make an autoscaler add nodes."""

WAIT_SECONDS = 60.0
"""How long runs may take to write their checkpoints when the sweep stops; then they are ended as they are."""


@dataclass(frozen=True)
class Sweep:
    """What the trials of a sweep have in common."""

    store: Store
    console: Console
    lines: ProgressLines
    file: ProgressFile
    max_hours: float | None
    """No trial starts after so many hours, and running ones stop; None: no limit."""


@dataclass(frozen=True)
class Ends:
    """How the cells ended that had trials in this run of a sweep."""

    status: Mapping[str, str] = field(default_factory=dict)
    """Cell -> how its trial ended: `done`, `elsewhere`, `cut` or `failed`."""
    errors: Mapping[str, str] = field(default_factory=dict)
    """Failed cell -> its error in one line."""


def run_grid(sweep: Sweep, left: Sequence[PlannedCell], done: Sequence[PlannedCell], asha: Asha | None) -> Ends:
    """Run cells in the order of the plan, those with the same need together.

    Together, because the workers of a trial with several of them wait as long as smaller trials keep taking the places.

    Args:
        sweep: what the trials have in common.
        left: the cells to run.
        done: the cells that are done, which the runs of `left` compete with under `asha`.
        asha: cut runs of the less promising configurations short; None: run all to their end.

    Raises:
        UserError: when a trial fits neither a node of the cluster nor one that it could get.
        Interrupted, KeyboardInterrupt: after SIGTERM or Ctrl-C.
    """
    cells = sorted(left, key=lambda cell: Need.of(cell.config))
    with _connected(sweep, [Need.of(cell.config) for cell in cells]) as engine:
        engine.callback.add(cells)
        if asha is None:
            return engine.fit(param_space={"trial": tune.grid_search([engine.trial(cell) for cell in cells])})
        brackets = Brackets([*done, *left], asha)
        trials = [engine.trial(cell) | brackets.parameters(cell.config) for cell in cells]
        scheduler = BracketScheduler(asha, brackets.past(sweep.store, done))
        return engine.fit(param_space={"trial": tune.grid_search(trials)}, scheduler=scheduler)


def run_search(sweep: Sweep, searches: Searches, needs: Sequence[Need]) -> Ends:
    """Run the cells that a search asks for; `needs` are those of all its trials to come. Raises as `run_grid`."""
    with _connected(sweep, needs) as engine:

        def trial_of(cell: PlannedCell) -> dict[str, Any]:
            engine.callback.add([cell])
            return engine.trial(cell)

        searches.trial_of = trial_of
        return engine.fit(search_alg=searches, num_samples=-1)  # until the search says that it has finished


class Engine:
    """Ray Tune on the cluster that this process is connected to."""

    def __init__(self, sweep: Sweep, needs: Sequence[Need], logs: KeptLogs) -> None:
        self.callback = SweepCallback(sweep.store, sweep.lines, sweep.file)
        self._sweep, self._needs, self._logs = sweep, needs, logs
        self._nodes = living_nodes()
        self._at_once = trials_at_once(needs, self._nodes)

    def trial(self, cell: PlannedCell) -> dict[str, Any]:
        """The parameters of a cell's trial.

        Trials on a cluster of our own share all cores of this machine; on another's each keeps to what it reserves.
        """
        need, resources = Need.of(cell.config), cell.config.resources
        cores = sum(int(node.get("CPU", 1.0)) for node in self._nodes) if own_cluster() else 1
        threads = resources.threads or max(cores // (self._at_once * need.workers), int(need.cpus), 1)
        cpus = need.worker_cpus if need.nested else resources.cpus_per_worker
        changes = {"threads": threads, "cpus_per_worker": cpus}
        config = cell.config.model_copy(update={"resources": resources.model_copy(update=changes)})
        return {"cell": cell.cell, "run": config.model_dump_json(), "rungs": [], **need.trial}

    def concurrency(self, *, ahead: bool) -> int | None:
        """How many trials Tune may have at once, those that wait for resources included; None: no limit.

        On another's cluster a trial of one process waits in a placement group, so nodes that join are used at once. The
        process of a trial with several workers needs next to nothing itself, so the number of such trials is bounded by
        how many the nodes hold.

        Args:
            ahead: whether trials may wait although no resources are free. Tune hands a process from one trial to the
                next only if the next one waits already; a search, however, should decide late.
        """
        if any(need.nested for need in self._needs):
            return self._at_once + (AHEAD if not own_cluster() and has_autoscaler() else 0)
        if own_cluster():
            return 2 * self._at_once if ahead else self._at_once
        return None

    def fit(self, *, param_space: dict[str, Any] | None = None, **tune_config: Any) -> Ends:
        """Run Tune to its end. Of `TuneConfig` only what differs between a grid and a search is given."""
        from aang_ray.train.workers.launch import Channel

        sweep, grid = self._sweep, param_space is not None
        if grid:  # of a search one trial waits, which is Tune's default
            os.environ.setdefault("TUNE_MAX_PENDING_TRIALS_PG", str(AHEAD))
        channel = Channel.open()

        def tell_trials() -> None:
            if not grid:
                tune_config["search_alg"].closed = True
            channel.close()

        with (
            StopSignals() as signals,
            tempfile.TemporaryDirectory(prefix="aang-tune-", ignore_cleanup_errors=True) as folder,
            sweep.lines,
        ):
            stopper = SweepStopper(self.callback, sweep.lines, tell_trials, lambda: signals.received, sweep.max_hours)
            tune.Tuner(
                tune.with_resources(
                    tune.with_parameters(tune_trial, store=sweep.store.uri, channel=channel),
                    lambda config: {"cpu": config["trial"]["cpu"], "gpu": config["trial"]["gpu"]},
                ),
                param_space=param_space,
                tune_config=tune.TuneConfig(
                    max_concurrent_trials=self.concurrency(ahead=grid),
                    reuse_actors=True,  # a trial after the first starts in 0.1 s, not in 2-4 s
                    trial_name_creator=lambda trial: trial.config["trial"]["cell"],
                    trial_dirname_creator=lambda trial: f"{trial.config['trial']['cell']}-{trial.trial_id}",
                    **tune_config,
                ),
                run_config=tune.RunConfig(
                    name="sweep",
                    storage_path=folder,
                    verbose=0,
                    callbacks=[self.callback],
                    failure_config=tune.FailureConfig(max_failures=RETRIES),
                    stop=stopper,
                ),
            ).fit()
        if self.callback.errors or self.callback.losses:
            kept = self._logs.keep(sweep.store.uri)
            if kept is not None:
                sweep.lines.line(f"Ray's logs: {kept}")
        if self.callback.cannot_write:
            raise RunFailure(
                f"the sweep has stopped: {self.callback.cannot_write}; when that is mended, run the same command again"
            )
        return Ends(self.callback.ended, self.callback.errors)


@contextmanager
def _connected(sweep: Sweep, needs: Sequence[Need]) -> Iterator[Engine]:
    """Tune on the cluster of RAY_ADDRESS or one of our own, after a check that it can hold the trials."""
    with ray_cluster() as logs:
        check_fits(needs)
        yield Engine(sweep, needs, logs)


class Brackets:
    """Which runs compete under ASHA: those of one row and one column of the table.

    So no baseline is cut because another method does better. A row with a single configuration has no rungs, so no
    seed of a method is cut because another seed does better.
    """

    def __init__(self, cells: Iterable[PlannedCell], asha: Asha) -> None:
        self._asha = asha
        self._groups: dict[str, set[str]] = defaultdict(set)
        for cell in cells:
            self._groups[self._name(cell.config)].add(cell.config.group)

    def parameters(self, config: RunConfig) -> dict[str, Any]:
        """What a trial of a run is told: the bracket's name and the run's rungs."""
        name = self._name(config)
        return {"bracket": name, "rungs": self._asha.rungs(config) if len(self._groups[name]) > 1 else []}

    def past(self, store: Store, done: Sequence[PlannedCell]) -> list[tuple[str, str, list[tuple[float, float]]]]:
        """Bracket, cell, and at each rung the best score until then, of cells that are done."""
        history: dict[str, list[tuple[int, float]]] = defaultdict(list)
        metric = {cell.cell: cell.config.data.metric or "accuracy" for cell in done}
        for row in store.history(metric).to_pylist():
            score = row[f"dev_{metric[row['cell']]}"]
            if score is not None:  # a stage that dev does not decide has none
                history[row["cell"]].append((row["step"], score))
        past = []
        for cell in done:
            told = self.parameters(cell.config)
            until = [
                (share, [score for at, score in history[cell.cell] if at <= step]) for share, step in told["rungs"]
            ]
            past.append((told["bracket"], cell.cell, [(share, max(scores)) for share, scores in until if scores]))
        return past

    def _name(self, config: RunConfig) -> str:
        """Return the name of a run's bracket: its row in the table without n, its task, and its encoder.

        `n`, `class_weights` and `max_tokens` are choices within a row, as in the table.
        """
        row = config.row_name.removesuffix(f" n={config.n}") if config.method.auxiliary else config.row_name
        data = config.data.model_dump_json(exclude={"class_weights", "max_tokens"})
        return "\n".join((row, data, config.encoder.model_dump_json()))


class BracketScheduler(FIFOScheduler):  # type: ignore[misc]  # Ray has no type information
    """Starts trials in order, and ends one at a rung if the `ASHAScheduler` of its bracket decides so.

    One scheduler a bracket, because Ray's has one ranking for all trials.
    """

    def __init__(self, asha: Asha, past: Iterable[tuple[str, str, list[tuple[float, float]]]]) -> None:
        """`past`: see `Brackets.past`."""
        super().__init__()
        self._asha = asha
        self._brackets: dict[str, Any] = {}
        for bracket, cell, scores in past:
            trial, scheduler = SimpleNamespace(trial_id=cell), self._scheduler(bracket)
            scheduler.on_trial_add(None, trial)
            for share, score in scores:
                scheduler.on_trial_result(None, trial, {"rung": share, "dev": score})

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """A trial is new, or is tried again."""
        self._scheduler(trial.config["trial"]["bracket"]).on_trial_add(tune_controller, trial)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Decide at a rung whether a trial goes on; other reports decide nothing."""
        told = trial.config["trial"]
        scheduler = self._scheduler(told["bracket"])
        if result.get("status") == "done":  # a run that ended before its last rungs counts there, too
            for share, _ in told["rungs"]:
                scheduler.on_trial_result(tune_controller, trial, {**result, "rung": share})
            return str(FIFOScheduler.CONTINUE)
        return str(scheduler.on_trial_result(tune_controller, trial, result))

    def _scheduler(self, bracket: str) -> Any:
        if bracket not in self._brackets:
            self._brackets[bracket] = ASHAScheduler(
                time_attr="rung",
                metric="dev",
                mode="max",
                max_t=1.0,
                grace_period=self._asha.grace,
                reduction_factor=self._asha.reduction,
            )
        return self._brackets[bracket]


class SweepStopper(tune.Stopper):  # type: ignore[misc]  # Ray has no type information
    """Ends the sweep after a signal, when its time is up, or when a trial cannot write its files.

    Tune ends trials without giving them time to write anything. So the trials are first told to stop by themselves, and
    Tune's loop goes on until those that ran have ended, or `WAIT_SECONDS` are over.
    """

    def __init__(
        self,
        callback: SweepCallback,
        lines: ProgressLines,
        tell_trials: Callable[[], None],
        received: Callable[[], Signals | None],
        max_hours: float | None,
    ) -> None:
        """Start the clock.

        Args:
            callback: knows which trials run.
            lines: where the stopper announces the end.
            tell_trials: tells all trials to stop.
            received: the signal that this process got, if any.
            max_hours: how long the sweep may take; None: no limit.
        """
        self._callback, self._lines, self._tell_trials, self._received = callback, lines, tell_trials, received
        self._ends = math.inf if max_hours is None else time.monotonic() + 3600 * max_hours
        self._began: float | None = None
        """When the stopping began."""
        self._waits_for: frozenset[str] = frozenset()

    def __getstate__(self) -> dict[str, Any]:
        """Tune pickles its stoppers for a restore, which is never made: the store remembers."""
        return {}

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """No single trial is ended for what it reports."""
        return False

    def stop_all(self) -> bool:
        """Whether Tune is to end what is left: trials that wait for resources, and those that did not stop in time."""
        now = time.monotonic()
        if self._began is None:
            signal = self._received()
            if signal is None and now < self._ends and not self._callback.cannot_write:
                return False
            self._began, self._waits_for = now, frozenset(self._callback.alive)
            self._tell_trials()
            if running := len(self._waits_for):
                runs = "1 run writes its checkpoint" if running == 1 else f"{running} runs write their checkpoints"
                hurry = "; Ctrl-C again does not wait" if signal == Signals.SIGINT else ""
                self._lines.line(f"stopping: {runs}{hurry}")
        return not self._waits_for & self._callback.alive or now - self._began > WAIT_SECONDS
