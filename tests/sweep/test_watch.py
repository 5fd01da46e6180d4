"""What `aang watch` shows of a sweep that runs, on a terminal and in a pipe."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from aang_ray.cli import main
from aang_ray.config import parse_config
from aang_ray.store import HistoryRow, Scores, Store, WeightRow
from aang_ray.sweep import watch as module
from aang_ray.sweep.plan import PlannedCell
from aang_ray.sweep.progress import KEPT_OBJECTIVES, Evaluation, SweepProgress
from aang_ray.sweep.status import newest_file, read_rows, status_of
from aang_ray.sweep.watch import screen_of, sparkline, watch
from aang_ray.train.record import failed_record
from tests.sweep.conftest import done_record, fake_resolve

METHODS = ("finetune", "static", "aang")
CELLS = [
    PlannedCell(config, config.cell, "waiting")
    for seed in (0, 1, 2)
    for config in (fake_resolve(parse_config({"method": name, "seed": seed}, "test")) for name in METHODS)
]
FINETUNE, STATIC, AANG = CELLS[:3]
NAMES = [f"end-task/{t}/bidirectional/{o}" for t in ("mask", "replace", "bert-op") for o in ("denoise", "tf-idf")]


def evaluation(step: int, score: float, weight: float, *weights: float) -> Evaluation:
    return Evaluation(step, step / 2, score, {"end_task": 0.5}, weight, dict(zip(NAMES, weights, strict=False)))


@pytest.fixture
def progress(tmp_path: Path) -> SweepProgress:
    progress = SweepProgress(str(tmp_path), "nightly", "key", Console(quiet=True))
    progress.add(CELLS)
    progress._write()
    return progress


def screen(store: Path, width: int = 80, height: int = 40) -> list[str]:
    console = Console(file=io.StringIO(), width=width, height=height, force_terminal=True, color_system=None)
    opened = Store(store)
    console.print(screen_of(status_of(opened, newest_file(opened, None), read_rows(opened)), console))
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


def run_two(progress: SweepProgress) -> None:
    progress.update(AANG.cell, state="running")
    progress.evaluated(AANG.cell, evaluation(15, 0.70, 0.50, 0.3, 0.2, 0.2, 0.1, 0.1, 0.1))
    progress.evaluated(AANG.cell, evaluation(30, 0.75, 0.52, 0.2, 0.4, 0.2, 0.1, 0.05, 0.05))
    progress.update(STATIC.cell, state="running")
    progress._write()


@pytest.mark.parametrize("width", [80, 120])
def test_the_screen(tmp_path: Path, progress: SweepProgress, width: int) -> None:
    Store(tmp_path).write(done_record(FINETUNE.config))
    progress.ended(FINETUNE, "dev 75.00")
    run_two(progress)
    lines = screen(tmp_path, width)
    assert max(len(line.rstrip()) for line in lines) <= width
    assert lines[0].rstrip() == "nightly: 9 cells: 1 done, 2 running, 6 waiting"
    # finetune 1920 texts, aang half of 6720; all: 3 x (1920 + 4800 + 6720) = 40320
    assert lines[1].rstrip().endswith("13 % of the work")
    (cell,) = (line for line in lines if "aang-td" in line)
    assert cell.split()[-6:] == ["dev", "75.00", "▁█", "λ", "0.52", "▲"]
    assert "30/60" in cell
    at = lines.index(cell)
    weights = [line.split("━")[0].strip() + " " + " ".join(line.split()[-2:]) for line in lines[at + 1 : at + 3]]
    assert weights == ["mask · bidirectional · tf-idf 0.400 ▲", "mask · bidirectional · denoise 0.200 ▼"]
    assert lines[at + 3].rstrip().endswith("0.200"), "what stays has no arrow"
    assert sum("bidirectional" in line for line in lines) == KEPT_OBJECTIVES
    assert lines[-1].rstrip().endswith("dev 75.00 · test 75.00 · 12 s")


def test_a_low_terminal_keeps_the_cells_and_drops_their_weights(tmp_path: Path, progress: SweepProgress) -> None:
    run_two(progress)
    for cell in CELLS[3:]:
        progress.update(cell.cell, state="running")
    progress._write()
    lines = screen(tmp_path, height=10)
    assert len(lines) <= 10
    assert lines[-1].rstrip() == "and 4 more that run"
    assert not any("bidirectional" in line for line in lines)


def test_a_long_error_leaves_room_for_the_name_of_its_run(tmp_path: Path, progress: SweepProgress) -> None:
    Store(tmp_path).write(failed_record(STATIC.config, "[red]out of memory " * 20))
    progress.ended(STATIC, "FAILED")
    progress._write()
    (line,) = (line for line in screen(tmp_path) if "[red]" in line)
    assert line.startswith("movie · static-td n=6 · seed 0  failed: [red]out of memory")


def in_pipe(store: Path, between: Callable[[int], None], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Watch in a pipe; `between` is called after each look with its number."""
    stream, looks = io.StringIO(), iter(range(1, 100))
    monkeypatch.setattr(module.time, "sleep", lambda _: between(next(looks)))
    watch(Store(store), None, Console(file=stream, width=80))
    return stream.getvalue().splitlines()


def test_a_pipe_gets_a_line_for_each_evaluation_and_end(
    tmp_path: Path, progress: SweepProgress, monkeypatch: pytest.MonkeyPatch
) -> None:
    def between(look: int) -> None:
        if look == 1:
            run_two(progress)
        if look == 2:
            Store(tmp_path).write(done_record(AANG.config))
            progress.ended(AANG, "done")
        if look == 4:
            progress._ended = True
        progress._write()

    lines = in_pipe(tmp_path, between, monkeypatch)
    told = [line.split(" ", 1)[1] for line in lines[:4]]
    assert told[0].startswith("nightly: 9 cells: 9 waiting; no trial runs yet")
    assert told[1] == "movie · static-td n=6 · seed 0 · step 0/60"
    assert told[2].startswith(
        "movie · aang-td n=6 · seed 0 · step 30/60 · dev 75.00 · λ 0.520 · most weight: mask · bidirectional · tf-idf"
    )
    assert told[3] == "movie · aang-td n=6 · seed 0 · dev 75.00 · test 75.00 · 12 s"
    assert lines[4] == "nightly: 9 cells: 1 done, 1 stopped, 7 waiting", "at the end, what `aang status` prints"


def test_ctrl_c_ends_the_watching_only(
    tmp_path: Path, progress: SweepProgress, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(_: int) -> None:
        raise KeyboardInterrupt

    assert in_pipe(tmp_path, stop, monkeypatch)[-1] == "the sweep goes on; `aang watch` shows it again"


def test_rows_are_read_when_a_cell_has_ended(
    tmp_path: Path, progress: SweepProgress, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = []

    def counted(store: Store) -> dict[str, object]:
        reads.append(store.uri)
        return {}

    def between(look: int) -> None:
        progress.update(STATIC.cell, state="ended" if look >= 3 else "running", step=look)
        progress._ended = look == 5
        progress._write()

    monkeypatch.setattr(module, "read_rows", counted)
    in_pipe(tmp_path, between, monkeypatch)
    assert len(reads) == 3, "at first, when the cell has ended, and when the driver has"


def test_the_exit_code(tmp_path: Path, progress: SweepProgress, capsys: pytest.CaptureFixture[str]) -> None:
    progress._ended = True
    progress._write()
    assert main(["watch", "--store", str(tmp_path)]) == 1, "cells remain"
    for cell in CELLS:
        Store(tmp_path).write(done_record(cell.config))
    assert main(["watch", "--store", str(tmp_path)]) == 0
    assert "nothing runs, nothing is left to run" in capsys.readouterr().out
    assert main(["watch", "--store", str(tmp_path / "none")]) == 2


def test_sparks() -> None:
    assert sparkline([0.0, 0.5, 1.0]) == "▁▅█"
    assert sparkline([0.7, 0.7]) == "▅▅"
    assert sparkline([]) == ""


def test_weights_of_the_whole_space_follow_from_the_factors() -> None:
    scores = Scores(0.5, 0.4, 10, {"a": 10}, 1.0)
    row = HistoryRow(30, scores, {"end_task": 0.5, NAMES[0]: 2.0}, 1.0, 1, 1)
    factors = {
        "A": {NAMES[0]: 0.0, NAMES[1]: 0.0},
        "D": {"end-task": 0.0},
        "T": {"mask": 1.0},
        "R": {"bidirectional": 0.0},
        "O": {"denoise": 0.0, "tf-idf": 1.0},
    }
    found = Evaluation.of(AANG.config, row, WeightRow(30, 0.6, {NAMES[0]: 1.0}, factors, {}))
    # softmax(1, 2) = 0.2689, 0.7311
    assert found.weights == pytest.approx({NAMES[0]: 0.26894, NAMES[1]: 0.73106}, abs=1e-5)
    assert (found.score, found.end_task_weight, found.losses[NAMES[0]]) == (0.5, 0.6, 2.0)
    assert Evaluation.of(AANG.config, row, None).weights == {}
