"""The table: rows are methods, columns are tasks, a cell is the chosen configuration's test score over its seeds."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from aang_ray.report.labels import column_labels
from aang_ray.report.notes import notes_of
from aang_ray.report.runs import Run, Unfinished, load_runs
from aang_ray.report.select import Selection, select
from aang_ray.report.significance import paired_p_value
from aang_ray.store import Store


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
