"""A sweep that is killed at any moment goes on where it ended: nothing twice, nothing lost."""

from __future__ import annotations

import os
import random
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from aang_ray.store import Store
from tests.integration.conftest import Start, Started

pytestmark = [pytest.mark.integration, pytest.mark.timeout(400)]

METHODS, SEEDS = ("finetune", "static"), 5
CELLS = len(METHODS) * SEEDS


class Sweeps:
    """Runs of one sweep on one store, one after the other."""

    def __init__(self, start: Start, file: Path, store: Path, environment: Mapping[str, str]) -> None:
        self._start, self._file, self._environment = start, file, environment
        self.store = store

    def go(self) -> Started:
        command = [sys.executable, "jobs/sweep.py", str(self._file), "--store", str(self.store)]
        return self._start(command, self._environment)

    def rows(self) -> dict[Path, tuple[int, bytes]]:
        """Every visible file of results, with when it was written and what it holds."""
        return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in self.store.glob("results/*/*/*.parquet")}

    def titles(self) -> list[str]:
        """The finished cells as the sweep names them. Reading them also shows that every row is whole."""
        rows = Store(self.store).results().to_pylist()
        assert len({row["cell"] for row in rows}) == len(rows)
        assert all(row["status"] == "done" for row in rows)
        return [f"task · {row['row']} · seed {row['seed']} · " for row in rows]

    def temporary(self) -> bool:
        """Whether a row is being written under its temporary name right now."""
        try:
            with os.scandir(self.store) as entries:
                return any(entry.name.startswith(".tmp-") for entry in entries)
        except FileNotFoundError:
            return False


def after_a_row(sweeps: Sweeps, running: Started, chance: random.Random) -> None:
    """Some time after a further row has appeared: in the middle of training."""
    before = len(sweeps.rows())
    running.wait_for(lambda: len(sweeps.rows()) > before, 90, pause=0.01)
    time.sleep(chance.uniform(0.0, 0.5))


def any_time(sweeps: Sweeps, running: Started, chance: random.Random) -> None:
    """Anywhere between starting Ray and the last rows; a quick machine must not have ended by then."""
    until = time.monotonic() + chance.uniform(2.0, 15.0)
    running.wait_for(lambda: time.monotonic() > until or len(sweeps.rows()) >= CELLS // 2, 90, pause=0.01)


def while_renaming(sweeps: Sweeps, running: Started, chance: random.Random) -> None:
    """The instant in which a temporary file is there; failing that, with the last cells still to come."""

    def late() -> bool:
        return len(sweeps.rows()) >= CELLS - 2

    running.wait_for(lambda: len(running.look()) > 10 or late(), 60, pause=0.01)  # a killed sweep leaves one behind
    running.wait_for(lambda: sweeps.temporary() or late(), 90, pause=0.0)


def test_killed_three_times_then_finished(
    start: Start, sweep_file: Callable[..., Path], environment: dict[str, str], tmp_path: Path
) -> None:
    sweeps = Sweeps(start, sweep_file(METHODS, SEEDS, steps=60), tmp_path / "store", environment)
    chance = random.Random()
    kept: dict[Path, tuple[int, bytes]] = {}
    finished: list[str] = []
    for moment in (after_a_row, any_time, while_renaming):
        running = sweeps.go()
        moment(sweeps, running, chance)
        running.kill()
        assert not [title for title in finished if title in running.output], "a finished cell ran again"
        rows = sweeps.rows()
        assert kept.items() <= rows.items(), "a row was lost or written again"
        kept, finished = rows, sweeps.titles()
    assert len(finished) > 0
    last = sweeps.go()
    assert last.wait(180) == 0, last.output
    assert f"{CELLS} cells, {len(finished)} of them done" in last.output or len(finished) == CELLS
    assert not [title for title in finished if title in last.output], "a finished cell ran again"
    assert kept.items() <= sweeps.rows().items()
    assert len(sweeps.titles()) == len(sweeps.rows()) == CELLS
    again = sweeps.go()
    assert again.wait(60) == 0, again.output
    assert f"all {CELLS} cells are done" in again.output
    assert "| finetune" in again.output


def test_a_killed_trial_is_a_failed_row_and_an_interruption_ends_cleanly(
    start: Start, sweep_file: Callable[..., Path], environment: dict[str, str], tmp_path: Path
) -> None:
    sweeps = Sweeps(start, sweep_file(METHODS, 2, steps=1_000_000), tmp_path / "store", environment)
    running = sweeps.go()

    def trials() -> list[int]:
        return running.named("ImplicitFunc")

    running.wait_for(trials, 90)
    time.sleep(5.0)  # until it trains; a trial that is killed before is reported alike
    os.kill(trials()[0], 9)
    running.wait_for(lambda: "FAILED" in running.output, 60)
    (row,) = Store(sweeps.store).results().to_pylist()
    assert row["status"] == "failed"
    assert "the process ended unexpectedly: out of memory? lower batch.micro" in row["error"]
    # The killed trial's share of the machine is free again: as many trials run as before.
    running.wait_for(lambda: len(trials()) == min(2, os.cpu_count() or 1), 60)
    running.interrupt()
    assert running.wait(60) == 130, running.output
    assert "interrupted; what has finished is in the store, the same command goes on from there" in running.output
    assert "Traceback" not in running.output
