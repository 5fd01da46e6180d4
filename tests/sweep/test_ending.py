"""When a sweep ends before its time, and how."""

from __future__ import annotations

import io
import pickle
from signal import SIGINT, SIGTERM, Signals
from typing import cast

import pytest
from rich.console import Console

from aang_ray.config import parse_config
from aang_ray.sweep.ending import WAIT_SECONDS, Ending
from aang_ray.sweep.jobs import Grid
from aang_ray.sweep.monitor import Monitor
from aang_ray.sweep.plan import PlannedCell
from aang_ray.sweep.progress import SweepProgress
from aang_ray.sweep.queue import Queue
from tests.sweep.conftest import fake_resolve


class Sweep:
    """Two of three cells run (as its monitor it says so); the clock stands unless a test turns it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, max_hours: float | None = None) -> None:
        self.now, self.hung_up = 1000.0, 0
        self.signal: Signals | None = None
        monkeypatch.setattr("time.monotonic", lambda: self.now)
        configs = [fake_resolve(parse_config({"method": "finetune", "seed": seed}, "test")) for seed in range(3)]
        cells = [PlannedCell(config, config.cell, "waiting") for config in configs]
        self.queue = Queue(Grid(cells), lambda need: 2)
        self.alive = 2
        self.stream = io.StringIO()
        progress = SweepProgress(cells, Console(file=self.stream, width=300))
        self.ending = Ending(self.queue, cast(Monitor, self), progress, self.hang_up, self.received, max_hours)

    def received(self) -> Signals | None:
        return self.signal

    def hang_up(self) -> None:
        self.hung_up += 1


def test_a_sweep_that_nobody_stops_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = Sweep(monkeypatch)
    sweep.now += 1e9
    assert not sweep.ending.stop_all()
    assert not sweep.ending("trial", {"step": 1})
    assert (sweep.hung_up, sweep.stream.getvalue()) == (0, "")


@pytest.mark.parametrize(("signal", "hurry"), [(SIGINT, "; Ctrl-C again does not wait"), (SIGTERM, "")])
def test_after_a_signal_the_runs_are_told_once_and_have_a_minute(
    monkeypatch: pytest.MonkeyPatch, signal: Signals, hurry: str
) -> None:
    sweep = Sweep(monkeypatch)
    sweep.signal = signal
    assert not sweep.ending.stop_all()
    assert sweep.queue.take() is None
    sweep.now += WAIT_SECONDS
    assert not sweep.ending.stop_all()
    sweep.now += 1
    assert sweep.ending.stop_all()
    assert sweep.hung_up == 1
    assert sweep.stream.getvalue() == f"stopping: 2 runs write their checkpoints{hurry}\n"


def test_when_the_time_is_up_it_ends_the_same_way(monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = Sweep(monkeypatch, max_hours=0.5)
    sweep.now += 1799
    assert not sweep.ending.stop_all()
    assert sweep.hung_up == 0
    sweep.now += 1
    assert not sweep.ending.stop_all()
    assert sweep.hung_up == 1
    assert sweep.stream.getvalue() == "stopping: 2 runs write their checkpoints\n"


def test_trials_that_wait_for_a_node_are_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = Sweep(monkeypatch)
    assert sweep.queue.take() is not None
    sweep.alive, sweep.signal = 0, SIGINT
    assert sweep.ending.stop_all()
    assert sweep.stream.getvalue() == ""


def test_it_ends_with_the_last_run(monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = Sweep(monkeypatch)
    sweep.signal = SIGTERM
    assert not sweep.ending.stop_all()
    sweep.alive = 1
    assert not sweep.ending.stop_all()
    sweep.alive = 0
    assert sweep.ending.stop_all()


def test_tune_may_pickle_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(pickle.loads(pickle.dumps(Sweep(monkeypatch).ending)), Ending)
