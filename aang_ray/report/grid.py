"""A table as grids of text, which Markdown and LaTeX both render."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean

from aang_ray.report.notes import CUT_MARK, MAJORITY_MARK
from aang_ray.report.select import Estimate
from aang_ray.report.table import Column, Entry, Table

ABSENT = "–"


@dataclass(frozen=True)
class Grid:
    """A title, a line of headings, and lines of as many texts."""

    title: str
    header: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]


def grids(table: Table) -> list[Grid]:
    """One grid a task, with compute beside the score; before them, for several tasks, all scores at a glance."""
    details = [_detail(table, column) for column in table.columns]
    return details if len(details) == 1 else [_overview(table), *details]


def percent(estimate: Estimate) -> str:
    """`76.10 ± 0.90`, as in the papers; without a deviation for one seed."""
    mean = f"{100 * estimate.mean:.2f}"
    return mean if estimate.sd is None else f"{mean} ± {100 * estimate.sd:.2f}"


def _score(entry: Entry) -> str:
    chosen = entry.selection.by_dev
    return percent(chosen.test) + (MAJORITY_MARK if chosen.majority else "") + (CUT_MARK if entry.cut else "")


def _overview(table: Table) -> Grid:
    lines = []
    for row in table.rows:
        entries = [table.entries.get((row, column.label)) for column in table.columns]
        means = [entry.selection.by_dev.test.mean for entry in entries if entry is not None]
        average = f"{100 * fmean(means):.2f}" if len(means) == len(entries) else ABSENT
        cells = (
            ABSENT if entry is None else f"{_score(entry)} ({len(entry.selection.by_dev.seeds)})" for entry in entries
        )
        lines.append((row, *cells, average))
    header = ("method", *(f"{column.label}, {column.metric}" for column in table.columns), "average")
    return Grid("Test scores in %, mean ± standard deviation (seeds), chosen by dev", header, tuple(lines))


def _detail(table: Table, column: Column) -> Grid:
    fields = _fields(column, table.oracle)
    lines = []
    for row in table.rows:
        entry = table.entries.get((row, column.label))
        if entry is None:
            lines.append((row, *(ABSENT for _ in fields)))
        else:
            lines.append((entry.selection.by_dev.label, *(text(entry) for text in fields.values())))
    sizes = f"{column.test_examples:,} test examples"
    if column.has_clean_view:
        sizes += f", {column.clean_examples:,} of them neither in train nor in dev (clean)"
    return Grid(f"{column.label}: {column.metric} in %, {sizes}", ("method", *fields), tuple(lines))


def _fields(column: Column, oracle: bool) -> dict[str, Callable[[Entry], str]]:
    """Headings of a detail grid and their texts."""
    fields: dict[str, Callable[[Entry], str]] = {"test": _score}
    if column.has_clean_view:
        fields["test clean"] = lambda entry: _optional(entry.selection.by_dev.test_clean)
    if oracle:
        fields["oracle"] = lambda entry: percent(entry.selection.by_test.test)
    return fields | {
        "dev": lambda entry: percent(entry.selection.by_dev.dev),
        "seeds": lambda entry: str(len(entry.selection.by_dev.seeds)),
        "p": lambda entry: ABSENT if entry.p_value is None else f"{entry.p_value:.3f}",
        "steps": lambda entry: f"{entry.selection.by_dev.steps:,.0f}",
        "examples": lambda entry: f"{entry.selection.by_dev.examples:,.0f}",
        "tokens": lambda entry: f"{entry.selection.by_dev.tokens:,.0f}",
        "seconds": lambda entry: f"{entry.selection.by_dev.seconds:,.1f}",
    }


def _optional(estimate: Estimate | None) -> str:
    return ABSENT if estimate is None else percent(estimate)
