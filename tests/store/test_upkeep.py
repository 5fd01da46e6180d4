"""Packing, merging and checking: no run is lost or there twice, whoever writes, reads or dies meanwhile."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from aang_ray.config import parse_config
from aang_ray.store import CellIsDone, Store, upkeep
from aang_ray.store import store as module
from aang_ray.store.upkeep import compact, compact_if_many, merge, verify
from tests.store.conftest import MakeRecord

CELLS = 6


def files(root: Path) -> int:
    return len(list(root.rglob("*.parquet")))


def fill(root: Path, make_record: MakeRecord) -> Store:
    """Six runs, of which the last failed."""
    store = Store(root)
    for number in range(CELLS):
        store.write(make_record(number, status="failed" if number == CELLS - 1 else "done", evaluations=number))
    return store


def assert_all_there(store: Store, make_record: MakeRecord) -> None:
    assert len(store.results()) == len(store.done()) == CELLS
    for number in range(CELLS):
        status = "failed" if number == CELLS - 1 else "done"
        assert store.record(f"{number:016x}") == make_record(number, status=status, evaluations=number)
    assert store.history().num_rows == store.weights().num_rows == sum(range(CELLS))


def test_packed_runs_are_read_as_before(tmp_path: Path, make_record: MakeRecord) -> None:
    store = fill(tmp_path, make_record)
    assert compact(str(tmp_path)) == (3 * CELLS, 6)
    assert files(tmp_path) == 6, "a packed file a table, and those of the failed run"
    assert_all_there(store, make_record)
    assert compact(str(tmp_path)) == (6, 6)


def test_a_packed_run_is_done_for_ever_and_a_failed_one_gives_way(tmp_path: Path, make_record: MakeRecord) -> None:
    store = fill(tmp_path, make_record)
    compact(str(tmp_path))
    with pytest.raises(CellIsDone):
        store.write(make_record(1))
    with pytest.raises(CellIsDone):
        store.write(make_record(1, task="renamed"))
    store.write(make_record(CELLS - 1))
    store.write(make_record(CELLS))
    compact(str(tmp_path))
    assert files(tmp_path) == 3
    assert set(store.done().values()) == {"done"}
    assert len(store.results()) == CELLS + 1


def test_dying_at_every_change_loses_and_doubles_nothing(
    tmp_path: Path, make_record: MakeRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Died(BaseException):
        pass

    for moment in range(1, 100):
        root = tmp_path / str(moment)
        store = fill(root, make_record)
        left = moment

        def dying(action: object, *arguments: object) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                raise Died
            action(*arguments)  # type: ignore[operator]

        with monkeypatch.context() as patch:
            for name in ("publish", "remove"):
                real = getattr(upkeep, name)
                patch.setattr(upkeep, name, lambda *arguments, real=real: dying(real, *arguments))
            try:
                compact(str(root))
            except Died:
                assert_all_there(store, make_record)
                with pytest.raises(CellIsDone):
                    store.write(make_record(0))
        compact(str(root))
        assert_all_there(store, make_record)
        assert files(root) == 6
        if left > 0:
            assert moment > 10
            return
    pytest.fail("packing never ended")


def test_readers_and_writers_go_on_while_it_packs(tmp_path: Path, make_record: MakeRecord) -> None:
    store = Store(tmp_path)
    for number in range(20):
        store.write(make_record(number))
    stop, seen = threading.Event(), []

    def read() -> None:
        while not stop.is_set():
            cells = store.results(["cell"]).column("cell").to_pylist()
            assert len(cells) == len(set(cells))
            seen.append(set(cells))

    def write() -> None:
        for number in range(20, 60):
            store.write(make_record(number))

    threads = [threading.Thread(target=read), threading.Thread(target=write)]
    for thread in threads:
        thread.start()
    while threads[1].is_alive():
        compact(str(tmp_path))
    stop.set()
    for thread in threads:
        thread.join()
    compact(str(tmp_path))
    assert files(tmp_path) == 3
    assert len(store.results()) == 60
    assert seen
    assert all({f"{n:016x}" for n in range(20)} <= cells for cells in seen), "no run that was done went away"


def test_a_file_that_goes_away_is_looked_for_again(
    tmp_path: Path, make_record: MakeRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packed between the listing and the reading."""
    store, listed = fill(tmp_path, make_record), module.list_files
    calls = 0

    def late(*arguments: object, **named: object) -> object:
        nonlocal calls
        calls += 1
        found = listed(*arguments, **named)  # type: ignore[arg-type]
        if calls == 1:
            compact(str(tmp_path))
        return found

    monkeypatch.setattr(module, "list_files", late)
    assert len(store.results()) == CELLS


def test_merging_copies_what_is_missing(tmp_path: Path, make_record: MakeRecord) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    fill(theirs, make_record)
    compact(str(theirs))
    store = Store(ours)
    store.write(make_record(0, evaluations=0))
    store.write(make_record(3, status="failed"))
    assert merge(str(ours), str(theirs)) == (CELLS - 1, 1)
    assert_all_there(store, make_record)
    assert merge(str(ours), str(theirs)) == (0, CELLS)
    with pytest.raises(Exception, match="there is no store at"):
        merge(str(ours), str(tmp_path / "none"))


def test_verify_tells_what_is_wrong(tmp_path: Path, make_record: MakeRecord) -> None:
    from dataclasses import replace

    record = make_record(1)
    config = parse_config({"seed": 3}, "test")
    good = replace(record, result=replace(record.result, cell=config.cell, config=config.model_dump(mode="json")))
    store = Store(tmp_path)
    store.write(good)
    assert verify(str(tmp_path)) == []
    store.write(make_record(2))  # its configuration has another name
    store.write(make_record(4))
    (tmp_path / "results" / "task=movie" / "method=aang" / f"{4:016x}.parquet").unlink()
    (tmp_path / "weights" / "task=movie" / "method=aang" / f"{2:016x}.parquet").write_bytes(b"half")
    copy = tmp_path / "results" / "task=other" / "method=aang" / f"{config.cell}.parquet"
    copy.parent.mkdir(parents=True)
    copy.write_bytes((tmp_path / "results" / "task=movie" / "method=aang" / f"{config.cell}.parquet").read_bytes())
    problems = verify(str(tmp_path))
    for part in (
        f"cell {2:016x} has a configuration of the name",
        f"history: cell {4:016x} has no row in results",
        "cannot be read as Parquet",
        f"results: cell {config.cell} is in 2 files",
    ):
        assert any(part in problem for problem in problems), (part, problems)
    assert verify(str(tmp_path / "none")) == [f"there is no store at {tmp_path / 'none'}"]


def test_a_store_of_many_loose_runs_is_packed_at_the_end_of_a_sweep(tmp_path: Path, make_record: MakeRecord) -> None:
    store = fill(tmp_path, make_record)
    assert compact_if_many(str(tmp_path), loose=CELLS) is None
    assert compact_if_many(str(tmp_path), loose=CELLS - 1) == (3 * CELLS, 6)
    assert_all_there(store, make_record)
    assert compact_if_many(str(tmp_path), loose=CELLS - 1) is None


def test_a_writer_reads_a_packed_file_once(
    tmp_path: Path, make_record: MakeRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or adding a run to a store of many packed ones would take as long as reading them all."""
    store = fill(tmp_path, make_record)
    compact(str(tmp_path))
    read = module.read_files
    opened: list[str] = []

    def counted(location: object, table: str, files: list[module.CellFile], *rest: object) -> object:
        opened.extend(file.path for file in files if file.cell is None)
        return read(location, table, files, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "read_files", counted)
    for number in range(CELLS, CELLS + 3):
        store.write(make_record(number))
        with pytest.raises(CellIsDone):
            store.write(make_record(0))
    assert len(opened) == 1
