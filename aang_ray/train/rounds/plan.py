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
    leads: bool
    """Whether it comes first among the steps that the workers of its group make at the same time."""
    ends: bool
    """Whether the tasks of its group are trained after it."""


def slots(steps_N: Sequence[int], workers: int) -> tuple[Slot, ...]:
    """The steps of all tasks, each of which is trained alone.

    Task i is worker i mod W's: W tasks at a time form a group. What the workers of a group do at the same time are
    consecutive slots, all of it done at the leading one: so the slots of a round are as many for any W.
    """
    result: list[Slot] = []
    for start in range(0, len(steps_N), workers):
        group = range(start, min(start + workers, len(steps_N)))
        numbers = range(max(steps_N[task] for task in group))
        order = [(number, [task for task in group if steps_N[task] > number]) for number in numbers]
        for number, tasks in order:
            for task in tasks:
                last = number == numbers[-1] and task == tasks[-1]
                result.append(Slot(task, number, task - start, leads=task == tasks[0], ends=last))
    return tuple(result)


def fitted(lengths: Sequence[int], total: int) -> tuple[int, ...]:
    """The lengths of a round's parts, shortened in proportion where the run has fewer steps than one round.

    Raises:
        UserError: where there is no step for every part.
    """
    if sum(lengths) <= total:
        return tuple(lengths)
    if len(lengths) > total:
        raise UserError(
            f"schedule.steps: {total} steps are less than one for each of the {len(lengths)} parts of a round; "
            "raise it or lower n"
        )
    # Every part keeps one step, the rest is shared out in proportion to what was wanted beyond it.
    spare, wanted = total - len(lengths), sum(lengths) - len(lengths)
    return tuple(1 + (length - 1) * spare // wanted for length in lengths)
