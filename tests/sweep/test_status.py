"""What `aang status` prints for a sweep that runs, has died, or has ended."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from aang_ray.config import RunConfig, parse_config
from aang_ray.errors import UserError
from aang_ray.store import Store
from aang_ray.store.files import open_location
from aang_ray.sweep.plan import PlannedCell
from aang_ray.sweep.progress import CellProgress, SweepFile, SweepProgress
from aang_ray.sweep.status import SILENT_SECONDS, SweepStatus, others_at_work, read_status, show_status
from aang_ray.train.record import failed_record
from tests.sweep.conftest import done_record, fake_resolve

NOW = datetime(2026, 1, 2, 12, 0, tzinfo=UTC)


def config(method: str, seed: int = 0) -> RunConfig:
    return fake_resolve(parse_config({"method": method, "seed": seed}, "test"))


FINETUNE, STATIC, AANG, SECOND = config("finetune"), config("static"), config("aang"), config("finetune", 1)
CELLS = [PlannedCell(one, one.cell, "waiting") for one in (FINETUNE, STATIC, AANG, SECOND)]


class Driver:
    """Writes the progress file of a sweep, as its driver does."""

    def __init__(self, store: Store, name: str = "nightly", cells: Sequence[PlannedCell] = CELLS) -> None:
        self.location, self.name = open_location(store.uri), name
        self.cells = {cell.cell: CellProgress.of(cell) for cell in cells}
        self.write()

    def write(self, silent: float = 0.0, *, ended: bool = False, started: datetime = NOW, to_come: int = 0) -> None:
        """Write the file as if this had been `silent` seconds ago."""
        file = SweepFile(
            name=self.name,
            started_at=started,
            updated_at=NOW - timedelta(seconds=silent),
            ended=ended,
            to_come=to_come,
            cells=list(self.cells.values()),
        )
        file.write(self.location, self.location.path(".progress", "sweeps", f"{self.name}-{len(self.cells)}.json"))

    def runs(self, run: RunConfig, ago: float = 0.0, **changes: Any) -> None:
        """Let a cell run whose last report was some seconds ago."""
        at = (NOW - timedelta(seconds=ago)).isoformat()
        report: dict[str, Any] = {"step": 30, "seconds": 24.0, "score": 0.75, "host": "node-a", "pid": 7}
        changes = {"state": "running", "updated_at": at} | report | changes
        self.cells[run.cell] = self.cells[run.cell].model_copy(update=changes)
        self.write()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


@pytest.fixture
def driver(store: Store) -> Driver:
    return Driver(store)


def states(store: Store) -> dict[str, str]:
    return {cell.progress.title: cell.state for cell in read_status(store, now=NOW).cells}


def shown(status: SweepStatus) -> str:
    stream = io.StringIO()
    show_status(status, Console(file=stream, width=160), NOW)
    return stream.getvalue()


def test_a_cell_that_a_scheduler_cut_is_neither_done_nor_failed(store: Store, driver: Driver) -> None:
    store.write(done_record(FINETUNE, status="cut", test=None, test_clean=None))
    store.write(done_record(STATIC, status="cut", test=None, test_clean=None))
    driver.runs(STATIC)
    assert states(store)["movie · finetune · seed 0"] == "cut"
    assert states(store)["movie · static-td n=6 · seed 0"] == "running", "it goes on"


def test_every_cell_has_one_state(store: Store, driver: Driver) -> None:
    store.write(done_record(FINETUNE))
    store.write(failed_record(STATIC, "out of memory"))
    driver.runs(AANG)
    assert states(store) == {
        "movie · finetune · seed 0": "done",
        "movie · static-td n=6 · seed 0": "failed",
        "movie · aang-td n=6 · seed 0": "running",
        "movie · finetune · seed 1": "waiting",
    }


def test_a_done_row_is_the_truth(store: Store, driver: Driver) -> None:
    store.write(done_record(AANG))
    driver.runs(AANG)  # killed between its row and its last report
    assert states(store)["movie · aang-td n=6 · seed 0"] == "done"


def test_a_failed_cell_that_runs_again_is_running_and_stopped_when_its_driver_dies(
    store: Store, driver: Driver
) -> None:
    store.write(failed_record(STATIC, "out of memory"))
    driver.runs(STATIC)
    assert states(store)["movie · static-td n=6 · seed 0"] == "running"
    driver.write(silent=600)
    assert states(store)["movie · static-td n=6 · seed 0"] == "stopped", "the same command continues it"


@pytest.mark.parametrize("end", [{"silent": SILENT_SECONDS + 1}, {"ended": True}])
def test_what_a_dead_driver_ran_is_not_running(store: Store, driver: Driver, end: dict[str, Any]) -> None:
    driver.runs(AANG, ago=600)
    driver.runs(STATIC, state="stopped")
    driver.write(**end)
    assert set(states(store).values()) == {"stopped", "waiting"}
    text = shown(read_status(store, now=NOW))
    assert "4 cells: 2 stopped, 2 waiting" in text
    assert "not running: its process last wrote" in text
    assert "start it again to continue" in text
    assert "10 min 00 s ago" in text


def test_a_driver_is_alive_for_four_of_its_pauses_whatever_the_readers_clock(store: Store, driver: Driver) -> None:
    driver.runs(AANG)
    for silent in (SILENT_SECONDS, -30.0):
        driver.write(silent=silent)
        assert read_status(store, now=NOW).alive
    assert read_status(store, now=NOW).silent == 0.0


def test_a_sweep_whose_trials_wait_for_nodes_is_alive(store: Store, driver: Driver) -> None:
    assert "no trial runs yet: they wait for resources" in shown(read_status(store, now=NOW))


def test_the_time_left(store: Store, driver: Driver) -> None:
    # Texts: finetune 60 x 32 = 1920, static 60 x (32 + 48) = 4800, aang 60 x (32 + 48 + 32) = 6720.
    # Done: finetune, 1920 texts in 12 s. Halfway: aang, 3360 texts in 24 s. So 36 s / 5280 texts.
    # Left: 3360 of aang, 4800 of static, 1920 of the second finetune = 10080 texts, one trial at a time: 68.7 s.
    store.write(done_record(FINETUNE))
    driver.runs(AANG)
    status = read_status(store, now=NOW)
    assert [cell.progress.work for cell in status.cells] == [1920, 4800, 6720, 1920]
    assert status.seconds_left == pytest.approx(10080 * 36 / 5280)
    assert "about 1 min 09 s left" in shown(status)
    # A second trial, not yet evaluated, halves it and moves no measure.
    driver.runs(STATIC, step=0, seconds=0.0, score=None, host="node-b")
    assert read_status(store, now=NOW).seconds_left == pytest.approx(10080 * 36 / 5280 / 2)


def test_cells_that_a_search_has_still_to_choose_count_as_much_as_the_mean_of_the_others(
    store: Store, driver: Driver
) -> None:
    for run in (FINETUNE, STATIC, SECOND):
        store.write(done_record(run))  # 8640 texts in 36 s
    driver.write(to_come=2)
    text = shown(read_status(store, now=NOW))
    assert "nightly: 6 cells: 3 done, 1 waiting, 2 not chosen yet" in text
    driver.runs(AANG)  # another 3360 texts in 24 s, and as many are left
    driver.write(to_come=2)  # the four cells have 15360 texts
    assert read_status(store, now=NOW).seconds_left == pytest.approx((3360 + 2 * 15360 / 4) * 60 / 12000)
    store.write(done_record(AANG))
    driver.write(to_come=2, ended=True)
    assert "start it again to continue" in shown(read_status(store, now=NOW))


def test_an_early_stop_counts_the_steps_that_were_made(store: Store, driver: Driver) -> None:
    store.write(done_record(FINETUNE, steps=30))  # 960 texts in 12 s; aang adds 3360 in 24 s
    driver.runs(AANG)
    assert read_status(store, now=NOW).seconds_left == pytest.approx(10080 * 36 / 4320)


def test_no_time_is_made_up(store: Store, driver: Driver) -> None:
    driver.runs(AANG, step=0, seconds=0.0, score=None)
    status = read_status(store, now=NOW)
    assert status.seconds_left is None
    assert "time left: not known before the first evaluation" in shown(status)


def test_what_a_person_reads(store: Store, driver: Driver) -> None:
    store.write(done_record(FINETUNE))
    store.write(failed_record(SECOND, "loss [nan] at step 3"))
    driver.runs(AANG, ago=5, loss=0.693)
    driver.runs(STATIC, host="node-b", score=None, step=0)
    text = shown(read_status(store, now=NOW))
    assert "nightly: 4 cells: 1 done, 2 running, 1 failed" in text
    assert "trials run on node-a (1), node-b (1)" in text
    assert "failed: movie · finetune · seed 1: loss [nan] at step 3" in text
    assert f"its traceback and its log: aang show {SECOND.cell} --store {store.uri}" in text
    assert (  # 3360 of 6720 texts in 24 s
        "movie · aang-td n=6 · seed 0: running, step 30/60, loss 0.693, dev 75.00 accuracy, 140 texts a second, "
        "at most about 24 s left, on node-a, last report 5 s ago\n"
    ) in text
    assert "movie · static-td n=6 · seed 0: running, step 0/60, on node-b, last report 0 s ago\n" in text


def test_the_end(store: Store, driver: Driver) -> None:
    for run in (FINETUNE, STATIC, AANG, SECOND):
        store.write(done_record(run))
    text = shown(read_status(store, now=NOW))
    assert "nightly: 4 cells: 4 done" in text
    assert "nothing runs, nothing is left to run" in text


def test_rows_of_other_sweeps_do_not_count(store: Store, driver: Driver) -> None:
    store.write(done_record(config("finetune", 7)))
    assert set(states(store).values()) == {"waiting"}


def test_the_last_sweep_unless_one_is_named(store: Store) -> None:
    for day, (name, cells) in enumerate((("one", CELLS[:1]), ("two", CELLS[:2]), ("one", CELLS[:3]))):
        Driver(store, name, cells).write(started=NOW + timedelta(days=day))
    last = read_status(store, now=NOW)
    assert (last.file.name, len(last.cells)) == ("one", 3)
    assert len(read_status(store, Path("elsewhere/two.yaml"), NOW).cells) == 2
    with pytest.raises(UserError, match=r"knows no sweep three\.yaml; it knows one, two"):
        read_status(store, Path("three.yaml"))


def test_a_store_without_a_sweep_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no sweep was started on store"):
        read_status(Store(tmp_path / "nothing"))


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"name": "old", "started_at": "2026", "cells": [{"cell": "a"}]}'])
def test_files_of_another_version_are_left_alone(store: Store, driver: Driver, text: str) -> None:
    (Path(store.uri) / ".progress" / "sweeps" / "old-0123.json").write_text(text)
    (Path(store.uri) / ".progress" / "0123456789abcdef.json").write_text("{}")
    assert read_status(store, now=NOW).file.name == "nightly"


def test_another_driver_with_the_same_cells_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second sweep says so at its start; a driver that has ended, was killed or has other cells does not count."""
    store, cell = Store(tmp_path), CELLS[0]
    with SweepProgress(str(tmp_path), "first", "key", Console(quiet=True)) as progress:
        progress.add([cell])
        progress.update(cell.cell, state="running")
        progress._write()
        (line,) = others_at_work(store, {cell.cell})
        assert line.startswith(f"warning: first, process {os.getpid()} on ")
        assert "has 1 of these cells to do, too" in line
        assert others_at_work(store, {"another"}) == []
        monkeypatch.setattr("psutil.pid_exists", lambda pid: False)
        assert others_at_work(store, {cell.cell}) == []
        monkeypatch.undo()
    assert others_at_work(store, {cell.cell}) == []
