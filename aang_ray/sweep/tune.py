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
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from signal import Signals
from types import SimpleNamespace
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler

from aang_ray.config import RunConfig
from aang_ray.errors import RunFailure
from aang_ray.store import CellIsDone, Store
from aang_ray.sweep.cluster import check_fits, has_autoscaler, keep_logs, living_nodes, own_cluster
from aang_ray.sweep.plan import Need, PlannedCell, duration, trials_at_once
from aang_ray.sweep.progress import Evaluation, SweepProgress
from aang_ray.sweep.search import Searches
from aang_ray.sweep.spec import Asha
from aang_ray.sweep.track import Tracking
from aang_ray.sweep.trial import tune_trial
from aang_ray.train.control import StopSignals
from aang_ray.train.record import LOG_LINES, failed_record

AHEAD = 8
"""Trials of a cluster that wait for resources beyond those that run: their requests make an autoscaler add nodes."""

RETRIES = 3
"""How often in all a cell is tried again whose process died."""

WAIT_SECONDS = 60.0
"""How long runs may take to write their checkpoints when the sweep stops; then they are ended as they are."""

CRASHED = (
    "the process ended unexpectedly: out of memory? lower batch.micro, or run fewer trials at once by a larger "
    "resources.cpus"
)

Ends = Mapping[str, Mapping[str, Any]]
"""Cell -> the last report of its trial: `status` (`done`, `elsewhere`, `cut` or `failed`), scores, `error`."""


@dataclass
class Engine:
    """Ray Tune on the cluster that this process is connected to."""

    store: Store
    progress: SweepProgress
    needs: Sequence[Need]
    """The resources of all trials to come."""
    max_hours: float | None = None
    """No trial starts after so many hours, and running ones stop; None: no limit."""
    keep_models: bool = False
    """Whether runs keep their models in the store."""
    tracking: Tracking | None = None
    """The trackers that get every evaluation."""
    scratch: Path | None = None
    """Folder of a cluster of our own, whose logs are kept after failures."""

    def __post_init__(self) -> None:
        self.callback = SweepCallback(self.store, self.progress, self.tracking)
        self._nodes = living_nodes()
        self._at_once = trials_at_once(self.needs, self._nodes)

    def run_grid(self, left: Sequence[PlannedCell], done: Sequence[PlannedCell], asha: Asha | None) -> Ends:
        """Run cells in the order of the plan, those with the same need together.

        Together, because the workers of a trial with several of them wait as long as smaller trials take the places.

        Args:
            left: The cells to run.
            done: The cells that are done, with which those of `left` compete under `asha`.
            asha: Cut runs of the less promising configurations short; None: run all to their end.

        Raises:
            UserError: A trial fits neither a node of the cluster nor one that it could get.
            Interrupted, KeyboardInterrupt: After SIGTERM or Ctrl-C.
        """
        cells = sorted(left, key=lambda cell: Need.of(cell.config))
        trials, more = [self.trial(cell) for cell in cells], {}
        if asha is not None:
            scheduler = BracketScheduler([*done, *left], asha)
            scheduler.replay(self.store, done)
            trials = [trial | scheduler.parameters(cell.config) for trial, cell in zip(trials, cells, strict=True)]
            more["scheduler"] = scheduler
        return self._fit(None, param_space={"trial": tune.grid_search(trials)}, **more)

    def run_search(self, searches: Searches) -> Ends:
        """Run the cells that a search asks for, until it has finished. Raises as `run_grid`."""
        searches.trial_of, self.callback.failed = self.trial, searches.fail
        return self._fit(searches)

    def trial(self, cell: PlannedCell) -> dict[str, Any]:
        """The parameters of a cell's trial.

        Trials on a cluster of our own share all cores of this machine; on another's each keeps to what it reserves.
        """
        self.callback.cells[cell.cell] = cell
        need, resources = Need.of(cell.config), cell.config.resources
        cores = sum(int(node.get("CPU", 1.0)) for node in self._nodes) if own_cluster() else 1
        threads = resources.threads or max(cores // (self._at_once * need.workers), int(need.cpus), 1)
        cpus = need.worker_cpus if need.nested else resources.cpus_per_worker
        changes = {"threads": threads, "cpus_per_worker": cpus}
        config = cell.config.model_copy(update={"resources": resources.model_copy(update=changes)})
        return {"cell": cell.cell, "run": config.model_dump_json(), "rungs": [], "keep": self.keep_models, **need.trial}

    def concurrency(self, *, ahead: bool) -> int | None:
        """How many trials Tune may have at once, those that wait for resources included; None: no limit.

        On another's cluster a trial of one process waits in a placement group, so nodes that join are used at once. The
        process of a trial with several workers needs next to nothing itself, so the number of such trials is bounded by
        how many the nodes hold.

        Args:
            ahead: Whether trials may wait although no resources are free. Tune hands a process from one trial to the
                next only if the next one waits already; a search, however, should decide late.
        """
        if any(need.nested for need in self.needs):
            return self._at_once + (AHEAD if not own_cluster() and has_autoscaler() else 0)
        if own_cluster():
            return 2 * self._at_once if ahead else self._at_once
        return None

    def _fit(self, searches: Searches | None, *, param_space: Any = None, **tune_config: Any) -> Ends:
        """Run Tune to its end, on a grid or on what a search asks for."""
        from aang_ray.train.workers.launch import Channel

        check_fits(self.needs)
        if searches is None:  # of a search one trial waits, which is Tune's default
            os.environ.setdefault("TUNE_MAX_PENDING_TRIALS_PG", str(AHEAD))
        else:
            tune_config |= {"search_alg": searches, "num_samples": -1}
        channel = Channel.open()

        def tell_trials() -> None:
            if searches is not None:
                searches.closed = True
            channel.close()

        with (
            StopSignals() as signals,
            # In the folder of our own cluster, which goes away even if this process is ended with Ray.
            tempfile.TemporaryDirectory(prefix="aang-tune-", dir=self.scratch, ignore_cleanup_errors=True) as folder,
        ):
            stopper = SweepStopper(self.callback, self.progress, tell_trials, signals, self.max_hours)
            tune.Tuner(
                tune.with_resources(
                    tune.with_parameters(tune_trial, store=self.store.uri, channel=channel),
                    lambda config: {"cpu": config["trial"]["cpu"], "gpu": config["trial"]["gpu"]},
                ),
                param_space=param_space,
                tune_config=tune.TuneConfig(
                    max_concurrent_trials=self.concurrency(ahead=searches is None),
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
        if self.callback.cannot_write:
            raise RunFailure(
                f"the sweep has stopped: {self.callback.cannot_write}; when that is mended, run the same command again"
            )
        ends = self.callback.ends
        if self.scratch and (self.callback.losses or any(end["status"] == "failed" for end in ends.values())):
            self.progress.line(f"Ray's logs: {keep_logs(self.scratch, self.store.uri)}")
        return ends


@dataclass(eq=False)
class SweepCallback(tune.Callback):  # type: ignore[misc]  # Ray has no type information
    """Tune callback that shows progress, and writes a failed row for each trial whose process died too often.

    What trials report is described in `trial.run_and_store`.
    """

    store: Store
    progress: SweepProgress
    tracking: Tracking | None = None
    cells: dict[str, PlannedCell] = field(default_factory=dict)
    """Cells that have trials."""
    failed: Callable[[str], None] = lambda cell: None
    """Is called with a cell whose process died too often."""
    alive: set[str] = field(default_factory=set)
    """Trials whose functions run; other trials may wait for resources."""
    ends: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    """See `Ends`."""
    losses: int = 0
    """How often a trial's process died."""
    cannot_write: str = ""
    """Why the first trial that could not write its files could not. The sweep then stops."""
    _last: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    """By trial: its last report."""

    def __getstate__(self) -> dict[str, Any]:
        """Tune pickles its callbacks for a restore, which is never made; a terminal cannot be pickled."""
        return {}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial has a process, a new one or one that it shares with earlier trials."""
        self.alive.add(trial.trial_id)
        fresh: dict[str, Any] = {"scores": (), "end_task_weights": (), "weights": {}}
        self.progress.update(self._cell(trial).cell, state="running", step=0, score=None, loss=None, **fresh)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: Mapping[str, Any], **info: Any
    ) -> None:
        """A trial has started, was evaluated, came to a rung, or ended."""
        cell = self._cell(trial)
        self._last[trial.trial_id] = dict(result)
        place = {"host": result.get("hostname", ""), "pid": result.get("pid", 0)}
        evaluation = Evaluation.of_report(result)
        if evaluation is not None:
            self.progress.evaluated(cell.cell, evaluation, **place)
            if self.tracking is not None:
                self.tracking.evaluated(cell, evaluation)
        else:
            changes = {name: result[name] for name in ("step", "seconds", "loss") if result.get(name) is not None}
            self.progress.update(cell.cell, **place, **changes)
        if result.get("resumed"):
            self.progress.resumed(cell.cell, result["step"])
            self.progress.line(f"{cell.title} · continues from step {result['step']}")
        if "status" in result:
            self._end(cell, result)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial's function has returned, or Tune's scheduler has ended the trial at a rung."""
        self.alive.discard(trial.trial_id)
        last = self._last.get(trial.trial_id, {})
        if "rung" in last and "status" not in last:
            self._end(self._cell(trial), {**last, "status": "cut"})

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial's process died, and Tune tries the trial again."""
        self.alive.discard(trial.trial_id)
        self.losses += 1
        # Ray does not count a machine whose end was announced.
        times = f", {trial.num_failures} of {RETRIES} times" if trial.num_failures else ""
        self._wait(self._cell(trial), f"{describe_crash(_account(trial))} · tried again{times}")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial's process died, and Tune does not try again. (An exception of a cell is no error of its trial.)"""
        self.alive.discard(trial.trial_id)
        self.losses += 1
        cell, last, times = self._cell(trial), self._last.get(trial.trial_id, {}), trial.num_failures
        if "status" in last:  # it died after its row was written
            return
        if times <= RETRIES:  # Tune does not retry a trial that it gave to a used process which had just died
            self._wait(cell, "the process that it was given had died · the same command runs it again")
            return
        account = _account(trial)
        error = describe_crash(account) + (f"; it was tried {times} times" if times > 1 else "")
        # The record keeps the last lines only: Ray's account of the death stands last.
        record = failed_record(cell.config, error, "\n".join([*_last_lines(last.get("actor")), account]))
        end = {"status": "failed", "error": record.result.error}
        try:
            self.store.write(record)
        except CellIsDone:  # another process wrote the row, or the process died after it wrote it
            end = {"status": "elsewhere"}
        except OSError as problem:  # the store cannot be written right now: the next start runs the cell again
            end["error"] = f"{record.result.error}; its row was not written: {problem}"
        self._end(cell, end)
        if end["status"] == "failed":
            self.failed(cell.cell)

    def _cell(self, trial: Any) -> PlannedCell:
        return self.cells[trial.config["trial"]["cell"]]

    def _end(self, cell: PlannedCell, result: Mapping[str, Any]) -> None:
        match result["status"]:
            case "not started":  # the sweep was stopping
                self.progress.update(cell.cell, state="waiting")
            case "cannot write":
                self.progress.update(cell.cell, state="stopped")
                self.cannot_write = self.cannot_write or str(result["error"])
            case "stopped":
                self.progress.update(cell.cell, state="stopped")
                self.progress.line(f"{cell.title} · stopped, its checkpoint is written")
            case _:
                self.ends[cell.cell] = result
                if self.tracking is not None:
                    self.tracking.ended(cell, result)
                self.progress.ended(cell, describe_end(result))

    def _wait(self, cell: PlannedCell, reason: str) -> None:
        self.progress.update(cell.cell, state="waiting")
        self.progress.line(f"lost: {cell.title} · {reason}")


def describe_end(result: Mapping[str, Any]) -> str:
    """How a cell ended, in one line; scores in percent."""
    match result["status"]:
        case "done":
            mark = " · stayed at the majority class" if result.get("majority") else ""
            scores = f"dev {100 * result['dev']:.2f} · test {100 * result['test']:.2f} {result['metric']}"
            return f"{scores} · {duration(result['seconds'])}{mark}"
        case "cut":
            score = "no dev score yet" if result.get("dev") is None else f"dev {100 * result['dev']:.2f} so far"
            return f"cut short after step {result['step']} · {score}"
        case "elsewhere":
            return "done already, by another process"
        case _:
            return f"FAILED: {result['error']}"


def describe_crash(account: str) -> str:
    """One line from Ray's account of a trial's end: the likely cause, or the account's own last line."""
    if "died" in account or "killed" in account.lower():
        return CRASHED
    lines = [line.strip() for line in account.splitlines() if line.strip()]
    return f"the trial could not run: {lines[-1] if lines else 'Ray gave no reason'}"


def _account(trial: Any) -> str:
    """Ray's account of the last failure of a trial; its file has all of them."""
    text = Path(trial.error_file).read_text(encoding="utf-8") if trial.error_file else ""
    return text[max(text.rfind("Failure #"), 0) :].strip()


def _last_lines(actor: str | None) -> list[str]:
    """The last lines that a process printed on stderr, from the node it ran on, or why there are none."""
    from ray.util.state import get_log
    from ray.util.state.exception import RayStateApiException

    if actor is None:
        return ["its process never started"]
    try:
        # By the address of this cluster: without one Ray refuses where another instance runs on the machine.
        address = ray.get_runtime_context().gcs_address
        return "".join(get_log(address, actor_id=actor, suffix="err", tail=LOG_LINES)).splitlines()
    except (RayStateApiException, OSError, TimeoutError) as error:
        return [f"its log could not be read: {type(error).__name__}: {error}"]


class BracketScheduler(FIFOScheduler):  # type: ignore[misc]  # Ray has no type information
    """Starts trials in order, and ends one at a rung if the `ASHAScheduler` of its bracket decides so.

    A bracket is one row and one column of the table, so no baseline is cut because another method does better. A row
    with a single configuration has no rungs, so no seed of a method is cut because another seed does better. One
    scheduler a bracket, because Ray's has one ranking for all trials.
    """

    def __init__(self, cells: Iterable[PlannedCell], asha: Asha) -> None:
        """Compare `cells`, all of the sweep."""
        super().__init__()
        self._asha = asha
        self._groups: dict[str, set[str]] = defaultdict(set)
        for cell in cells:
            self._groups[_bracket(cell.config)].add(cell.config.group)
        rules = {"max_t": 1.0, "grace_period": asha.grace, "reduction_factor": asha.reduction}
        self._schedulers: dict[str, Any] = defaultdict(
            partial(ASHAScheduler, time_attr="rung", metric="dev", mode="max", **rules)
        )

    def parameters(self, config: RunConfig) -> dict[str, Any]:
        """What a trial of a run is told: the bracket's name and the run's rungs."""
        name = _bracket(config)
        return {"bracket": name, "rungs": self._asha.rungs(config) if len(self._groups[name]) > 1 else []}

    def replay(self, store: Store, done: Sequence[PlannedCell]) -> None:
        """Let cells that are done compete: at each rung with the best score of their history until then."""
        metric = {cell.cell: cell.config.data.metric or "accuracy" for cell in done}
        history: dict[str, list[tuple[int, float]]] = defaultdict(list)
        for row in store.history(metric).to_pylist():
            score = row[f"dev_{metric[row['cell']]}"]
            if score is not None:  # a stage that dev does not decide has none
                history[row["cell"]].append((row["step"], score))
        for cell in done:
            trial = SimpleNamespace(trial_id=cell.cell, config={"trial": self.parameters(cell.config)})
            self.on_trial_add(None, trial)
            for share, step in trial.config["trial"]["rungs"]:
                if scores := [score for at, score in history[cell.cell] if at <= step]:
                    self.on_trial_result(None, trial, {"rung": share, "dev": max(scores)})

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """A trial is new, or is tried again."""
        self._schedulers[trial.config["trial"]["bracket"]].on_trial_add(tune_controller, trial)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Decide at a rung whether a trial continues; other reports decide nothing."""
        told = trial.config["trial"]
        scheduler = self._schedulers[told["bracket"]]
        if result.get("status") == "done":  # a run that ended before its last rungs counts there, too
            for share, _ in told["rungs"]:
                scheduler.on_trial_result(tune_controller, trial, {**result, "rung": share})
            return str(FIFOScheduler.CONTINUE)
        return str(scheduler.on_trial_result(tune_controller, trial, result))


def _bracket(config: RunConfig) -> str:
    """Return the name of a run's bracket: its row in the table without n, its task, and its encoder.

    `n`, `class_weights` and `max_tokens` are choices within a row, as in the table.
    """
    row = config.row_name.removesuffix(f" n={config.n}") if config.method.auxiliary else config.row_name
    data = config.data.model_dump_json(exclude={"class_weights", "max_tokens"})
    return "\n".join((row, data, config.encoder.model_dump_json()))


@dataclass(eq=False)
class SweepStopper(tune.Stopper):  # type: ignore[misc]  # Ray has no type information
    """Ends the sweep after a signal, when its time is up, or when a trial cannot write its files.

    Tune ends trials without giving them time to write anything. So the trials are first told to stop by themselves, and
    Tune's loop continues until those that ran have ended, or `WAIT_SECONDS` are over.
    """

    callback: SweepCallback
    """Knows which trials run."""
    progress: SweepProgress
    tell_trials: Callable[[], None]
    """Tells all trials to stop."""
    signals: StopSignals
    max_hours: float | None

    def __post_init__(self) -> None:
        self._ends = math.inf if self.max_hours is None else time.monotonic() + 3600 * self.max_hours
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
            signal = self.signals.received
            if signal is None and now < self._ends and not self.callback.cannot_write:
                return False
            self._began, self._waits_for = now, frozenset(self.callback.alive)
            self.tell_trials()
            if running := len(self._waits_for):
                runs = "1 run writes its checkpoint" if running == 1 else f"{running} runs write their checkpoints"
                hurry = "; Ctrl-C again does not wait" if signal == Signals.SIGINT else ""
                self.progress.line(f"stopping: {runs}{hurry}")
        return not self._waits_for & self.callback.alive or now - self._began > WAIT_SECONDS
