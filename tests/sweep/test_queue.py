"""Which job starts when, and what becomes of one whose process died."""

from __future__ import annotations

from typing import Any

from aang_ray.config import parse_config
from aang_ray.sweep.jobs import End, Grid, Job
from aang_ray.sweep.needs import Need
from aang_ray.sweep.plan import PlannedCell
from aang_ray.sweep.queue import RETRIES, Queue
from tests.sweep.conftest import fake_resolve

DONE = End("done", 0.5)


def planned(seed: int, **resources: Any) -> PlannedCell:
    config = fake_resolve(parse_config({"method": "finetune", "seed": seed, "resources": resources}, "test"))
    return PlannedCell(config, config.cell, "waiting")


def queue_of(*cells: PlannedCell, room: int = 99) -> Queue:
    return Queue(Grid(cells), lambda need: room)


def take(queue: Queue) -> Job:
    job = queue.take()
    assert job is not None
    return job


def seeds(jobs: list[Job | None]) -> list[int | None]:
    return [None if job is None else job.cell.config.seed for job in jobs]


def test_as_many_as_there_is_room_for_in_the_order_of_the_plan() -> None:
    queue = queue_of(*(planned(seed) for seed in range(3)), room=2)
    jobs = [queue.take() for _ in range(3)]
    assert seeds(jobs) == [0, 1, None]
    assert jobs[1] is not None
    queue.ended(jobs[1], DONE)
    assert seeds([queue.take(), queue.take()]) == [2, None]
    assert not queue.finished


def test_room_is_asked_for_each_time_so_that_a_growing_cluster_fills() -> None:
    room = 0
    queue = Queue(Grid([planned(seed) for seed in range(4)]), lambda need: room)
    assert seeds([queue.take(), queue.take()]) == [0, None]  # one at least: it makes the cluster grow
    room = 3
    assert seeds([queue.take() for _ in range(3)]) == [1, 2, None]


def test_the_end_is_when_nothing_runs_and_nothing_is_left() -> None:
    queue = queue_of(planned(0))
    assert not queue.finished
    job = take(queue)
    assert queue.take() is None
    assert not queue.finished
    queue.ended(job, DONE)
    assert queue.finished


def test_trials_with_several_workers_run_beside_their_like_alone() -> None:
    small, pair, trio = {"cpus": 1}, {"workers": 2}, {"workers": 3}
    needs = [trio, small, pair, pair, {"cpus": 2}]
    queue = queue_of(*(planned(seed, **need) for seed, need in enumerate(needs)))
    # Cells of one need stand together: one worker first, then two, then three.
    first, second = take(queue), take(queue)
    assert seeds([first, second, queue.take()]) == [1, 4, None]
    queue.ended(first, DONE)
    assert queue.take() is None
    queue.ended(second, DONE)
    third, fourth = take(queue), take(queue)
    assert seeds([third, fourth, queue.take()]) == [2, 3, None]
    queue.ended(third, DONE)
    queue.ended(fourth, DONE)
    assert seeds([queue.take()]) == [0]


def test_a_lost_job_is_the_next_to_start_and_is_given_up_after_so_many_losses_in_a_row() -> None:
    queue = queue_of(planned(0), planned(1), room=1)
    for time in range(1, RETRIES + 1):
        job = take(queue)
        assert job.cell.config.seed == 0
        assert queue.lost(job) == time
    job = take(queue)
    assert queue.lost(job) is None
    queue.ended(job, End("failed"))
    assert seeds([queue.take()]) == [1]


def test_progress_begins_a_new_count() -> None:
    queue = queue_of(planned(0))
    for _ in range(RETRIES):
        queue.lost(take(queue))
    job = take(queue)
    queue.came_to(job, 30)
    assert queue.lost(job) == 1
    job = take(queue)
    queue.came_to(job, 30)  # no further than the time before
    assert queue.lost(job) == 2


def test_needs_of_the_jobs_are_those_of_their_runs() -> None:
    assert Job(planned(0, workers=2, cpus_per_worker=0.5)).need == Need(2, 0.5, 0.0)


def test_a_closed_queue_hands_out_nothing_and_ends_with_what_runs() -> None:
    queue = queue_of(*(planned(seed) for seed in range(4)))
    stops, dies, last = (take(queue) for _ in range(3))
    queue.close()
    assert queue.take() is None
    queue.stopped(stops)
    assert queue.lost(dies) == 1
    assert queue.take() is None, "nor again"
    assert not queue.finished
    queue.ended(last, DONE)
    assert queue.finished
