"""Which optimiser steps a round is made of, and which worker makes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from aang_ray.errors import UserError


@dataclass(frozen=True)
class Slot:
    """One optimiser step of one task."""

    task: int
    number: int
    """Which of the task's steps in this round."""
    owner: int
    """Rank of the worker that makes it."""
    group: int
    leads: bool
    """Whether it comes first among the steps that the workers of its group make at the same time."""
    ends: bool
    """Whether all tasks of its group are trained after it."""


class TaskPlan:
    """The steps of all tasks of a round, each of which is trained alone.

    Task i is worker i mod W's; W tasks at a time form a group. What the workers of a group do at the same time stands
    in consecutive slots and is done at the leading one: so a round has as many slots for any W.
    """

    def __init__(self, steps_N: Sequence[int], workers: int) -> None:
        self.slots: list[Slot] = []
        for group, start in enumerate(range(0, len(steps_N), workers)):
            members = range(start, min(start + workers, len(steps_N)))
            steps = max(steps_N[task] for task in members)
            for number in range(steps):
                tasks = [task for task in members if steps_N[task] > number]
                self.slots += [
                    Slot(task, number, task - start, group, task == tasks[0], number == steps - 1 and task == tasks[-1])
                    for task in tasks
                ]
        self._places = {(slot.group, slot.number, slot.owner): slot for slot in self.slots}

    def own(self, slot: Slot, rank: int) -> Slot | None:
        """What a worker does while this step is made; None where it has nothing to do."""
        return self._places.get((slot.group, slot.number, rank))

    def members(self, group: int) -> list[tuple[int, int]]:
        """(task, owner) of a group."""
        return [(slot.task, slot.owner) for slot in self.slots if slot.group == group and slot.number == 0]

    def first(self, task: int) -> int:
        """Place of the first slot of the group that trains a task."""
        group = next(slot.group for slot in self.slots if slot.task == task)
        return next(place for place, slot in enumerate(self.slots) if slot.group == group)


def fitted(lengths: Sequence[int], total: int) -> tuple[int, ...]:
    """The lengths of a round's parts, shortened where the run has fewer steps than one round.

    Every part keeps one step; what is left is shared out in proportion to what each wanted beyond it.

    Raises:
        UserError: where there is no step for every part.
    """
    if sum(lengths) <= total:
        return tuple(lengths)
    if len(lengths) > total:
        raise UserError(
            f"schedule.steps: {total} is less than one step for each of the {len(lengths)} parts of a round; "
            "raise it or lower n"
        )
    spare, wanted = total - len(lengths), sum(lengths) - len(lengths)
    return tuple(1 + (length - 1) * spare // wanted for length in lengths)
