"""Optuna chooses configurations, gets the mean score over seeds, and continues after a restart."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from aang_ray.config import parse_config
from aang_ray.store import Scores, Store
from aang_ray.sweep.plan import PlannedCell
from aang_ray.sweep.progress import SweepProgress
from aang_ray.sweep.search import Searches
from aang_ray.sweep.spec import SearchSpec
from aang_ray.train.record import failed_record
from tests.sweep.conftest import done_record, fake_resolve


@pytest.fixture(autouse=True)
def resolving(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aang_ray.sweep.search.resolve", fake_resolve)


SPACE = {"optim.body_lr": {"log": [1e-5, 1e-2]}, "n": [3, 6]}


class Run:
    """One start of a search on a store; the test plays Tune's part."""

    def __init__(
        self,
        store: Path,
        samples: int = 6,
        seeds: Sequence[int] = (0, 1),
        space: dict[str, Any] | None = None,
        methods: Sequence[str] = ("static",),
        keep_failed: bool = False,
    ) -> None:
        runs = [parse_config({"method": method}, "test") for method in methods]
        spec = SearchSpec.model_validate({"samples": samples, "space": space or SPACE})
        self.store = Store(store)
        self.ran: list[str] = []
        self.progress = SweepProgress(self.store.uri, "nightly", "key", Console(quiet=True))
        self.search = Searches(runs, spec, seeds, self.store, self.progress, keep_failed=keep_failed)

    def start(self) -> PlannedCell | None:
        """Start the next trial, which is named after its cell; return the cell."""
        trial = f"trial-{len(self.ran)}"
        suggested = self.search.suggest(trial)
        if not isinstance(suggested, dict):
            assert suggested == Searches.FINISHED
            return None
        cell = self.search.cells[suggested["trial"]["cell"]]
        self.ran.append(cell.cell)
        return cell

    def end(self, cell: PlannedCell, score: float | None) -> None:
        """End a trial after writing its row, as a real trial does."""
        trial = f"trial-{self.ran.index(cell.cell)}"
        if score is None:
            self.store.write(failed_record(cell.config, "loss is nan"))
            self.search.on_trial_complete(trial, {"status": "failed"})
            return
        self.store.write(done_record(cell.config, dev=Scores(score, score, 40, {}, 0.5)))
        self.search.on_trial_complete(trial, {"status": "done", "dev": score})

    def go(self, score: Callable[[PlannedCell], float | None], jobs: int | None = None) -> None:
        """Run `jobs` trials one after the other, or all of them."""
        while jobs != len(self.ran) and (cell := self.start()) is not None:
            self.end(cell, score(cell))


def near(cell: PlannedCell) -> float:
    """A score that is best at a learning rate of 1e-3."""
    return 1.0 - abs(3.0 - abs(math.log10(cell.config.optim.body_lr))) / 5


def told(run: Run) -> list[float | None]:
    """The scores that Optuna got."""
    (study,) = run.search._studies
    assert study._repeater is not None
    return [trial.value for trial in study._repeater.searcher._ot_study.trials]


def test_a_configuration_is_run_with_all_its_seeds_and_judged_by_their_mean(tmp_path: Path) -> None:
    run = Run(tmp_path, samples=3)
    run.go(lambda cell: 0.5 + 0.2 * cell.config.seed)
    assert len(run.ran) == len(set(run.ran)) == 6
    assert [cell.config.seed for cell in run.search.cells.values()] == [0, 1] * 3
    assert len({cell.config.group for cell in run.search.cells.values()}) == 3
    assert told(run) == [pytest.approx(0.6)] * 3
    assert list(run.progress._cells) == list(run.search.cells)


def test_values_come_from_the_space_and_nothing_else_changes(tmp_path: Path) -> None:
    run = Run(tmp_path, samples=8, seeds=(0,))
    run.go(near)
    base = fake_resolve(parse_config({"method": "static"}, "test"))
    for cell in run.search.cells.values():
        assert 1e-5 <= cell.config.optim.body_lr <= 1e-2
        assert cell.config.n in (3, 6)
        optim = cell.config.optim.model_copy(update={"body_lr": base.optim.body_lr})
        assert cell.config.model_copy(update={"optim": optim, "n": base.n}) == base


def test_the_same_search_asks_the_same(tmp_path: Path) -> None:
    groups = []
    for folder in ("a", "b"):
        run = Run(tmp_path / folder, samples=14, seeds=(0,))
        run.go(near)
        groups.append([cell.config.group for cell in run.search.cells.values()])
    assert groups[0] == groups[1]
    assert len(set(groups[0])) == 14


def test_it_learns(tmp_path: Path) -> None:
    run = Run(tmp_path, samples=30, seeds=(0,), space={"optim.body_lr": {"log": [1e-5, 1e-2]}})
    run.go(near)
    values = [value for value in told(run) if value is not None]
    assert sum(values[20:]) / 10 > sum(values[:10]) / 10  # the first ten are random


@pytest.mark.parametrize("jobs", [1, 4, 7])
def test_started_again_it_goes_on_with_what_it_asked_for(tmp_path: Path, jobs: int) -> None:
    first = Run(tmp_path)
    first.go(near, jobs)
    again = Run(tmp_path)
    again.go(near)
    assert not set(first.ran) & set(again.ran)
    assert len(first.ran) + len(again.ran) == 12
    asked = list(first.search.cells)
    assert list(again.search.cells)[: len(asked)] == asked
    assert len({cell.config.group for cell in again.search.cells.values()}) == 6
    finished = Run(tmp_path)
    assert finished.search.finished
    assert all(value is not None for value in told(finished))


def test_a_failed_seed_fails_its_configuration(tmp_path: Path) -> None:
    run = Run(tmp_path, samples=2)
    run.go(lambda cell: None if cell.cell == run.ran[0] else 0.5)
    assert told(run) == [-math.inf, 0.5], "worse than any score"


def test_a_trial_that_tune_gave_up_fails_its_configuration(tmp_path: Path) -> None:
    run = Run(tmp_path, samples=1, seeds=(0,))
    assert run.start() is not None
    run.search.on_trial_complete("trial-0", None, error=True)
    run.search.fail(run.ran[0])  # as the callback says when no retry is left
    assert told(run) == [-math.inf]


def test_a_trial_whose_process_died_before_it_started_is_asked_for_again_by_the_next_start(tmp_path: Path) -> None:
    run = Run(tmp_path, samples=1, seeds=(0,))
    first = run.start()
    run.search.on_trial_complete("trial-0", None, error=True)
    assert told(run) == [None]
    assert Run(tmp_path, samples=1, seeds=(0,)).start() == first


def test_all_cells_of_the_search_count_from_the_beginning(tmp_path: Path) -> None:
    run = Run(tmp_path, samples=3)
    assert (run.progress.to_come, run.progress._count()) == (6, "0/6")
    cell = run.start()
    assert cell is not None
    assert (run.progress.to_come, run.progress._count()) == (4, "0/6")
    run.progress.ended(cell, "done")
    assert run.progress._count() == "1/6"
    run.end(cell, 0.5)
    again = Run(tmp_path, samples=3)
    assert (again.progress.to_come, again.progress._count()) == (4, "0/5"), "one is done"


def test_a_stopped_trial_is_asked_for_again_by_the_next_start(tmp_path: Path) -> None:
    run = Run(tmp_path, samples=1, seeds=(0,))
    first = run.start()
    run.search.on_trial_complete("trial-0", {"status": "stopped"})
    assert told(run) == [None]
    assert Run(tmp_path, samples=1, seeds=(0,)).start() == first


def test_a_search_that_stops_asks_for_no_further_configuration(tmp_path: Path) -> None:
    run = Run(tmp_path, samples=3, seeds=(0,))
    run.start()
    run.search.closed = True
    assert run.start() is None
    assert run.search.to_come == 2


def test_failed_cells_are_kept_if_that_is_asked_for(tmp_path: Path) -> None:
    first = Run(tmp_path, samples=2)
    first.go(lambda cell: None if cell.cell == first.ran[0] else 0.5)
    again = Run(tmp_path, samples=2, keep_failed=True)
    again.go(lambda cell: 0.7)
    assert again.ran == []
    assert told(again) == [float("-inf"), 0.5]


def test_a_failed_seed_is_run_again_by_the_next_start(tmp_path: Path) -> None:
    first = Run(tmp_path, samples=2)
    first.go(lambda cell: None if cell.cell == first.ran[0] else 0.5)
    again = Run(tmp_path, samples=2)
    again.go(lambda cell: 0.7)
    assert again.ran == first.ran[:1]
    assert told(again) == [pytest.approx(0.6), 0.5]


def test_what_an_older_version_asked_for_is_continued(tmp_path: Path) -> None:
    first = Run(tmp_path, samples=2)
    first.go(near, 2)
    (path,) = (tmp_path / ".progress" / "searches").iterdir()
    asked = json.loads(path.read_text(encoding="utf-8"))
    assert (set(asked), asked["study"], len(asked["asked"])) == ({"study", "asked"}, path.stem, 1)
    assert set(asked["asked"][0]) == set(SPACE)


def test_at_once_configurations_differ_and_are_told_apart(tmp_path: Path) -> None:
    run = Run(tmp_path, samples=4)
    cells = [cell for _ in range(8) if (cell := run.start()) is not None]
    assert run.start() is None
    for cell in reversed(cells):
        run.end(cell, near(cell))
    assert told(run) == [pytest.approx(near(cell)) for cell in cells[::2]]
    assert len({cell.config.group for cell in cells}) == 4


def test_two_configurations_that_are_one_run_once(tmp_path: Path) -> None:
    # Fine-tuning has no n, so at most two of these differ.
    space = {"n": [1, 2, 3], "optim.clip": [1.0, 0.5]}
    run = Run(tmp_path, samples=9, seeds=(0,), space=space, methods=("finetune",))
    run.go(lambda cell: cell.config.optim.clip)
    assert 1 <= len(run.ran) == len(set(run.ran)) <= 2
    assert None not in told(run)


def test_settings_reach_the_methods_that_have_them(tmp_path: Path) -> None:
    run = Run(tmp_path, samples=2, seeds=(0,), space={"method.aux_lr": [0.1, 1.0]}, methods=("finetune", "aang"))
    run.go(lambda cell: 0.5)
    assert sorted(cell.config.method.name for cell in run.search.cells.values())[-1] == "finetune"
    assert sum(cell.config.method.name == "finetune" for cell in run.search.cells.values()) == 1, (
        "it has nothing to choose"
    )


def test_lists_are_values_like_others(tmp_path: Path) -> None:
    run = Run(tmp_path, samples=2, seeds=(0,), space={"optim.betas": [[0.9, 0.98], [0.9, 0.999]]})
    run.go(lambda cell: 0.5)
    assert {cell.config.optim.betas for cell in run.search.cells.values()} <= {(0.9, 0.98), (0.9, 0.999)}
