"""Which runs ASHA cuts, how many trials run at once, and how a sweep stops."""

from __future__ import annotations

import io
import pickle
from collections.abc import Sequence
from pathlib import Path
from signal import SIGINT, SIGTERM, Signals
from types import SimpleNamespace
from typing import Any, cast

import pytest
from rich.console import Console

from aang_ray.config import RunConfig, parse_config
from aang_ray.store import CellRecord, Store
from aang_ray.sweep import tune as module
from aang_ray.sweep.plan import Need, PlannedCell
from aang_ray.sweep.progress import SweepProgress
from aang_ray.sweep.spec import Asha
from aang_ray.sweep.tune import AHEAD, WAIT_SECONDS, BracketScheduler, Engine, SweepCallback, SweepStopper
from aang_ray.train.control import StopSignals
from tests.sweep.conftest import done_record, fake_resolve, history_row

ASHA = Asha(grace=0.1, reduction=3)
"""Of 60 steps, evaluated after every sixth: rungs at steps 6, 18 and 54."""

RATES = [1e-5, 2e-5, 3e-5]


def config(rate: float = 1e-4, seed: int = 0, **more: Any) -> RunConfig:
    mapping = {"method": "finetune", "optim": {"body_lr": rate}, "schedule": {"eval_every": 6}, "seed": seed}
    return fake_resolve(parse_config({**mapping, **more}, "test"))


def planned(*configs: RunConfig) -> list[PlannedCell]:
    return [PlannedCell(one, one.cell, "waiting") for one in configs]


class Runs:
    """Trials that report the scores of a test to a scheduler."""

    def __init__(self, cells: list[PlannedCell], store: Store | None = None, done: Sequence[PlannedCell] = ()) -> None:
        self.scheduler = BracketScheduler([*done, *cells], ASHA)
        if store is not None:
            self.scheduler.replay(store, done)
        self.trials = {
            cell.cell: SimpleNamespace(trial_id=cell.cell, config={"trial": self.scheduler.parameters(cell.config)})
            for cell in cells
        }
        for trial in self.trials.values():
            self.scheduler.on_trial_add(None, trial)

    def rung(self, cell: PlannedCell, number: int, dev: float) -> str:
        trial = self.trials[cell.cell]
        share, step = trial.config["trial"]["rungs"][number]
        return self.report(cell, rung=share, step=step, dev=dev)

    def report(self, cell: PlannedCell, **result: Any) -> str:
        return self.scheduler.on_trial_result(None, self.trials[cell.cell], result)


def test_at_a_rung_only_the_best_third_goes_on() -> None:
    cells = planned(*(config(rate) for rate in RATES))
    runs = Runs(cells)
    assert runs.rung(cells[0], 0, 0.5) == "CONTINUE", "the first has no rival yet"
    assert runs.rung(cells[1], 0, 0.6) == "CONTINUE"
    assert runs.rung(cells[2], 0, 0.4) == "STOP"
    assert runs.rung(cells[0], 1, 0.9) == "CONTINUE"
    assert runs.rung(cells[1], 1, 0.8) == "STOP"


def test_evaluations_between_rungs_decide_nothing() -> None:
    cells = planned(*(config(rate) for rate in RATES))
    runs = Runs(cells)
    runs.rung(cells[0], 0, 0.9)
    assert runs.report(cells[1], step=12, seconds=1.0, score=0.1) == "CONTINUE"
    assert runs.report(cells[1], status="failed", error="loss is nan", step=12) == "CONTINUE"


def test_rows_of_a_table_do_not_compete() -> None:
    fine = planned(*(config(rate) for rate in RATES))
    static = planned(*(config(rate, method="static") for rate in RATES))
    labelled = planned(*(config(rate, label="mine", n=2) for rate in RATES))
    runs = Runs([*fine, *static, *labelled])
    assert runs.rung(static[0], 0, 0.9) == "CONTINUE"
    assert runs.rung(fine[0], 0, 0.5) == "CONTINUE"
    assert runs.rung(labelled[0], 0, 0.1) == "CONTINUE"
    assert runs.rung(fine[1], 0, 0.4) == "STOP"


def test_variants_of_a_method_with_rows_of_their_own_do_not_compete() -> None:
    plain = planned(*(config(rate, method="static") for rate in RATES))
    last_stage = planned(*(config(rate, method="static", final_finetune={"steps": 5}) for rate in RATES))
    sizes = planned(*(config(method="static", n=n) for n in (2, 3)))
    brackets = BracketScheduler([*plain, *last_stage, *sizes], ASHA)
    names = [{brackets.parameters(cell.config)["bracket"] for cell in cells} for cells in (plain, last_stage, sizes)]
    assert [len(name) for name in names] == [1, 1, 1]
    assert names[0] == names[2], "n is a choice within a row"
    assert names[0] != names[1]


def test_a_configuration_without_a_rival_has_no_rungs() -> None:
    cells = planned(config(seed=0), config(seed=1), *(config(rate, method="static") for rate in RATES))
    brackets = BracketScheduler(cells, ASHA)
    assert [len(brackets.parameters(cell.config)["rungs"]) for cell in cells] == [0, 0, 3, 3, 3]


def test_runs_of_different_lengths_compete_at_equal_shares() -> None:
    short = config(schedule={"eval_every": 5, "steps": 20})
    cells = planned(config(1e-5), short, config(3e-5))
    runs = Runs(cells)
    assert runs.trials[cells[1].cell].config["trial"]["rungs"][0] == (0.1, 5)
    assert runs.rung(cells[1], 0, 0.9) == "CONTINUE"
    assert runs.rung(cells[0], 0, 0.5) == "STOP"


def test_a_run_that_ends_early_counts_at_all_rungs() -> None:
    cells = planned(*(config(rate) for rate in RATES))
    runs = Runs(cells)
    assert runs.report(cells[0], status="done", dev=0.9, step=12) == "CONTINUE"
    assert [runs.rung(cells[1], number, 0.5) for number in range(3)] == ["STOP"] * 3


def test_done_cells_of_the_store_count_with_their_best_score_until_each_rung(tmp_path: Path) -> None:
    store = Store(tmp_path)
    cells = planned(*(config(rate) for rate in RATES))
    store.write(CellRecord(done_record(cells[0].config).result, tuple(map(history_row, (6, 12, 18)))))
    runs = Runs(cells[1:], store, cells[:1])
    for rung in range(3):
        assert runs.rung(cells[1], rung, 0.74) == "STOP"
        assert runs.rung(cells[2], rung, 0.76) == "CONTINUE"


def engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *needs: Need, own: bool, grows: bool = False) -> Engine:
    """A Tune engine on two nodes of two CPUs."""
    monkeypatch.setattr(module, "living_nodes", lambda: [{"CPU": 2.0}] * 2)
    monkeypatch.setattr(module, "own_cluster", lambda: own)
    monkeypatch.setattr(module, "has_autoscaler", lambda: grows)
    return Engine(Store(tmp_path), SweepProgress(str(tmp_path), "nightly", "key", Console(quiet=True)), needs)


def test_how_many_trials_tune_may_have(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    one, pair = Need(1, 1.0, 0.0), Need(2, 1.0, 0.0)

    def concurrency(*needs: Need, own: bool, grows: bool = False, ahead: bool = True) -> int | None:
        return engine(monkeypatch, tmp_path, *needs, own=own, grows=grows).concurrency(ahead=ahead)

    assert concurrency(*[one] * 9, own=True) == 8, "as many again wait, to take over a process at once"
    assert concurrency(*[one] * 9, own=True, ahead=False) == 4
    assert concurrency(*[one] * 9, own=False) is None, "nodes that join are used"
    assert concurrency(*[pair] * 9, own=False) == 2
    assert concurrency(*[pair] * 9, own=False, grows=True) == 2 + AHEAD
    assert concurrency(pair, own=True) == 1


def test_what_a_trial_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (cell,) = planned(config(resources={"workers": 2, "cpus_per_worker": 1.0}))
    (alone,) = planned(config())
    trial = engine(monkeypatch, tmp_path, Need.of(cell.config), own=True).trial(cell)
    run = RunConfig.model_validate_json(trial["run"])
    assert (trial["cell"], trial["cpu"], trial["gpu"]) == (cell.cell, 0.0001, 0.0)
    assert (run.cell, run.resources.threads, run.resources.cpus_per_worker) == (cell.cell, 2, 0.99)
    for own, threads in ((True, 4), (False, 1)):  # one trial alone has all cores of a machine of our own
        trial = engine(monkeypatch, tmp_path, Need.of(alone.config), own=own).trial(alone)
        assert RunConfig.model_validate_json(trial["run"]).resources.threads == threads


class Stopping:
    """Two running trials, with a clock that only the test moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, store: Path, max_hours: float | None = None) -> None:
        self.now, self.told = 1000.0, 0
        self.signals = StopSignals()
        monkeypatch.setattr("time.monotonic", lambda: self.now)
        self.alive = {"one", "two"}
        self.stream = io.StringIO()
        progress = SweepProgress(str(store), "nightly", "key", Console(file=self.stream, width=300))
        self.stopper = SweepStopper(cast(SweepCallback, self), progress, self.tell, self.signals, max_hours)

    def tell(self) -> None:
        self.told += 1


def test_a_sweep_that_nobody_stops_goes_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sweep = Stopping(monkeypatch, tmp_path)
    sweep.now += 1e9
    assert not sweep.stopper.stop_all()
    assert not sweep.stopper("trial", {"step": 1})
    assert (sweep.told, sweep.stream.getvalue()) == (0, "")


@pytest.mark.parametrize(("signal", "hurry"), [(SIGINT, "; Ctrl-C again does not wait"), (SIGTERM, "")])
def test_after_a_signal_the_runs_are_told_once_and_have_a_minute(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, signal: Signals, hurry: str
) -> None:
    sweep = Stopping(monkeypatch, tmp_path)
    sweep.signals.received = signal
    assert not sweep.stopper.stop_all()
    sweep.now += WAIT_SECONDS
    assert not sweep.stopper.stop_all()
    sweep.now += 1
    assert sweep.stopper.stop_all()
    assert sweep.told == 1
    assert sweep.stream.getvalue() == f"stopping: 2 runs write their checkpoints{hurry}\n"


def test_when_the_time_is_up_it_ends_the_same_way(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sweep = Stopping(monkeypatch, tmp_path, max_hours=0.5)
    sweep.now += 1799
    assert not sweep.stopper.stop_all()
    assert sweep.told == 0
    sweep.now += 1
    assert not sweep.stopper.stop_all()
    assert sweep.told == 1
    assert sweep.stream.getvalue() == "stopping: 2 runs write their checkpoints\n"


def test_trials_that_wait_for_a_node_are_not_waited_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sweep = Stopping(monkeypatch, tmp_path)
    sweep.alive, sweep.signals.received = set(), SIGINT
    assert sweep.stopper.stop_all()
    assert sweep.stream.getvalue() == ""


def test_it_ends_with_the_last_run_that_ran_when_it_began(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sweep = Stopping(monkeypatch, tmp_path)
    sweep.signals.received = SIGTERM
    assert not sweep.stopper.stop_all()
    sweep.alive = {"two"}
    assert not sweep.stopper.stop_all()
    sweep.alive = {"three"}  # Tune starts what waits; such a trial ends at once
    assert sweep.stopper.stop_all()


def test_tune_may_pickle_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert isinstance(pickle.loads(pickle.dumps(Stopping(monkeypatch, tmp_path).stopper)), SweepStopper)
