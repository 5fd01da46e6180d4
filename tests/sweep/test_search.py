"""Optuna chooses configurations, hears the mean over their seeds, and goes on after a restart."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from aang_ray.config import RunConfig, parse_config
from aang_ray.errors import UserError
from aang_ray.sweep.expand import expand
from aang_ray.sweep.jobs import End, Job
from aang_ray.sweep.plan import PlannedCell, plan
from aang_ray.sweep.search import Search
from aang_ray.sweep.search_memory import SearchMemory
from aang_ray.sweep.search_space import SearchSpec, check_space
from aang_ray.sweep.spec import SweepOverrides, load_sweep
from tests.sweep.conftest import fake_resolve

SPACE = {"optim.body_lr": {"log": [1e-5, 1e-2]}, "n": [3, 6]}


class Run:
    """One start of a search on a store."""

    def __init__(
        self,
        store: Path,
        samples: int = 6,
        seeds: Sequence[int] = (0, 1),
        space: dict[str, Any] | None = None,
        methods: Sequence[str] = ("static",),
        scores: dict[str, float] | None = None,
    ) -> None:
        runs = [parse_config({"method": method}, "test") for method in methods]
        spec = SearchSpec.model_validate({"samples": samples, "space": space or SPACE})

        def lay_out(run: RunConfig) -> list[PlannedCell]:
            return plan([run], seeds, {}, fake_resolve)

        self.planned: list[PlannedCell] = []
        self.scores = {} if scores is None else scores
        self.ran: list[str] = []
        self.search = Search(runs, spec, lay_out, self.scores, SearchMemory(str(store)), self.planned.extend)

    def go(self, score: Callable[[PlannedCell], float | None], jobs: int | None = None) -> None:
        """Run jobs one after the other, all of them or so many; rows are in `scores`."""
        while jobs != len(self.ran) and (job := self.search.next()) is not None:
            self.ran.append(job.cell.cell)
            self.end(job, score(job.cell))

    def end(self, job: Job, score: float | None) -> None:
        if score is not None:
            self.scores[job.cell.cell] = score
        self.search.ended(job, End("failed" if score is None else "done", score))


def near(cell: PlannedCell) -> float:
    """Best at a rate of 1e-3."""
    return 1.0 - abs(3.0 - abs(math.log10(cell.config.optim.body_lr))) / 5


def told(run: Run) -> list[float | None]:
    """What Optuna has heard."""
    (study,) = run.search._studies
    return [trial.value for trial in study.optuna.trials]


def test_a_configuration_is_run_with_all_its_seeds_and_judged_by_their_mean(tmp_path: Path) -> None:
    run = Run(tmp_path, samples=3)
    run.go(lambda cell: 0.5 + 0.2 * cell.config.seed)
    assert len(run.ran) == len(set(run.ran)) == 6
    assert [cell.config.seed for cell in run.search.cells] == [0, 1] * 3
    assert len({cell.config.group for cell in run.search.cells}) == 3
    assert told(run) == [pytest.approx(0.6)] * 3
    assert run.planned == run.search.cells


def test_values_come_from_the_space_and_nothing_else_changes(tmp_path: Path) -> None:
    run = Run(tmp_path, samples=8, seeds=(0,))
    run.go(near)
    base = fake_resolve(parse_config({"method": "static"}, "test"))
    for cell in run.search.cells:
        assert 1e-5 <= cell.config.optim.body_lr <= 1e-2
        assert cell.config.n in (3, 6)
        optim = cell.config.optim.model_copy(update={"body_lr": base.optim.body_lr})
        assert cell.config.model_copy(update={"optim": optim, "n": base.n}) == base


def test_the_same_search_asks_the_same(tmp_path: Path) -> None:
    groups = []
    for folder in ("a", "b"):
        run = Run(tmp_path / folder, samples=14, seeds=(0,))
        run.go(near)
        groups.append([cell.config.group for cell in run.search.cells])
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
    again = Run(tmp_path, scores=first.scores)
    again.go(near)
    assert not set(first.ran) & set(again.ran)
    assert len(first.ran) + len(again.ran) == 12
    asked = [cell.cell for cell in first.search.cells]
    assert [cell.cell for cell in again.search.cells][: len(asked)] == asked
    assert len({cell.config.group for cell in again.search.cells}) == 6
    finished = Run(tmp_path, scores=again.scores)
    assert finished.search.finished
    assert all(value is not None for value in told(finished))


def test_a_failed_seed_fails_its_configuration(tmp_path: Path) -> None:
    run = Run(tmp_path, samples=2)
    run.go(lambda cell: None if cell.cell == run.ran[0] else 0.5)
    assert told(run) == [None, 0.5]


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
    assert sorted(cell.config.method.name for cell in run.search.cells)[-1] == "finetune"
    assert sum(cell.config.method.name == "finetune" for cell in run.search.cells) == 1, "it has nothing to choose"


def test_lists_are_values_like_others(tmp_path: Path) -> None:
    run = Run(tmp_path, samples=2, seeds=(0,), space={"optim.betas": [[0.9, 0.98], [0.9, 0.999]]})
    run.go(lambda cell: 0.5)
    assert {cell.config.optim.betas for cell in run.search.cells} <= {(0.9, 0.98), (0.9, 0.999)}


@pytest.mark.parametrize(
    ("search", "line"),
    [
        ("{space: {n: [1]}}", "search.samples is missing"),
        ("{samples: 0, space: {n: [1]}}", "search.samples: "),
        ("{samples: 2, space: {}}", "search.space: "),
        ("{samples: 2, space: {n: {integer: [3, 1]}}}", "low below high"),
        ("{samples: 2, space: {n: {integer: [1.5, 3]}}}", "whole bounds"),
        ("{samples: 2, space: {optim.clip: {log: [0, 1]}}}", "bounds above 0"),
        ("{samples: 2, space: {optim.clip: {}}}", "one of uniform, log, integer"),
        ("{samples: 2, space: {optim.clipp: [1.0]}}", "unknown key optim.clipp; did you mean optim.clip"),
        ("{samples: 2, space: {seed: [1]}}", "seed is not set here, use seeds"),
        ("{samples: 2, space: {optim.clip: [-1.0]}}", "optim.clip"),
    ],
)
def test_one_clear_line(sweep_file: Callable[[str], Path], search: str, line: str) -> None:
    path = sweep_file(f"methods: [finetune]\nsearch: {search}")
    with pytest.raises(UserError, match=line) as caught:
        checked(path)
    assert "\n" not in str(caught.value)


def checked(path: Path) -> None:
    """What happens to a sweep file before anything runs."""
    spec = load_sweep(path, SweepOverrides())
    runs = expand(spec, SweepOverrides(), str(path))
    assert spec.search is not None
    check_space(spec.search, runs)


def test_numbers_as_people_write_them(sweep_file: Callable[[str], Path]) -> None:
    checked(sweep_file("methods: [finetune]\nsearch: {samples: 2, space: {optim.body_lr: {log: [1e-5, 1e-3]}}}"))
    checked(sweep_file("methods: [finetune]\nsearch: {samples: 2, space: {optim.body_lr: [1e-5, 0.001]}}"))
