"""What a running sweep prints, and the file that `aang status` reads."""

from __future__ import annotations

import io
import json
import logging
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pyarrow.fs import FileSelector
from rich.console import Console

from aang_ray.config import parse_config
from aang_ray.store import Store
from aang_ray.store.files import open_location
from aang_ray.sweep import progress as module
from aang_ray.sweep.plan import PlannedCell
from aang_ray.sweep.progress import FOLDER, SweepProgress
from tests.sweep.conftest import done_record, fake_resolve


def cell(method: str) -> PlannedCell:
    config = fake_resolve(parse_config({"method": method}, "test"))
    return PlannedCell(config, config.cell, "waiting")


def progress_of(*cells: PlannedCell, store: Path | str, console: Console | None = None) -> SweepProgress:
    """The progress of a sweep of some cells."""
    progress = SweepProgress(str(store), "nightly", "key", console or Console(quiet=True))
    progress.add(cells)
    return progress


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(module, "QUICKEST_SECONDS", 3600.0)  # only the test's own calls print
    return clock


@pytest.mark.parametrize("terminal", [False, True])
def test_a_line_for_every_trial(terminal: bool, tmp_path: Path) -> None:
    stream = io.StringIO()
    cells = [cell("finetune"), cell("static")]
    console = Console(file=stream, force_terminal=terminal, width=60)
    with progress_of(*cells, store=tmp_path, console=console) as progress:
        progress.ended(cells[1], "dev 76.00 · test 75.00 accuracy · 3 s")
        progress.ended(cells[0], "FAILED: [brackets] stay")
    text = stream.getvalue()
    assert "[1/2] movie · static-td n=6 · seed 0 · dev 76.00 · test 75.00 accuracy · 3 s\n" in text
    assert "[2/2] movie · finetune · seed 0 · FAILED: [brackets] stay\n" in text


def test_the_time_left_follows_the_work_done(clock: Clock, tmp_path: Path) -> None:
    # Work 1920 + 4800 texts. After 60 s the first is through and half of the second: 4320 done, 2400 left,
    # so 60 s x 2400 / 4320 = 33 s.
    stream = io.StringIO()
    cells = [cell("finetune"), cell("static")]
    with progress_of(*cells, store=tmp_path, console=Console(file=stream, width=100)) as progress:
        progress.ended(cells[0], "done")
        clock.now = 60.0
        progress.update(cells[1].cell, step=30)
        clock.now = 61.0
        progress.update(cells[1].cell, step=31)  # too soon for another line
    assert stream.getvalue().splitlines()[1:] == ["1/2 cells, 64 % of the work, 72 texts a second, about 33 s left"]


def test_no_time_is_estimated_before_a_twentieth_of_the_work(clock: Clock, tmp_path: Path) -> None:
    stream = io.StringIO()
    cells = [cell("finetune"), cell("static")]
    with progress_of(*cells, store=tmp_path, console=Console(file=stream, width=100)) as progress:
        clock.now = 100.0
        progress.update(cells[1].cell, step=3, state="running", loss=0.51)  # 240 of 6720 texts
        clock.now = 200.0
        progress.update(cells[1].cell, step=6)
    assert stream.getvalue().splitlines() == [
        "0/2 cells, 4 % of the work, 2 texts a second, time left: not known yet; "
        "movie · static-td n=6 · seed 0: step 3/60, loss 0.510",
        "0/2 cells, 7 % of the work, 2 texts a second, about 43 min 20 s left; "
        "movie · static-td n=6 · seed 0: step 6/60, loss 0.510",
    ]


def test_cells_that_are_done_or_whose_failure_is_kept_do_not_count(tmp_path: Path) -> None:
    stream = io.StringIO()
    cells = [replace(cell("finetune"), state="done"), replace(cell("static"), state="failed"), cell("aang")]
    progress = SweepProgress(str(tmp_path), "nightly", "key", Console(file=stream, width=60))
    with progress:
        progress.add(cells, keep_failed=True)
        progress.ended(cells[2], "done")
    assert stream.getvalue().startswith("[1/1]")
    assert len(content(tmp_path)["cells"]) == 3


def test_cells_to_come_count_as_much_as_the_mean_of_the_others(clock: Clock, tmp_path: Path) -> None:
    # Work 1920 + 4800 texts, and 2 x 3360 to come. After 60 s the first cell has ended: 11520 texts are left.
    stream = io.StringIO()
    cells = [cell("finetune"), cell("static")]
    with progress_of(*cells, store=tmp_path, console=Console(file=stream, width=100)) as progress:
        progress.to_come = 2
        clock.now = 60.0
        progress.ended(cells[0], "done")
    assert stream.getvalue().splitlines() == [
        "[1/4] movie · finetune · seed 0 · done",
        "1/4 cells, 14 % of the work, 32 texts a second, about 6 min 00 s left",
    ]
    assert content(tmp_path)["to_come"] == 2


def test_cells_that_come_later_count_from_then_on(tmp_path: Path) -> None:
    stream = io.StringIO()
    cells = [cell("finetune"), cell("static")]
    with progress_of(store=tmp_path, console=Console(file=stream, width=60)) as progress:
        progress.add(cells[:1])
        progress.ended(cells[0], "done")
        progress.add(cells[1:])
        progress.ended(cells[1], "done")
    assert [line[:5] for line in stream.getvalue().splitlines()] == ["[1/1]", "[2/2]"]


def test_a_minute_without_any_cell_is_no_error(clock: Clock, tmp_path: Path) -> None:
    stream = io.StringIO()
    progress = progress_of(store=tmp_path, console=Console(file=stream, width=80))
    clock.now += 61.0
    with progress:
        pass
    assert "0/0 cells, 0 % of the work" in stream.getvalue()


def test_what_a_checkpoint_brought_took_no_time(clock: Clock, tmp_path: Path) -> None:
    # 4800 texts, 2400 of them before the start; 1200 more take 60 s, so the other 1200 take another 60 s.
    stream = io.StringIO()
    with progress_of(STATIC, store=tmp_path, console=Console(file=stream, width=100)) as progress:
        progress.resumed(STATIC.cell, 30)
        progress.update(STATIC.cell, state="running", step=30)
        clock.now = 60.0
        progress.update(STATIC.cell, step=45, score=0.75)
    assert stream.getvalue().splitlines() == [
        "0/1 cells, 75 % of the work, 20 texts a second, about 1 min 00 s left; "
        "movie · static-td n=6 · seed 0: step 45/60, dev 75.00 accuracy"
    ]


def test_a_line_also_where_nothing_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "QUICKEST_SECONDS", 0.01)
    monkeypatch.setattr(module, "PLAIN_INTERVAL", 0.05)
    stream = io.StringIO()
    with progress_of(STATIC, store=tmp_path, console=Console(file=stream, width=100)):
        until(lambda: stream.getvalue().count("0/1 cells, 0 % of the work, time left: not known yet") > 2)


def test_a_terminal_has_a_bar_for_each_run(tmp_path: Path) -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=160)
    cells = [cell("finetune"), cell("static")]
    with progress_of(*cells, store=tmp_path, console=console) as progress:
        progress.update(cells[1].cell, state="running", step=30, loss=0.25)
        progress._bar.refresh()
        assert [row.fields["left"] for row in progress._bar.tasks[1:]] == ["step 30/60, loss 0.250"]
        progress.ended(cells[1], "done")
        assert len(progress._bar.tasks) == 1
    assert "movie · static-td n=6 · seed 0" in stream.getvalue()


STATIC = cell("static")


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BEAT_SECONDS", 0.02)
    monkeypatch.setattr(module, "QUICKEST_SECONDS", 0.01)


def content(store: Path) -> dict[str, Any]:
    """Content of a store's only progress file."""
    (path,) = (store / ".progress" / "sweeps").glob("nightly-*.json")
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


@pytest.mark.usefixtures("hurried")
def test_a_change_is_written_soon_and_time_goes_on(tmp_path: Path) -> None:
    with progress_of(STATIC, store=tmp_path) as progress:
        until(lambda: bool(content(tmp_path)["cells"]))
        (found,) = content(tmp_path)["cells"]
        assert (found["cell"], found["title"], found["state"]) == (STATIC.cell, STATIC.title, "waiting")
        assert (found["step"], found["steps"], found["work"], found["metric"]) == (0, 60, 4800, "accuracy")
        progress.update(STATIC.cell, state="running", step=30, score=0.75)
        until(lambda: bool(content(tmp_path)["cells"][0]["step"] == 30))
        (found,) = content(tmp_path)["cells"]
        assert (found["state"], found["score"]) == ("running", 0.75)
        before = content(tmp_path)["updated_at"]
        until(lambda: bool(content(tmp_path)["updated_at"] > before))  # without a further change
        assert not content(tmp_path)["ended"]
    assert content(tmp_path)["ended"]
    assert not list(tmp_path.glob(".tmp-*"))


def test_the_last_change_is_in_the_file_at_the_end(tmp_path: Path) -> None:
    def interrupted() -> None:
        with progress_of(STATIC, store=tmp_path) as progress:
            progress.update(STATIC.cell, state="stopped", step=30)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert content(tmp_path)["ended"]
    assert [(one["state"], one["step"]) for one in content(tmp_path)["cells"]] == [("stopped", 30)]


def test_the_same_sweep_has_one_file_and_another_of_the_same_name_its_own(tmp_path: Path) -> None:
    for key in ("a", "b", "a"):
        with SweepProgress(str(tmp_path), "nightly", key, Console(quiet=True)):
            pass
    assert len(list((tmp_path / ".progress" / "sweeps").iterdir())) == 2


def test_a_store_behind_a_uri() -> None:
    with progress_of(STATIC, store="memory://progress"):
        pass
    location = open_location("memory://progress")
    (info,) = location.filesystem.get_file_info(FileSelector(location.path(*FOLDER)))
    with location.filesystem.open_input_file(info.path) as stream:
        assert json.loads(stream.read())["ended"]


def test_rows_and_progress_do_not_meet(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with progress_of(STATIC, store=store.uri):
        store.write(done_record(STATIC.config))
        assert store.done() == {STATIC.cell: "done"}
        assert store.results().num_rows == 1


def test_a_store_that_fails_does_not_end_a_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / ".progress").write_text("a file where a folder should be")
    with caplog.at_level(logging.WARNING), progress_of(STATIC, store=tmp_path):
        pass
    assert "could not be written" in caplog.text


KILLED = """
import sys, time
from rich.console import Console
from aang_ray.sweep import progress
progress.BEAT_SECONDS = progress.QUICKEST_SECONDS = 0.0
with progress.SweepProgress(sys.argv[1], "nightly", "key", Console(quiet=True)):
    print("running", flush=True)
    time.sleep(60)
"""


def test_a_kill_leaves_a_whole_file(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"running\n"
        process.send_signal(signal.SIGKILL)
    assert not content(tmp_path)["ended"]
