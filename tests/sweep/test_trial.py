"""One trial: its row is in the store before it says that it ended."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from aang_ray.config import RunConfig, parse_config
from aang_ray.errors import RunFailure, UserError
from aang_ray.store import CellRecord, HistoryRow, Store
from aang_ray.sweep.trial import run_and_store
from aang_ray.train.checkpoint import checkpoint_folder
from aang_ray.train.record import failed_record
from tests.sweep.conftest import done_record, fake_resolve, history_row

CONFIG = fake_resolve(parse_config({"method": "static"}, "test"))
RunCell = Callable[..., CellRecord]


class InWorker(Exception):
    """Stands for `WorkerError`."""


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[[RunCell], None]:
    """Puts a function in the place of `launch`."""

    def put(run_cell: RunCell) -> None:
        module = ModuleType("aang_ray.train.workers.launch")
        vars(module).update(launch=run_cell, WorkerError=InWorker)
        monkeypatch.setitem(sys.modules, "aang_ray.train.workers.launch", module)

    return put


def run(store: Store) -> list[dict[str, Any]]:
    """The reports of one trial, each with the cell's state in the store at that moment."""
    reports: list[dict[str, Any]] = []
    run_and_store(CONFIG, store, lambda values: reports.append({**values, "row": store.done().get(CONFIG.cell)}))
    return reports


def test_evaluations_then_the_row_then_the_end(tmp_path: Path, install: Callable[[RunCell], None]) -> None:
    def run_cell(config: RunConfig, *, on_evaluation: Callable[[HistoryRow], None], **_: object) -> CellRecord:
        on_evaluation(history_row(30))
        return done_record(config)

    install(run_cell)
    evaluation, end = run(Store(tmp_path))
    assert (evaluation["step"], evaluation["steps"], evaluation["row"]) == (30, 60, None)
    assert (end["status"], end["dev"], end["test"], end["row"]) == ("done", 0.75, 0.75, "done")


def test_an_error_is_a_failed_row(tmp_path: Path, install: Callable[[RunCell], None]) -> None:
    def run_cell(config: RunConfig, *, on_evaluation: object, **_: object) -> CellRecord:
        raise ZeroDivisionError("by\nnothing")

    install(run_cell)
    store = Store(tmp_path)
    (end,) = run(store)
    row = store.record(CONFIG.cell).result
    assert (end["status"], row.status, row.error) == ("failed", "failed", "ZeroDivisionError: by nothing")
    assert row.log_tail is not None
    assert "Traceback" in row.log_tail


@pytest.mark.parametrize("error", [UserError, RunFailure, InWorker])
def test_a_whole_sentence_is_the_error_as_it_is(
    tmp_path: Path, install: Callable[[RunCell], None], error: type[Exception]
) -> None:
    def run_cell(config: RunConfig, *, on_evaluation: object, **_: object) -> CellRecord:
        told = error("data: the file is gone")
        told.add_note("in worker 1: the last line")
        raise told

    install(run_cell)
    store = Store(tmp_path)
    assert [report["status"] for report in run(store)] == ["failed"]
    row = store.record(CONFIG.cell).result
    assert row.error == "data: the file is gone"
    assert row.log_tail is not None
    assert row.log_tail.endswith("in worker 1: the last line")


def test_a_run_that_stops_at_a_step_keeps_its_checkpoint_and_goes_on_from_it(
    tmp_path: Path, install: Callable[[RunCell], None]
) -> None:
    store, told = Store(tmp_path), []
    checkpoint = Path(checkpoint_folder(store.uri)) / CONFIG.cell

    def run_cell(config: RunConfig, *, until: int | None, **_: object) -> CellRecord:
        told.append(until)
        checkpoint.mkdir(parents=True, exist_ok=True)
        return done_record(config) if until is None else done_record(config, status="cut", steps=until, test=None)

    install(run_cell)
    ends: list[dict[str, Any]] = []
    run_and_store(CONFIG, store, ends.append, until=30)
    assert (ends[0]["status"], ends[0]["step"], ends[0]["dev"]) == ("cut", 30, 0.75)
    assert store.record(CONFIG.cell).result.status == "cut"
    assert checkpoint.is_dir()
    run_and_store(CONFIG, store, ends.append)
    assert (ends[1]["status"], store.done(), told) == ("done", {CONFIG.cell: "done"}, [30, None])
    assert not checkpoint.exists()


def test_a_failed_row_is_run_again(tmp_path: Path, install: Callable[[RunCell], None]) -> None:
    store = Store(tmp_path)
    store.write(failed_record(CONFIG, "out of memory"))
    install(lambda config, **_: done_record(config))
    assert run(store)[-1]["status"] == "done"
    assert store.done() == {CONFIG.cell: "done"}


def test_a_cell_that_another_has_done_is_not_run(tmp_path: Path, install: Callable[[RunCell], None]) -> None:
    store = Store(tmp_path)
    store.write(done_record(CONFIG))
    install(lambda config, **_: pytest.fail("ran"))
    assert [report["status"] for report in run(store)] == ["elsewhere"]


def test_a_cell_that_another_does_meanwhile_keeps_the_first_row(
    tmp_path: Path, install: Callable[[RunCell], None]
) -> None:
    store = Store(tmp_path)

    def run_cell(config: RunConfig, *, on_evaluation: object, **_: object) -> CellRecord:
        store.write(done_record(config, seconds=1.0))
        return done_record(config, seconds=2.0)

    install(run_cell)
    assert [report["status"] for report in run(store)] == ["elsewhere"]
    assert store.record(CONFIG.cell).result.seconds == 1.0


def test_an_interruption_leaves_no_row(tmp_path: Path, install: Callable[[RunCell], None]) -> None:
    def run_cell(config: RunConfig, *, on_evaluation: object, **_: object) -> CellRecord:
        raise KeyboardInterrupt

    install(run_cell)
    store = Store(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run(store)
    assert store.done() == {}
