"""A sweep or a trial that is killed at any moment continues where it ended: no run is repeated or lost."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path

import pytest

from aang_ray.store import Store
from aang_ray.sweep.tune import RETRIES
from tests.integration.conftest import Start, Started, progress_of

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]

METHODS, SEEDS, STEPS = ("finetune", "static"), 3, 80
TWO_AT_ONCE = {"RAY_OVERRIDE_RESOURCES": '{"CPU": 2}'}
"""However many cores the machine has."""
CELLS = len(METHODS) * SEEDS


class Sweeps:
    """Runs of one sweep on one store, one after the other."""

    def __init__(self, start: Start, file: Path, store: Path, environment: Mapping[str, str]) -> None:
        self._start, self._file, self._environment = start, file, environment
        self.store = store

    def go(self, checkpoint_minutes: float = 0) -> Started:
        """Start the sweep; 0 minutes: a checkpoint after every step."""
        command = [sys.executable, "jobs/sweep.py", str(self._file), "--store", str(self.store)]
        return self._start([*command, "--set", f"resources.checkpoint_minutes={checkpoint_minutes}"], self._environment)

    def rows(self) -> dict[Path, tuple[int, bytes]]:
        """Time and content of every visible file of results."""
        return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in self.store.glob("results/*/*/*.parquet")}

    def titles(self) -> list[str]:
        """Names of the finished cells as the sweep prints them. Reading them also checks that every row is complete."""
        rows = Store(self.store).results().to_pylist()
        assert len({row["cell"] for row in rows}) == len(rows)
        assert all(row["status"] == "done" for row in rows)
        return [f"task · {row['row']} · seed {row['seed']} · " for row in rows]

    def begun(self) -> dict[str, int]:
        """Step of the newest checkpoint of the cells that have one and no row, by cell."""
        done = Store(self.store).done()
        found: dict[str, int] = {}
        for folder in self.store.glob(".checkpoints/*"):
            if folder.name in done:
                continue
            with suppress(FileNotFoundError):  # the cell ends at this moment, and its checkpoints go
                steps = [int(name.split("-")[1]) for name in os.listdir(folder) if fnmatch(name, "last-*.pt")]
                found |= {folder.name: max(steps)} if steps else {}
        return found

    def running(self, what: str = "pid") -> dict[str, int]:
        """Process of each running cell that has reported, or another field of the progress file."""
        cells = progress_of(self.store).values()
        return {cell["cell"]: cell[what] for cell in cells if cell["state"] == "running" and cell["pid"]}

    def temporary(self) -> bool:
        """Whether a row is being written under its temporary name right now."""
        try:
            with os.scandir(self.store) as entries:
                return any(entry.name.startswith(".tmp-") for entry in entries)
        except FileNotFoundError:
            return False


def while_renaming(sweeps: Sweeps, running: Started) -> None:
    """Wait until a row's temporary file exists, or at least another row does."""
    running.wait_for(sweeps.rows, 90, pause=0.01)
    before = len(sweeps.rows())
    running.wait_for(lambda: sweeps.temporary() or len(sweeps.rows()) > before, 90, pause=0.0)


def in_training(sweeps: Sweeps, running: Started) -> None:
    """Wait until a cell is in the middle of its steps."""
    before = set(sweeps.begun())

    def midst() -> bool:
        return any(10 <= step <= STEPS // 2 for cell, step in sweeps.begun().items() if cell not in before)

    running.wait_for(midst, 90, pause=0.01)


def test_killed_twice_then_finished(
    start: Start, sweep_file: Callable[..., Path], environment: dict[str, str], tmp_path: Path
) -> None:
    environment |= TWO_AT_ONCE
    sweeps = Sweeps(start, sweep_file(METHODS, SEEDS, steps=STEPS), tmp_path / "store", environment)
    kept: dict[Path, tuple[int, bytes]] = {}
    finished: list[str] = []
    for moment in (while_renaming, in_training):
        running = sweeps.go()
        moment(sweeps, running)
        running.kill()
        assert not [title for title in finished if title in running.output], "a finished cell ran again"
        rows = sweeps.rows()
        assert kept.items() <= rows.items(), "a row was lost or written again"
        kept, finished = rows, sweeps.titles()
    begun = sweeps.begun()
    assert finished
    assert begun
    last = sweeps.go()
    assert last.wait(400) == 0, last.output
    assert f"{CELLS} cells, {len(finished)} of them done" in last.output
    assert not [title for title in finished if title in last.output], "a finished cell ran again"
    steps = [int(line.rpartition(" ")[2]) for line in last.output.splitlines() if "continues from step" in line]
    assert sorted(steps) == sorted(begun.values()), "each cell that was started continues from its checkpoint"
    assert kept.items() <= sweeps.rows().items()
    assert len(sweeps.titles()) == len(sweeps.rows()) == CELLS
    assert not sweeps.begun()
    again = sweeps.go()
    assert again.wait(150) == 0, again.output
    assert f"all {CELLS} cells are done" in again.output
    assert "| finetune" in again.output


def test_a_killed_trial_is_tried_again_and_an_interruption_ends_cleanly(
    start: Start, sweep_file: Callable[..., Path], environment: dict[str, str], tmp_path: Path
) -> None:
    # No evaluation ever, so that a cell never comes further, as far as the sweep can see.
    endless = {"steps": 10_000_000, "eval_every": 10_000_000}
    file = sweep_file(
        ["finetune"], 2, steps=10_000_000, grid={f"schedule.{key}": [value] for key, value in endless.items()}
    )
    sweeps = Sweeps(start, file, tmp_path / "store", environment | TWO_AT_ONCE)
    running = sweeps.go()
    running.wait_for(lambda: len(sweeps.begun()) == 2, 120)
    (victim, *others) = sorted(sweeps.begun())
    killed: set[int] = set()

    def another() -> bool:
        """The killed trial has a new process, and the sweep knows it."""
        told = running.output.count("continues from step") >= len(killed)
        return "FAILED" in running.output or (told and sweeps.running().get(victim, 0) not in {0, *killed})

    while "FAILED" not in running.output:
        assert len(killed) < 20
        running.wait_for(another, 90)
        pid = sweeps.running().get(victim)
        if pid is not None and pid not in killed:  # soon after its first report: before it trains
            os.kill(pid, 9)
            killed.add(pid)
    lost = [line for line in running.output.splitlines() if line.startswith("lost: ")]
    assert [line[-12:] for line in lost[-RETRIES:]] == [f"{time} of {RETRIES} times" for time in range(1, RETRIES + 1)]
    assert "continues from step" in running.output
    (row,) = Store(sweeps.store).results().to_pylist()
    assert (row["cell"], row["status"]) == (victim, "failed")
    assert "the process ended unexpectedly: out of memory? lower batch.micro" in row["error"]
    assert victim in row["log_tail"], "the process's own log"
    running.wait_for(lambda: set(sweeps.running()) >= set(others), 60)  # the sweep goes on
    running.interrupt()
    assert running.wait(150) == 130, running.output
    assert running.output.count("stopped, its checkpoint is written") == len(others)
    assert "interrupted; what has finished is in the store, the same command continues from there" in running.output
    assert "Traceback" not in running.output


def test_stopped_runs_write_their_checkpoints_first(
    start: Start, sweep_file: Callable[..., Path], environment: dict[str, str], tmp_path: Path
) -> None:
    file = sweep_file(["static"], 1, steps=10_000_000, grid={"resources.workers": [2]})
    sweeps = Sweeps(start, file, tmp_path / "store", environment | TWO_AT_ONCE)
    running = sweeps.go(checkpoint_minutes=1000)
    running.wait_for(lambda: any(sweeps.running("step").values()), 150)
    (evaluated,) = sweeps.running("step").values()
    running.terminate()
    assert running.wait(150) == 143, running.output
    assert "stopping: 1 run writes its checkpoint" in running.output
    assert "stopped, its checkpoint is written" in running.output
    assert "Traceback" not in running.output
    (step,) = sweeps.begun().values()
    assert step >= evaluated > 0
    again = sweeps.go(checkpoint_minutes=1000)
    again.wait_for(lambda: f"continues from step {step}" in again.output, 150)
