"""Foot notes: what a reader must know before comparing two numbers of a table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from aang_ray.report.select import Selection

MAJORITY_MARK = "†"

Place = tuple[str, str]
"""Row and column label."""


def notes_of(selections: Mapping[Place, Selection], failed: Mapping[Place, int]) -> tuple[str, ...]:
    """All notes, sorted by kind and place. `failed` counts the failed runs by row and task."""
    places = sorted(selections.items())
    return (
        *_majority(places),
        *_chosen(places),
        *_incomplete(places),
        *_budgets(places),
        *(f"{row} on {task}: {_runs(count)} failed." for (row, task), count in sorted(failed.items())),
    )


def _majority(places: list[tuple[Place, Selection]]) -> Iterator[str]:
    for (row, column), selection in places:
        chosen = selection.by_dev
        if chosen.majority:
            yield (
                f"{MAJORITY_MARK} {row} on {column}: {chosen.majority} of {_runs(len(chosen.seeds))} "
                f"never left the majority class on dev."
            )


def _chosen(places: list[tuple[Place, Selection]]) -> Iterator[str]:
    for (row, column), selection in places:
        if selection.candidates > 1:
            settings = ", ".join(f"{key}={value}" for key, value in sorted(selection.differing.items()))
            yield f"{row} on {column}: {settings}; best mean dev of {selection.candidates} configurations."


def _incomplete(places: list[tuple[Place, Selection]]) -> Iterator[str]:
    for (row, column), selection in places:
        if selection.incomplete:
            yield (
                f"{row} on {column}: {selection.incomplete} further "
                f"{'configuration has' if selection.incomplete == 1 else 'configurations have'} fewer than "
                f"{len(selection.by_dev.seeds)} seeds and did not compete."
            )


def _budgets(places: list[tuple[Place, Selection]]) -> Iterator[str]:
    """Comparisons are meant to be at equal budgets of end-task examples, steps times batch."""
    for column in sorted({column for (_, column), _ in places}):
        budgets = {row: _budget(selection) for (row, place), selection in places if place == column}
        if len(set(budgets.values())) > 1:
            each = ", ".join(f"{row} {'unknown' if size is None else f'{size:,}'}" for row, size in budgets.items())
            yield f"{column}: budgets of end-task examples differ: {each}."


def _budget(selection: Selection) -> int | None:
    choices = selection.by_dev.choices
    steps, batch = choices.get("schedule.steps", ""), choices.get("batch.end_task", "")
    return int(steps) * int(batch) if steps.isdecimal() and batch.isdecimal() else None


def _runs(count: int) -> str:
    return f"{count} run" if count == 1 else f"{count} runs"
