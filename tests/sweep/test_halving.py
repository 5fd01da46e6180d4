"""ASHA: which configurations go on, judged by the mean over their seeds, and the same after a restart."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aang_ray.config import RunConfig, parse_config
from aang_ray.errors import UserError
from aang_ray.sweep.halving import Halving
from aang_ray.sweep.jobs import End, Job
from aang_ray.sweep.plan import PlannedCell
from aang_ray.sweep.rungs import Asha, Past
from tests.sweep.conftest import fake_resolve

ASHA = Asha(grace=0.1, reduction=3)
"""Of 60 steps, evaluated after every sixth: rungs at steps 6, 18 and 54."""

RATES = [1e-5, 2e-5, 3e-5, 4e-5, 5e-5, 6e-5, 7e-5, 8e-5, 9e-5]


def config(rate: float = 1e-4, seed: int = 0, **more: Any) -> RunConfig:
    mapping = {"method": "finetune", "optim": {"body_lr": rate}, "schedule": {"eval_every": 6}, "seed": seed}
    return fake_resolve(parse_config({**mapping, **more}, "test"))


def cells(rates: list[float], seeds: int = 1, **more: Any) -> list[PlannedCell]:
    """Seeds vary slowest, as in a plan."""
    configs = [config(rate, seed, **more) for seed in range(seeds) for rate in rates]
    return [PlannedCell(one, one.cell, "waiting") for one in configs]


def quality(cell: PlannedCell) -> float:
    """Dev score that grows with the rate; seeds differ by more than rates do."""
    return 5000 * cell.config.optim.body_lr + (0.3 if cell.config.seed else 0.0)


def finish(job: Job) -> End:
    return End("done" if job.until is None else "cut", quality(job.cell))


def run_all(halving: Halving, at_once: int = 1) -> dict[str, int | None]:
    """Run to the end; where each cell was when it stopped for good (None: at its end)."""
    reached: dict[str, int | None] = {}
    running: list[Job] = []
    while not halving.finished or running:
        while len(running) < at_once and (job := halving.next()) is not None:
            running.append(job)
        job = running.pop(0)
        reached[job.cell.cell] = job.until
        halving.ended(job, finish(job))
    return reached


def by_rate(planned: list[PlannedCell], reached: dict[str, int | None]) -> dict[tuple[float, int], int | None]:
    return {(cell.config.optim.body_lr, cell.config.seed): reached[cell.cell] for cell in planned}


def test_rungs() -> None:
    assert ASHA.stops(config()) == (6, 18, 54, None)
    assert Asha(0.5, 2).stops(config()) == (30, None)
    assert Asha(0.01, 10).stops(config()) == (6, None)  # at 0.6, 6 and 60 steps: after an evaluation, before the end
    pretrained = config(final_finetune={"steps": 12, "body_lr": 1e-5})
    assert ASHA.stops(pretrained) == (6, 18, 54, None)  # rungs are in the stage before, which dev decides


@pytest.mark.parametrize("values", [{"grace": 0.0}, {"grace": 1.0}, {"reduction": 1}])
def test_settings_that_make_no_ladder_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"--grace|--reduction"):
        Asha(**values)


def test_one_of_three_goes_on_at_each_rung() -> None:
    # One after the other, best first: after three configurations the best of them goes on, after six the second, after
    # nine the third. Of those three the best goes on from step 18. Then no rung has three any more, and the furthest
    # goes on to its end alone.
    planned = cells(RATES[::-1])
    reached = by_rate(planned, run_all(Halving(planned, {}, ASHA)))
    assert {rate for (rate, _), step in reached.items() if step is None} == {9e-5}
    assert {rate for (rate, _), step in reached.items() if step == 18} == {8e-5, 7e-5}
    assert sum(step == 6 for step in reached.values()) == 6


def test_seeds_go_on_together_by_their_mean() -> None:
    planned = cells(RATES[:3], seeds=2)
    reached = by_rate(planned, run_all(Halving(planned, {}, ASHA)))
    # Seed 1 of every rate beats seed 0 of every rate; by the mean the largest rate wins, with both its seeds.
    assert {key for key, step in reached.items() if step is None} == {(3e-5, 0), (3e-5, 1)}
    assert {step for (rate, _), step in reached.items() if rate != 3e-5} == {6}


def test_a_configuration_waits_at_its_rung_for_its_last_seed() -> None:
    halving = Halving(cells(RATES[:3], seeds=2), {}, ASHA)
    jobs = [job for _ in range(6) if (job := halving.next()) is not None]
    assert [job.until for job in jobs] == [6] * 6
    for job in jobs[:-1]:
        halving.ended(job, finish(job))
    assert halving.next() is None
    assert not halving.finished
    halving.ended(jobs[-1], finish(jobs[-1]))
    promoted = halving.next()
    assert promoted is not None
    assert (promoted.until, promoted.cell.config.optim.body_lr) == (18, 3e-5)


def test_rows_of_a_table_do_not_compete() -> None:
    # static is better than every fine-tuning rate; each row has a whole run all the same.
    fine = cells(RATES[:3])
    static = cells([9e-5], method="static")
    reached = run_all(Halving([*fine, *static], {}, ASHA))
    assert reached[fine[2].cell] is None
    assert reached[static[0].cell] is None


def test_one_without_a_rival_is_never_paused() -> None:
    halving = Halving(cells([1e-4], seeds=2), {}, ASHA)
    jobs = [halving.next(), halving.next(), halving.next()]
    assert [job and job.until for job in jobs] == [None, None, None]
    assert jobs[2] is None


def test_a_run_that_ends_early_stands_at_all_rungs() -> None:
    planned = cells(RATES[:3])
    halving = Halving(planned, {}, ASHA)
    for _ in range(3):
        job = halving.next()
        assert job is not None
        halving.ended(job, End("done", 0.9) if job.cell == planned[0] else finish(job))
    assert halving.finished, "the best is at its end already"


def test_a_failed_configuration_does_not_go_on() -> None:
    planned = cells(RATES[:3])
    halving = Halving(planned, {}, ASHA)
    reached = []
    while not halving.finished:
        job = halving.next()
        assert job is not None
        reached.append((job.cell.config.optim.body_lr, job.until))
        halving.ended(job, End("failed") if job.cell == planned[2] else finish(job))
    assert reached == [(1e-5, 6), (2e-5, 6), (3e-5, 6), (2e-5, 18), (2e-5, 54), (2e-5, None)]


def past_of(ends: dict[str, tuple[Job, End]]) -> dict[str, Past]:
    """What the rows say of the last job of each cell."""
    past = {}
    for name, (job, end) in ends.items():
        if end.dev is not None:
            steps = 60 if job.until is None else job.until
            history = [(step, end.dev) for step in range(6, steps + 1, 6)]
            past[name] = Past(end.status == "done", steps, end.dev, history)
    return past


@settings(deadline=None)
@given(
    seeds=st.integers(1, 2),
    stop_after=st.integers(0, 25),
    order=st.permutations(RATES),
    at_once=st.integers(1, 3),
)
def test_a_restart_goes_on_from_the_rows(seeds: int, stop_after: int, order: list[float], at_once: int) -> None:
    """Killed after any number of ends, whatever ran at that moment: no rung runs twice, and the best comes through."""
    planned = cells(order, seeds)
    ends: dict[str, tuple[Job, End]] = {}
    ran: list[tuple[str, int | None]] = []
    halving = Halving(planned, {}, ASHA)
    running: list[Job] = []
    for _ in range(stop_after):
        while len(running) < at_once and (job := halving.next()) is not None:
            running.append(job)
        if not running:
            break
        job = running.pop(0)
        ran.append((job.cell.cell, job.until))
        ends[job.cell.cell] = (job, finish(job))
        halving.ended(job, finish(job))
    again = Halving(planned, past_of(ends), ASHA)
    while not again.finished:
        job = again.next()
        assert job is not None
        ran.append((job.cell.cell, job.until))
        ends[job.cell.cell] = (job, finish(job))
        again.ended(job, finish(job))
    assert len(set(ran)) == len(ran)
    whole = {job.cell.config.optim.body_lr for job, _ in ends.values() if job.until is None}
    assert max(order) in whole


def test_past_scores() -> None:
    cut = Past(False, 18, 0.8, [(6, 0.7), (12, 0.8), (18, 0.6)])
    assert [cut.best_until(step) for step in (6, 18, 54, None)] == [0.7, 0.8, None, None]
    assert [Past(True, 60, 0.9, []).best_until(step) for step in (6, None)] == [0.9, 0.9]
