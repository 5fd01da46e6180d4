"""Every step of every task runs once, on the task's worker, for any number of workers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aang_ray.errors import UserError
from aang_ray.train.rounds import TaskPlan, fitted

LENGTHS = st.lists(st.integers(1, 6), min_size=1, max_size=7)


def test_alone_one_task_follows_the_other() -> None:
    plan = TaskPlan([2, 1], workers=1)
    assert [(s.task, s.number, s.leads, s.ends) for s in plan.slots] == [
        (0, 0, True, False),
        (0, 1, True, True),
        (1, 0, True, True),
    ]


def test_two_workers_train_two_tasks_at_a_time() -> None:
    """Tasks 0 and 1 run side by side, task 1 for one step longer; then task 2 runs alone."""
    plan = TaskPlan([1, 2, 1], workers=2)
    assert [(s.task, s.number, s.owner, s.leads, s.ends) for s in plan.slots] == [
        (0, 0, 0, True, False),
        (1, 0, 1, False, False),
        (1, 1, 1, True, True),
        (2, 0, 0, True, True),
    ]
    at_once = plan.slots[0]
    assert [own.task if (own := plan.own(at_once, rank)) else None for rank in (0, 1)] == [0, 1]
    assert plan.own(plan.slots[2], 0) is None
    assert plan.members(0) == [(0, 0), (1, 1)]
    assert [plan.first(task) for task in (0, 1, 2)] == [0, 0, 3]


@given(LENGTHS, st.integers(1, 5))
def test_all_steps_once_and_in_order(lengths: list[int], workers: int) -> None:
    plan = TaskPlan(lengths, workers)
    assert sorted((s.task, s.number) for s in plan.slots) == [(t, k) for t, n in enumerate(lengths) for k in range(n)]
    done: list[tuple[int, int]] = []
    for slot in plan.slots:
        if slot.leads:
            made = [plan.own(slot, rank) for rank in range(workers)]
            done += [(own.task, own.number) for own in made if own is not None]
        assert (slot.task, slot.number) in done, "what a slot stands for is done by then"
        if slot.ends:
            assert all((task, lengths[task] - 1) in done for task, _ in plan.members(slot.group))
    assert len(done) == sum(lengths)
    assert all(slot.owner == slot.task % workers for slot in plan.slots)


@given(LENGTHS, st.integers(0, 60))
def test_a_round_fits_the_run(lengths: list[int], spare: int) -> None:
    total = len(lengths) + spare
    found = fitted(lengths, total)
    assert sum(found) <= total
    assert all(1 <= short <= wanted for short, wanted in zip(found, lengths, strict=True))
    assert found == tuple(lengths) or sum(found) > total - len(lengths)


def test_fewer_steps_than_parts_is_one_line() -> None:
    with pytest.raises(UserError, match=r"schedule.steps: 2 is less than one step for each of the 3 parts of a round"):
        fitted([4, 4, 4], 2)
