"""The table: rows are methods, columns are tasks, a cell is the chosen configuration's test score over its seeds."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from aang_ray.config.methods import AlphavilConfig, DiwConfig
from aang_ray.report.select import NAMES, Run, Selection, Unfinished, load_runs, paired_p_value, select
from aang_ray.store import Store

# --- report.labels: Names of a table's columns.


_SHORT = 12  # characters of a fingerprint that tell it from others


def column_labels(runs: Sequence[Run]) -> dict[str, str]:
    """The label of each run's column, by cell.

    Runs on the same task stand in one column if they solve the same problem: same data, encoder and metric. Where
    they do not, the label adds the settings that differ, for example `movie (train_size=100)`.
    """
    by_task: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        by_task[run.task].append(run)
    labels = {}
    for task, members in by_task.items():
        keys = sorted({key for run in members for key in run.problem})
        differing = [key for key in keys if len({run.problem.get(key) for run in members}) > 1]
        for run in members:
            parts = [part for key in differing for part in _parts(key, run, members)]
            labels[run.cell] = f"{task} ({', '.join(parts)})" if parts else task
    return labels


def _parts(key: str, run: Run, members: Sequence[Run]) -> list[str]:
    """`name=value`; for a fingerprint the names behind it, if they differ, tell more than its digits."""
    names = [name for name in NAMES.get(key, ()) if len({other.settings.get(name) for other in members}) > 1]
    # Different content may stand behind the same names: then only the digits tell the columns apart.
    by_names = {tuple(other.settings.get(name) for name in names) for other in members}
    if names and len(by_names) == len({other.problem.get(key) for other in members}):
        return [f"{_last(name)}={run.settings.get(name, '')}" for name in names]
    return [f"{_last(key)}={run.problem.get(key, '')[:_SHORT]}"]


def _last(key: str) -> str:
    return key.rpartition(".")[2]


# --- report.notes: Foot notes: what a reader must know before comparing two numbers of a table.


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


@dataclass(frozen=True)
class Column:
    """A problem: an end task with its data, encoder and metric."""

    label: str
    """The task's name, with the settings that tell it from other columns of the same task."""
    task: str
    metric: str
    test_examples: int
    clean_examples: int
    """Test texts that occur neither in train nor in dev."""

    @property
    def has_clean_view(self) -> bool:
        """Whether the clean view is another than the whole test split."""
        return 0 < self.clean_examples < self.test_examples


@dataclass(frozen=True)
class Entry:
    """One row on one task."""

    selection: Selection
    p_value: float | None
    """Of the test score against the best row without auxiliary objectives (by dev); None where there is no test."""
    cut: int
    """Further runs of the row on the task that a scheduler cut short."""


@dataclass(frozen=True)
class Table:
    """A finished table; rendering it is `render`."""

    columns: tuple[Column, ...]
    rows: tuple[str, ...]
    entries: Mapping[tuple[str, str], Entry]
    """By row and column label; a row without a finished run on a task has none."""
    notes: tuple[str, ...]
    oracle: bool = field(default=False)
    """Whether the choice on test is shown beside the choice on dev."""


def table_from(store: Store, *, metric: str | None = None, oracle: bool = False) -> Table:
    """The table of a store.

    Reported is the mean and sample standard deviation of the TEST score over the seeds of the configuration with the
    best mean DEV score, as fractions; both by `metric`, or by each task's own. `oracle` adds the configuration with
    the best test score, which is how the papers chose. Raises `UserError` where there is nothing to report.
    """
    runs, unfinished = load_runs(store, metric)
    labels = column_labels(runs)
    by_place: dict[tuple[str, str], list[Run]] = defaultdict(list)
    for run in runs:
        by_place[run.row, labels[run.cell]].append(run)
    selections = {place: select(members) for place, members in by_place.items()}
    auxiliary = {run.row for run in runs if run.auxiliary}
    cut = Counter((run.row, run.task) for run in unfinished if run.status == "cut")
    entries = {
        (row, column): Entry(
            selection, _against_single(row, column, selections, auxiliary), cut[row, by_place[row, column][0].task]
        )
        for (row, column), selection in selections.items()
    }
    return Table(
        columns=_columns(runs, labels),
        rows=_row_order([*runs, *unfinished]),
        entries=entries,
        notes=notes_of(selections, unfinished),
        oracle=oracle,
    )


def _against_single(
    row: str, column: str, selections: Mapping[tuple[str, str], Selection], auxiliary: set[str]
) -> float | None:
    """A multitask row is compared with the best single-task row of its column."""
    singles = [
        selection.by_dev
        for (other, place), selection in selections.items()
        if place == column and other not in auxiliary
    ]
    if row not in auxiliary or not singles:
        return None
    best = max(singles, key=lambda configuration: configuration.dev.mean)
    return paired_p_value(selections[row, column].by_dev, best)


def _columns(runs: Sequence[Run], labels: Mapping[str, str]) -> tuple[Column, ...]:
    members: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        members[labels[run.cell]].append(run)
    return tuple(
        Column(
            label=label,
            task=column[0].task,
            metric=column[0].metric,
            test_examples=max(run.test_examples for run in column),
            clean_examples=max(run.clean_examples for run in column),
        )
        for label, column in sorted(members.items())
    )


def _row_order(runs: Sequence[Run | Unfinished]) -> tuple[str, ...]:
    """Single-task rows, then multitask rows, AANG last, as in the AANG paper's Table 2."""
    keys = {(run.auxiliary, run.method == "aang", run.row) for run in runs}
    return tuple(row for _, _, row in sorted(keys))
