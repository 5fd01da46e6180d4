"""Foot notes: what a reader must know before comparing two numbers of a table."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

from aang_ray.config.methods import AlphavilConfig, DiwConfig
from aang_ray.report.runs import Unfinished
from aang_ray.report.select import Selection

MAJORITY_MARK = "†"
CUT_MARK = "‡"

ROUNDS = {str(section.model_fields["name"].default) for section in (AlphavilConfig, DiwConfig)}

Place = tuple[str, str]
"""Row and column label."""


def notes_of(selections: Mapping[Place, Selection], unfinished: Sequence[Unfinished]) -> tuple[str, ...]:
    """All notes, sorted by kind and place."""
    places = sorted(selections.items())
    return (
        *_majority(places),
        *_chosen(places),
        *_incomplete(places),
        *_budgets(places),
        *_cut(unfinished),
        *_failed(unfinished),
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
    """Comparisons are meant to be at equal budgets of end-task examples: steps times batch, of a final stage, too.

    In methods of rounds a step is not always one of the end task: there it is what the runs have seen.
    """
    for column in sorted({column for (_, column), _ in places}):
        budgets = {row: _budget(selection) for (row, place), selection in places if place == column}
        if len(set(budgets.values())) > 1:
            each = ", ".join(f"{row} {'unknown' if size is None else f'{size:,}'}" for row, size in budgets.items())
            yield f"{column}: budgets of end-task examples differ: {each}."


def _budget(selection: Selection) -> int | None:
    choices = selection.by_dev.choices
    if choices.get("method.name") in ROUNDS:
        return round(selection.by_dev.examples)
    steps, batch = choices.get("schedule.steps", ""), choices.get("batch.end_task", "")
    final = choices.get("final_finetune.steps", "0")
    return (int(steps) + int(final)) * int(batch) if steps.isdecimal() and batch.isdecimal() else None


def _cut(unfinished: Sequence[Unfinished]) -> Iterator[str]:
    """Whole runs that were chosen while others were cut short are not what a whole grid would have chosen."""
    for (row, task), runs in _by_place(unfinished, "cut"):
        first, last = min(run.steps for run in runs), max(run.steps for run in runs)
        steps = f"{first:,}" if first == last else f"{first:,} to {last:,}"
        verb = "was" if len(runs) == 1 else "were"
        yield (
            f"{CUT_MARK} {row} on {task}: {_runs(len(runs))} {verb} cut short by a scheduler after {steps} steps "
            f"and did not compete."
        )


def _failed(unfinished: Sequence[Unfinished]) -> Iterator[str]:
    for (row, task), runs in _by_place(unfinished, "failed"):
        yield f"{row} on {task}: {_runs(len(runs))} failed."


def _by_place(unfinished: Sequence[Unfinished], status: str) -> list[tuple[Place, list[Unfinished]]]:
    """Row and task, with their runs of a status."""
    places: dict[Place, list[Unfinished]] = defaultdict(list)
    for run in unfinished:
        if run.status == status:
            places[run.row, run.task].append(run)
    return sorted(places.items())


def _runs(count: int) -> str:
    return f"{count} run" if count == 1 else f"{count} runs"
