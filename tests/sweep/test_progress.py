"""What a person sees: one line a trial, the time left, how a trial ended."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from aang_ray.config import parse_config
from aang_ray.sweep import progress as module
from aang_ray.sweep.crash import CRASHED, describe_crash
from aang_ray.sweep.monitor import describe_end
from aang_ray.sweep.plan import PlannedCell
from aang_ray.sweep.progress import SweepProgress, duration
from tests.sweep.conftest import fake_resolve


def cell(method: str) -> PlannedCell:
    config = fake_resolve(parse_config({"method": method}, "test"))
    return PlannedCell(config, config.cell, "waiting")


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


@pytest.mark.parametrize("terminal", [False, True])
def test_a_line_for_every_trial(terminal: bool) -> None:
    stream = io.StringIO()
    cells = [cell("finetune"), cell("static")]
    with SweepProgress(cells, Console(file=stream, force_terminal=terminal, width=60)) as progress:
        progress.ended(cells[1], "dev 76.00 · test 75.00 accuracy · 3 s")
        progress.ended(cells[0], "FAILED: [brackets] stay")
    text = stream.getvalue()
    assert "[1/2] movie · static-td n=6 · seed 0 · dev 76.00 · test 75.00 accuracy · 3 s\n" in text
    assert "[2/2] movie · finetune · seed 0 · FAILED: [brackets] stay\n" in text


def test_the_time_left_follows_the_work_done(clock: Clock) -> None:
    # Work 1920 + 4800 texts. After 60 s the first is through and half of the second: 4320 done, 2400 left,
    # so 60 s x 2400 / 4320 = 33 s.
    stream = io.StringIO()
    cells = [cell("finetune"), cell("static")]
    with SweepProgress(cells, Console(file=stream, width=100)) as progress:
        progress.ended(cells[0], "done")
        clock.now = 60.0
        progress.evaluated(cells[1].cell, 30, 60)
        clock.now = 61.0
        progress.evaluated(cells[1].cell, 31, 60)  # too soon for another line
    assert stream.getvalue().splitlines()[1:] == ["1/2 cells, 64 % of the work, about 33 s left"]


def test_cells_that_come_later_count_from_then_on() -> None:
    stream = io.StringIO()
    cells = [cell("finetune"), cell("static")]
    with SweepProgress([], Console(file=stream, width=60)) as progress:
        progress.add(cells[:1])
        progress.ended(cells[0], "done")
        progress.add(cells[1:])
        progress.ended(cells[1], "done")
    assert [line[:5] for line in stream.getvalue().splitlines()] == ["[1/1]", "[2/2]"]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.6, "1 min 00 s"), (185, "3 min 05 s"), (7800, "2 h 10 min")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_ends_in_words() -> None:
    done = {"status": "done", "dev": 0.5, "test": 0.25, "metric": "macro_f1", "seconds": 61, "majority": True}
    assert describe_end(done) == "dev 50.00 · test 25.00 macro_f1 · 1 min 01 s · stayed at the majority class"
    assert describe_end({"status": "failed", "error": "out of memory"}) == "FAILED: out of memory"
    paused = {"status": "cut", "step": 40, "dev": 0.5}
    assert describe_end(paused) == "paused after step 40 · dev 50.00 so far"
    assert describe_end({"status": "cut", "step": 4}) == "paused after step 4 · no dev score yet"
    assert describe_end({"status": "elsewhere"}) == "done already, by another process"


def test_crashes_in_words() -> None:
    assert describe_crash("ray.exceptions.ActorDiedError: The actor died unexpectedly") == CRASHED
    assert (
        describe_crash("trace\nModuleNotFoundError: No module\n")
        == "the trial could not run: ModuleNotFoundError: No module"
    )
    assert describe_crash("") == "the trial could not run: Ray gave no reason"
