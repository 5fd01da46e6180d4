"""A trial writes its row to the store before it reports its end."""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest
import torch

from aang_ray.config import RunConfig, parse_config
from aang_ray.errors import RunFailure, UserError
from aang_ray.store import CellRecord, NotWritten, Store
from aang_ray.sweep.trial import _free_memory, run_and_store
from aang_ray.train.checkpoint import checkpoint_folder
from aang_ray.train.record import OnEvaluation, failed_record
from tests.sweep.conftest import done_record, fake_resolve, history_row

CONFIG = fake_resolve(parse_config({"method": "static"}, "test"))
RunCell = Callable[..., CellRecord]


class InWorker(Exception):
    """Stands for `WorkerError`."""


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[[RunCell], None]:
    """Replaces `launch` by a function."""

    def put(run_cell: RunCell) -> None:
        module = ModuleType("aang_ray.train.workers.launch")
        vars(module).update(launch=run_cell, WorkerError=InWorker)
        monkeypatch.setitem(sys.modules, "aang_ray.train.workers.launch", module)

    return put


def run(store: Store) -> list[dict[str, Any]]:
    """Run one trial; return its reports, each with the cell's state in the store at that moment."""
    reports: list[dict[str, Any]] = []
    run_and_store(CONFIG, store, lambda values: reports.append({**values, "row": store.done().get(CONFIG.cell)}))
    return reports


def test_evaluations_then_the_row_then_the_end(tmp_path: Path, install: Callable[[RunCell], None]) -> None:
    def run_cell(config: RunConfig, *, on_evaluation: OnEvaluation, **_: object) -> CellRecord:
        on_evaluation(history_row(30), None)
        return done_record(config)

    install(run_cell)
    evaluation, end = run(Store(tmp_path))
    assert (evaluation["step"], evaluation["score"], evaluation["row"]) == (30, 0.75, None)
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


class Ladder:
    """A run that stops at rungs and continues from its checkpoint, as `launch` does with `until`."""

    def __init__(self, store: Store) -> None:
        self.untils: list[int | None] = []
        self.folder = Path(checkpoint_folder(store.uri)) / CONFIG.cell

    def __call__(self, config: RunConfig, *, until: int | None, **_: object) -> CellRecord:
        self.untils.append(until)
        if until is None:
            return done_record(config)
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / f"last-{until:010d}-0.pt").touch()
        result = done_record(config, status="cut", steps=until, test=None, test_clean=None).result
        return CellRecord(result, tuple(map(history_row, range(10, until + 1, 10))))


RUNGS = [(0.25, 10), (0.5, 30)]


def test_each_rung_is_a_row_and_a_checkpoint_before_it_is_reported(
    tmp_path: Path, install: Callable[[RunCell], None]
) -> None:
    store = Store(tmp_path)
    ladder = Ladder(store)
    install(ladder)
    reports: list[dict[str, Any]] = []

    def report(values: dict[str, Any]) -> None:
        reports.append(values)
        if "rung" in values:
            row = store.record(CONFIG.cell).result
            assert (row.status, row.steps) == ("cut", values["step"])
            assert list(ladder.folder.glob(f"last-{values['step']:010d}-*.pt"))

    run_and_store(CONFIG, store, report, RUNGS)
    assert [(one["rung"], one["step"], one["dev"]) for one in reports[:-1]] == [(0.25, 10, 0.75), (0.5, 30, 0.75)]
    assert (reports[-1]["status"], ladder.untils, store.done()) == ("done", [10, 30, None], {CONFIG.cell: "done"})
    assert not ladder.folder.exists()


def test_a_run_that_tune_ends_at_a_rung_is_cut_and_goes_on_from_there_another_time(
    tmp_path: Path, install: Callable[[RunCell], None]
) -> None:
    store = Store(tmp_path)
    ladder = Ladder(store)
    install(ladder)

    def ends_at(step: int) -> Callable[[dict[str, Any]], None]:
        def report(values: dict[str, Any]) -> None:
            if "rung" in values and values["step"] == step:
                raise SystemExit(0)  # as Tune ends a function

        return report

    with pytest.raises(SystemExit):
        run_and_store(CONFIG, store, ends_at(30), RUNGS)
    assert store.done() == {CONFIG.cell: "cut"}
    assert ladder.folder.is_dir()
    with pytest.raises(SystemExit):
        run_and_store(CONFIG, store, ends_at(10), RUNGS)  # its rows tell how it did at rungs that it has passed
    assert ladder.untils == [10, 30]
    reports: list[dict[str, Any]] = []
    run_and_store(CONFIG, store, reports.append, RUNGS)
    assert [one.get("rung") for one in reports] == [None, 0.25, 0.5, None]
    assert (reports[0]["resumed"], reports[0]["step"]) == (True, 30)
    assert (ladder.untils, store.done()) == ([10, 30, None], {CONFIG.cell: "done"})


def test_a_run_that_began_without_rungs_is_judged_from_the_next_one_on(
    tmp_path: Path, install: Callable[[RunCell], None]
) -> None:
    store = Store(tmp_path)
    ladder = Ladder(store)
    install(ladder)
    ladder(CONFIG, until=20)  # a checkpoint without a row
    reports: list[dict[str, Any]] = []
    run_and_store(CONFIG, store, reports.append, RUNGS)
    assert [one["rung"] for one in reports if "rung" in one] == [0.5]
    assert ladder.untils == [20, 30, None]


def test_a_run_whose_row_is_older_than_its_checkpoint_is_not_judged_by_the_old_score(
    tmp_path: Path, install: Callable[[RunCell], None]
) -> None:
    store = Store(tmp_path)
    ladder = Ladder(store)
    install(ladder)
    store.write(ladder(CONFIG, until=10))  # cut at the first rung,
    ladder(CONFIG, until=35)  # then run on without rungs, and interrupted after the second
    reports: list[dict[str, Any]] = []
    run_and_store(CONFIG, store, reports.append, RUNGS)
    assert [one["rung"] for one in reports if "rung" in one] == [0.25], "the second rung has no score"
    assert ladder.untils == [10, 35, None]


def test_a_run_that_died_at_a_rung_before_its_row_writes_the_row(
    tmp_path: Path, install: Callable[[RunCell], None]
) -> None:
    store = Store(tmp_path)
    ladder = Ladder(store)
    install(ladder)
    ladder(CONFIG, until=10)  # the checkpoint of the rung, and no row
    reports: list[dict[str, Any]] = []
    run_and_store(CONFIG, store, reports.append, RUNGS)
    assert [one["rung"] for one in reports if "rung" in one] == [0.25, 0.5]
    assert ladder.untils == [10, 10, 30, None]


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
    (end,) = run(store)
    assert (end["status"], end["dev"]) == ("elsewhere", 0.75)


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


def test_a_failed_row_holds_the_configuration_and_one_line() -> None:
    run = fake_resolve(parse_config({"method": "aang"}, "test"))
    row = failed_record(run, "two\nlines", "\n".join(map(str, range(100)))).result
    assert (row.status, row.cell, row.error) == ("failed", run.cell, "two lines")
    assert row.log_tail is not None
    assert row.log_tail.splitlines()[-1] == "99"
    assert json.loads(json.dumps(row.config)) == run.model_dump(mode="json")


def full(*_: object, **__: object) -> CellRecord:
    raise NotWritten("/store/x cannot be written: No space left on device")


def test_a_disk_that_is_full_is_no_failure_of_the_cell(
    tmp_path: Path, install: Callable[[RunCell], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its checkpoint cannot be written: there is no failed row, and the sweep is told."""
    install(full)
    with pytest.raises(NotWritten, match="No space left"):
        run(Store(tmp_path))
    assert Store(tmp_path).done() == {}


def test_a_row_that_the_store_does_not_take_is_kept_and_moved_later(
    tmp_path: Path, install: Callable[[RunCell], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AANG_CACHE", str(tmp_path / "cache"))
    install(lambda config, **_: done_record(config))
    store = Store(tmp_path / "store")
    with monkeypatch.context() as patch:
        patch.setattr(Store, "write", lambda store, record: write(store, record, tmp_path / "store"))
        with pytest.raises(NotWritten, match=r"No space left .* is kept in .*/cache/unwritten"):
            run(store)
    install(full)
    (end,) = run(store)
    assert (end["status"], end["row"]) == ("elsewhere", "done")
    assert not list((tmp_path / "cache" / "unwritten").iterdir())


real_write = Store.write


def write(store: Store, record: CellRecord, full: Path) -> None:
    if store.uri == str(full):
        raise NotWritten(f"{full} cannot be written: No space left on device")
    real_write(store, record)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="needs glibc")
def test_freed_memory_goes_back_to_the_machine() -> None:
    """Small tensors, every tenth of which lives on: what is freed between them stays with glibc until it is asked."""

    def resident() -> int:
        return int(psutil.Process().memory_info().rss)

    tensors = [torch.ones(4096) for _ in range(8000)]  # 16 KB each, 128 MB together
    kept = tensors[::10]
    full = resident()
    del tensors
    _free_memory()
    assert full - resident() > 80e6
    assert all(bool((tensor == 1).all()) for tensor in kept)
