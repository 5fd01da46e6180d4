"""Writers that are killed, and writers at once: what is visible is whole, and nothing is there twice."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from aang_ray.store import CellIsDone, CellRecord, Store, files
from aang_ray.store import store as write

MakeRecord = Callable[..., CellRecord]

# Writes cells first..last-1 that have no done row: odd ones fail first, and are then replaced.
WRITER = """
import sys
sys.path.insert(0, sys.argv[1])
from conftest import make
from aang_ray.store import CellIsDone, Store

store, first, last = Store(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
done = store.done()
print("ready", flush=True)
for number in range(first, last):
    for status in ("failed", "done") if number % 2 else ("done",):
        if done.get(f"{number:016x}") != "done":
            try:
                store.write(make(number, status=status, evaluations=2 + number % 5))
            except CellIsDone:
                print("refused", number, flush=True)
"""

# Dies at the n-th renaming, before or after it.
DYING = """
import os, signal, sys
left, replace = int(sys.argv[5]), os.replace

def dying(source, target):
    global left
    left -= 1
    if left == 0 and sys.argv[6] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)

os.replace = dying
"""


class Died(BaseException):
    """Stands for a kill: no code of the store catches it."""


def command(script: str, root: Path, *arguments: int) -> list[str]:
    here = str(Path(__file__).parent)
    return [sys.executable, "-c", script, here, str(root), *map(str, arguments)]


def assert_whole(root: Path, make_record: MakeRecord) -> dict[str, str]:
    """Every visible row equals what its writer meant to write, in all three tables, and is there once."""
    store = Store(root)
    cells = store.results()["cell"].to_pylist()
    assert len(cells) == len(set(cells))
    status = store.done()
    for cell in cells:
        number = int(cell, 16)
        assert store.record(cell) == make_record(number, status=status[cell], evaluations=2 + number % 5)
    assert store.history().num_rows == sum(2 + int(cell, 16) % 5 for cell in cells)
    return dict(status)


def test_killed_at_random_moments(tmp_path: Path, make_record: MakeRecord) -> None:
    cells, seen = 2000, 0
    for attempt in range(5):
        with subprocess.Popen(command(WRITER, tmp_path, 0, cells), stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None
            assert writer.stdout.readline() == "ready\n"
            time.sleep(random.Random(attempt).uniform(0.0, 0.15))
            writer.kill()
        done = [cell for cell, status in assert_whole(tmp_path, make_record).items() if status == "done"]
        assert len(done) >= seen
        seen = len(done)
    assert seen < cells, "the writers were killed while they wrote"


@pytest.mark.parametrize("after", [0, 1])
def test_killed_while_the_row_is_renamed(tmp_path: Path, make_record: MakeRecord, after: int) -> None:
    """The third renaming is that of the results row."""
    died = subprocess.run(command(DYING + WRITER, tmp_path, 0, 1, 3, after), capture_output=True)
    assert died.returncode == -signal.SIGKILL, died.stderr.decode()
    assert assert_whole(tmp_path, make_record) == ({f"{0:016x}": "done"} if after else {})
    subprocess.run(command(WRITER, tmp_path, 0, 1), check=True, capture_output=True)
    assert assert_whole(tmp_path, make_record) == {f"{0:016x}": "done"}


@pytest.mark.parametrize("replaces_a_failed_row", [False, True])
def test_dying_at_every_change_of_the_disk(
    tmp_path: Path, make_record: MakeRecord, monkeypatch: pytest.MonkeyPatch, replaces_a_failed_row: bool
) -> None:
    """Before and after each flush, renaming and removal; whatever was left, the next writer finishes the cell."""
    meant = make_record(1, evaluations=3)
    for moment in range(1, 100):
        store = Store(tmp_path / str(moment))
        if replaces_a_failed_row:
            store.write(make_record(1, status="failed", evaluations=3))
        with monkeypatch.context() as patch:
            die_at(moment, patch)
            try:
                store.write(meant)
                finished = True
            except Died:
                finished = False
        status = assert_whole(tmp_path / str(moment), make_record)
        if finished:
            assert moment > 18, "three files, each flushed, renamed and its folder flushed, before and after"
            return
        if status != {meant.result.cell: "done"}:
            store.write(meant)
        assert store.record(meant.result.cell) == meant
    pytest.fail("the writer changes the disk more often than this test looks")


def die_at(moment: int, patch: pytest.MonkeyPatch) -> None:
    left = moment

    def count() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise Died

    def dying(function: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object) -> object:
            count()
            result = function(*arguments)
            count()
            return result

        return call

    for owner, name in ((os, "replace"), (os, "fsync"), (files, "remove"), (write, "remove")):
        patch.setattr(owner, name, dying(getattr(owner, name)))


def test_writers_at_once_write_every_cell_once(tmp_path: Path, make_record: MakeRecord) -> None:
    cells = 40
    writers = [
        subprocess.Popen(command(WRITER, tmp_path, 0, cells), stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    for writer in writers:
        writer.communicate(timeout=120)
    assert [writer.returncode for writer in writers] == [0, 0, 0]
    assert assert_whole(tmp_path, make_record) == {f"{number:016x}": "done" for number in range(cells)}
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".tmp-")]


def test_reading_while_rows_are_written_sees_whole_rows(tmp_path: Path, make_record: MakeRecord) -> None:
    with subprocess.Popen(command(WRITER, tmp_path, 0, 60), stdout=subprocess.PIPE, text=True) as writer:
        reads = 0
        while writer.poll() is None:
            for row in Store(tmp_path).results().to_pylist():
                assert json.loads(row["config"])["seed"] == row["seed"] == int(row["cell"], 16)
            reads += 1
    assert reads > 1
    assert writer.returncode == 0


@pytest.mark.parametrize("failed_before", [False, True])
def test_of_writers_of_one_cell_exactly_one_wins(tmp_path: Path, make_record: MakeRecord, failed_before: bool) -> None:
    writers, cells = 4, 10
    together = Barrier(writers)

    def race(writer: int) -> list[int]:
        won = []
        for number in range(cells):
            together.wait()
            try:
                Store(tmp_path).write(make_record(number, evaluations=writer))
                won.append(number)
            except CellIsDone:
                continue
        return won

    for number in range(cells if failed_before else 0):
        Store(tmp_path).write(make_record(number, status="failed"))
    with ThreadPoolExecutor(writers) as pool:
        won = list(pool.map(race, range(writers)))
    assert sorted(number for numbers in won for number in numbers) == list(range(cells))
    winners = {number: writer for writer, numbers in enumerate(won) for number in numbers}
    for number, writer in winners.items():
        assert Store(tmp_path).record(f"{number:016x}") == make_record(number, evaluations=writer)
