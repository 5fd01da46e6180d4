"""Rules of the store: what is done stays, what failed gives way, what cannot be read says so."""

import fcntl
import os
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from aang_ray.errors import UserError
from aang_ray.store import SCHEMA_VERSION, CellIsDone, CellRecord, Store, files

MakeRecord = Callable[..., CellRecord]
CELL = f"{1:016x}"


def results_file(root: Path) -> Path:
    (path,) = (root / "results").rglob("*.parquet")
    return path


@pytest.mark.parametrize("status", ["done", "failed"])
def test_a_done_row_is_never_written_again(tmp_path: Path, make_record: MakeRecord, status: str) -> None:
    store = Store(tmp_path)
    store.write(make_record(1))
    before = results_file(tmp_path).stat()
    with pytest.raises(CellIsDone, match=f"{CELL} is done already"):
        store.write(make_record(1, status=status, evaluations=9))
    after = results_file(tmp_path).stat()
    assert (after.st_mtime_ns, after.st_ino) == (before.st_mtime_ns, before.st_ino)
    assert store.record(CELL) == make_record(1)


@pytest.mark.parametrize("status", ["done", "failed"])
def test_a_failed_row_gives_way_with_all_that_belongs_to_it(
    tmp_path: Path, make_record: MakeRecord, status: str
) -> None:
    store = Store(tmp_path)
    store.write(make_record(1, status="failed", evaluations=5))
    later = make_record(1, status=status, evaluations=0)
    store.write(later)
    assert store.record(CELL) == later
    assert store.history().num_rows == 0


def test_a_cell_whose_task_was_renamed_is_still_one_cell(tmp_path: Path, make_record: MakeRecord) -> None:
    store = Store(tmp_path)
    store.write(make_record(1, status="failed", task="folder"))
    store.write(make_record(1, task="movie"))
    assert store.results()["task"].to_pylist() == ["movie"]
    assert set(store.history()["task"].to_pylist()) == {"movie"}
    with pytest.raises(CellIsDone):
        store.write(make_record(1, task="folder"))


def test_a_store_that_does_not_exist_is_empty(tmp_path: Path) -> None:
    store = Store(tmp_path / "nothing")
    assert not store.exists()
    assert store.done() == {}
    assert store.results().num_rows == store.history().num_rows == store.weights().num_rows == 0
    assert "dev_score" in store.results().column_names
    with pytest.raises(UserError, match="no row of cell abc"):
        store.record("abc")
    assert not (tmp_path / "nothing").exists()


def test_history_without_a_results_row_is_no_cell(tmp_path: Path, make_record: MakeRecord) -> None:
    """What a kill between the three files leaves behind is not read, and the cell can be written afterwards."""
    store = Store(tmp_path)
    store.write(make_record(1, evaluations=4))
    store.write(make_record(2))
    (tmp_path / "results" / "task=movie" / "method=aang" / f"{CELL}.parquet").unlink()
    assert store.done() == {f"{2:016x}": "done"}
    assert store.history().num_rows == store.weights().num_rows == 3
    store.write(make_record(1))
    assert store.record(CELL) == make_record(1)


def test_a_newer_schema_is_refused(tmp_path: Path, make_record: MakeRecord) -> None:
    store = Store(tmp_path)
    store.write(make_record(1))
    path = results_file(tmp_path)
    table = pq.ParquetFile(path).read()
    pq.write_table(table.replace_schema_metadata({"aang_ray.schema": str(SCHEMA_VERSION + 1)}), path)
    for read in (store.done, store.results, lambda: store.record(CELL)):
        with pytest.raises(UserError, match=f"{path}.* version {SCHEMA_VERSION + 1}.* version {SCHEMA_VERSION} "):
            read()


def test_a_foreign_file_is_refused(tmp_path: Path, make_record: MakeRecord) -> None:
    store = Store(tmp_path)
    store.write(make_record(1))
    path = results_file(tmp_path)
    pq.write_table(pa.table({"cell": ["x"]}), path)
    with pytest.raises(UserError, match=f"{path}.*not written by this program"):
        store.done()
    pq.write_table(pa.table({"cell": ["x"]}).replace_schema_metadata({"aang_ray.schema": "1"}), path)
    with pytest.raises(UserError, match=f"{path} lacks the column status"):
        store.done()


@pytest.mark.parametrize("keep", [0, 3, 200, -1])
def test_a_truncated_file_is_named(tmp_path: Path, make_record: MakeRecord, keep: int) -> None:
    store = Store(tmp_path)
    store.write(make_record(1))
    path = results_file(tmp_path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=f"{path} cannot be read.*delete it and run again") as caught:
        store.results()
    assert "\n" not in str(caught.value)


def test_temporary_files_are_ignored_and_those_of_dead_processes_removed(
    tmp_path: Path, make_record: MakeRecord
) -> None:
    """A writer holds the lock of its file from the first byte on; a file that is still empty may be about to get it."""
    store = Store(tmp_path)
    store.write(make_record(1))
    alive, begun, old, dead = (tmp_path / f".tmp-{name}" for name in ("alive", "begun", "old", "dead"))
    begun.touch()
    old.touch()
    os.utime(old, (time.time() - 3700,) * 2)
    dead.write_bytes(b"half a row")
    shutil.copy(dead, results_file(tmp_path).parent / ".tmp-here.parquet")
    with alive.open("wb") as writer:
        fcntl.flock(writer, fcntl.LOCK_EX)
        writer.write(b"half a row")
        writer.flush()
        assert len(store.done()) == 1
        store.check_writable()
        assert [path.exists() for path in (alive, begun, old, dead)] == [True, True, False, False]
    store.write(make_record(2))
    assert not alive.exists()
    assert len(store.done()) == 2


@pytest.mark.parametrize("uri", ["s3://bucket/folder?endpoint_override=127.0.0.1:{port}&scheme=http"])
def test_a_store_that_does_not_answer(monkeypatch: pytest.MonkeyPatch, uri: str) -> None:
    """A server that takes the connection and says nothing. Ctrl-C ends the wait, too."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "x")
    with socket.create_server(("127.0.0.1", 0)) as server:
        uri = uri.format(port=server.getsockname()[1])
        with monkeypatch.context() as patch:
            patch.setattr(files, "ANSWER_SECONDS", 0.5)
            with pytest.raises(UserError, match=r"does not answer within 0.5 s; check the network and the credentials"):
                Store(uri)
        threading.Timer(0.5, os.kill, [os.getpid(), signal.SIGINT]).start()
        with pytest.raises(KeyboardInterrupt):
            Store(uri)


def test_a_place_that_cannot_be_a_store_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(UserError, match="is a file"):
        Store(file)
    with pytest.raises(UserError, match="nosuch://bucket/x cannot be opened"):
        Store("nosuch://bucket/x")
    with pytest.raises(UserError, match="empty"):
        Store("")


def test_a_relative_path_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Store("results").uri == str(tmp_path / "results")


@pytest.mark.parametrize("place", ["file/store", "/proc/store"])
def test_a_place_that_cannot_be_written_is_told_before_the_work(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"^store /\S*/store(: \S* is a file;| cannot be written: )"):
        Store(tmp_path / place).check_writable()


def test_a_place_that_can_be_written_is_made(tmp_path: Path) -> None:
    store = Store(tmp_path / "new" / "store")
    store.check_writable()
    assert store.exists()
    assert not store.done()
