"""What `aang status` says of a sweep that runs, has died, or has ended."""

from __future__ import annotations

import io
import json
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from aang_ray.config import RunConfig, parse_config
from aang_ray.errors import UserError
from aang_ray.store import Store
from aang_ray.sweep import agenda as module
from aang_ray.sweep.agenda import read_agenda, write_agenda
from aang_ray.sweep.heartbeat import Beat
from aang_ray.sweep.plan import PlannedCell
from aang_ray.sweep.status import SweepStatus, read_status, show_status
from aang_ray.train.record import failed_record
from tests.sweep.conftest import done_record, fake_resolve

NOW = datetime(2026, 1, 2, 12, 0, tzinfo=UTC)
FILE = Path("jobs/nightly.yaml")


def config(method: str, seed: int = 0) -> RunConfig:
    return fake_resolve(parse_config({"method": method, "seed": seed}, "test"))


FINETUNE, STATIC, AANG, SECOND = config("finetune"), config("static"), config("aang"), config("finetune", 1)
CELLS = [PlannedCell(one, one.cell, "waiting") for one in (FINETUNE, STATIC, AANG, SECOND)]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path)
    write_agenda(store.uri, FILE, CELLS)
    return store


def beat(store: Store, run: RunConfig, silent: float = 0.0, **changes: Any) -> None:
    """A sign of life, so many seconds ago."""
    at = (NOW - timedelta(seconds=silent)).isoformat()
    sign = Beat(run.cell, 30, 60, 24.0, 0.75, "accuracy", "node-a", 7, NOW.isoformat(), at)
    path = Path(store.uri) / ".progress" / f"{run.cell}.json"
    path.write_text(json.dumps(asdict(replace(sign, **changes))), encoding="utf-8")


def states(store: Store) -> dict[str, str]:
    return {cell.planned.title: cell.state for cell in read_status(store, now=NOW).cells}


def shown(status: SweepStatus) -> str:
    stream = io.StringIO()
    show_status(status, Console(file=stream, width=120), NOW)
    return stream.getvalue()


def test_a_cell_that_a_scheduler_cut_is_neither_done_nor_failed(store: Store) -> None:
    store.write(done_record(FINETUNE, status="cut", test=None, test_clean=None))
    store.write(done_record(STATIC, status="cut", test=None, test_clean=None))
    beat(store, STATIC)
    assert states(store)["movie · finetune · seed 0"] == "cut"
    assert states(store)["movie · static-td n=6 · seed 0"] == "running", "it goes on"


def test_every_cell_has_one_state(store: Store) -> None:
    store.write(done_record(FINETUNE))
    store.write(failed_record(STATIC, "out of memory"))
    beat(store, AANG)
    assert states(store) == {
        "movie · finetune · seed 0": "done",
        "movie · static-td n=6 · seed 0": "failed",
        "movie · aang-td n=6 · seed 0": "running",
        "movie · finetune · seed 1": "waiting",
    }


def test_a_done_row_is_the_truth(store: Store) -> None:
    store.write(done_record(AANG))
    beat(store, AANG)  # killed between its row and the end of its signs of life
    assert states(store)["movie · aang-td n=6 · seed 0"] == "done"


def test_a_failed_cell_that_runs_again_is_running_and_failed_again_when_it_dies(store: Store) -> None:
    store.write(failed_record(STATIC, "out of memory"))
    beat(store, STATIC)
    assert states(store)["movie · static-td n=6 · seed 0"] == "running"
    beat(store, STATIC, silent=600)
    assert states(store)["movie · static-td n=6 · seed 0"] == "failed"


def test_the_dead_are_not_running(store: Store) -> None:
    beat(store, AANG, silent=600)
    beat(store, STATIC, ended=True)
    assert set(states(store).values()) == {"stopped", "waiting"}
    text = shown(read_status(store, now=NOW))
    assert "4 cells: 2 stopped, 2 waiting" in text
    assert "no trial runs; if the sweep has ended, start it again to go on" in text
    assert "10 min 00 s ago" in text


def test_the_time_left(store: Store) -> None:
    # Texts: finetune 60 x 32 = 1920, static 60 x (32 + 48) = 4800, aang 60 x (32 + 48 + 32) = 6720.
    # Done: finetune, 1920 texts in 12 s. Halfway: aang, 3360 texts in 24 s. So 36 s / 5280 texts.
    # Left: 3360 of aang, 4800 of static, 1920 of the second finetune = 10080 texts, one trial at a time: 68.7 s.
    store.write(done_record(FINETUNE))
    beat(store, AANG)
    status = read_status(store, now=NOW)
    assert [cell.planned.work for cell in status.cells] == [1920, 4800, 6720, 1920]
    assert status.seconds_left == pytest.approx(10080 * 36 / 5280)
    assert "about 1 min 09 s left" in shown(status)
    # A second trial, not yet evaluated, halves it and moves no measure.
    beat(store, STATIC, step=0, seconds=0.0, score=None, host="node-b")
    assert read_status(store, now=NOW).seconds_left == pytest.approx(10080 * 36 / 5280 / 2)


def test_an_early_stop_counts_the_steps_that_were_made(store: Store) -> None:
    store.write(done_record(FINETUNE, steps=30))  # 960 texts in 12 s; aang adds 3360 in 24 s
    beat(store, AANG)
    assert read_status(store, now=NOW).seconds_left == pytest.approx(10080 * 36 / 4320)


def test_no_time_is_made_up(store: Store) -> None:
    beat(store, AANG, step=0, seconds=0.0, score=None)
    status = read_status(store, now=NOW)
    assert status.seconds_left is None
    assert "time left: not known before the first evaluation" in shown(status)


def test_what_a_person_reads(store: Store) -> None:
    store.write(done_record(FINETUNE))
    store.write(failed_record(SECOND, "loss [nan] at step 3"))
    beat(store, AANG, silent=5)
    beat(store, STATIC, host="node-b", score=None, step=0)
    text = shown(read_status(store, now=NOW))
    assert "nightly: 4 cells: 1 done, 2 running, 1 failed" in text
    assert "trials run on node-a (1), node-b (1)" in text
    assert "failed: movie · finetune · seed 1: loss [nan] at step 3" in text
    (line,) = [line for line in text.splitlines() if "aang-td" in line]
    assert [part.strip() for part in line.strip("│ ").split("│")] == [
        "movie · aang-td n=6 · seed 0",
        "running",
        "30/60",
        "75.00 accuracy",
        "node-a",
        "5 s ago",
    ]


def test_the_end(store: Store) -> None:
    for run in (FINETUNE, STATIC, AANG, SECOND):
        store.write(done_record(run))
    text = shown(read_status(store, now=NOW))
    assert "nightly: 4 cells: 4 done" in text
    assert "nothing runs, nothing is left to run" in text


def test_rows_of_other_sweeps_do_not_count(store: Store) -> None:
    store.write(done_record(config("finetune", 7)))
    assert set(states(store).values()) == {"waiting"}


def test_the_last_sweep_unless_one_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = Store(tmp_path).uri
    for day, (name, cells) in enumerate((("one", CELLS[:1]), ("two", CELLS[:2]), ("one", CELLS[:3]))):
        _freeze(monkeypatch, NOW + timedelta(days=day))
        write_agenda(uri, Path(f"somewhere/{name}.yaml"), cells)
    assert [read_agenda(uri).name, len(read_agenda(uri).cells)] == ["one", 3]
    assert len(read_agenda(uri, Path("elsewhere/two.yaml")).cells) == 2
    with pytest.raises(UserError, match=r"knows no sweep three\.yaml; it knows one, two"):
        read_agenda(uri, Path("three.yaml"))


def test_a_sweep_that_is_started_again_is_the_same(tmp_path: Path) -> None:
    uri = Store(tmp_path).uri
    write_agenda(uri, FILE, CELLS)
    first = read_agenda(uri)
    write_agenda(uri, FILE, list(reversed(CELLS)))  # another order, the same cells
    assert len(list((tmp_path / ".progress" / "sweeps").iterdir())) == 1
    assert read_agenda(uri).started_at >= first.started_at


def test_a_store_without_a_sweep_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no sweep was started on store"):
        read_status(Store(tmp_path / "nothing"))


def _freeze(monkeypatch: pytest.MonkeyPatch, moment: datetime) -> None:
    class Frozen(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Frozen:
            return cls.fromtimestamp(moment.timestamp(), tz)

    monkeypatch.setattr(module, "datetime", Frozen)
