"""A table as Markdown, LaTeX, CSV or JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any, Literal

from aang_ray.errors import UserError
from aang_ray.report.select import Configuration, Estimate
from aang_ray.report.table import CUT_MARK, MAJORITY_MARK, Column, Entry, Table

# --- report.grid: A table as grids of text, which Markdown and LaTeX both render.


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


Format = Literal["json", "csv", "markdown", "latex"]

LEGEND = (
    "Test: mean ± sample standard deviation over the seeds of the configuration with the best mean dev score. "
    "p: paired t-test over matching seeds against the best row without auxiliary objectives. "
    "Steps, end-task examples, tokens and seconds: mean of a run."
)
ORACLE = "oracle: the configuration with the best mean test score, as the papers chose; not a fair estimate."

_LATEX = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        "&": r"\&",
        "%": r"\%",
        "$": r"\$",
        "#": r"\#",
        "_": r"\_",
        "{": r"\{",
        "}": r"\}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "±": r"$\pm$",
        "†": r"$^\dagger$",
        "‡": r"$^\ddagger$",
        "–": "--",
        "·": r"$\cdot$",
        "<": r"$<$",
        ">": r"$>$",
    }
)


def render(table: Table, form: Format = "markdown") -> str:
    """The table as text, ending in a newline. Scores are percentages in Markdown and LaTeX, fractions elsewhere.

    Raises `UserError` for an unknown format.
    """
    renderers: dict[str, Callable[[Table], str]] = {
        "json": _json,
        "csv": _csv,
        "markdown": _markdown,
        "latex": _latex,
    }
    if form not in renderers:
        raise UserError(f"format {form!r} is unknown; choose one of {', '.join(renderers)}")
    return renderers[form](table)


def _markdown(table: Table) -> str:
    parts = [f"{grid.title}\n\n{_markdown_grid(grid)}" for grid in grids(table)]
    notes = "\n".join(f"- {_markdown_text(note)}" for note in _all_notes(table))
    return "\n\n".join([*parts, notes]) + "\n"


def _markdown_grid(grid: Grid) -> str:
    """Padded, so that it reads as a table in a terminal, too."""
    lines = [tuple(map(_markdown_text, line)) for line in (grid.header, *grid.lines)]
    widths = [max(3, *map(len, column)) for column in zip(*lines, strict=True)]
    rule = [f"{'-' * widths[0]}", *(f"{'-' * (width - 1)}:" for width in widths[1:])]
    texts = [
        [line[0].ljust(widths[0]), *(text.rjust(width) for text, width in zip(line[1:], widths[1:], strict=True))]
        for line in lines
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in (texts[0], rule, *texts[1:]))


def _markdown_text(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _latex(table: Table) -> str:
    """One `table` environment a grid, for the package booktabs."""
    notes = "\n".join(rf"\item {note.translate(_LATEX)}" for note in _all_notes(table))
    items = f"\\begin{{itemize}}\n{notes}\n\\end{{itemize}}"
    return "\n\n".join([*map(_latex_grid, grids(table)), items]) + "\n"


def _latex_grid(grid: Grid) -> str:
    header, *lines = (
        " & ".join(text.translate(_LATEX) for text in line) + r" \\" for line in (grid.header, *grid.lines)
    )
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{grid.title.translate(_LATEX)}}}",
            rf"\begin{{tabular}}{{l{'r' * (len(grid.header) - 1)}}}",
            r"\toprule",
            header,
            r"\midrule",
            *lines,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
        ]
    )


def _all_notes(table: Table) -> tuple[str, ...]:
    return (LEGEND, *((ORACLE,) if table.oracle else ()), *table.notes)


def _json(table: Table) -> str:
    value = {
        "columns": [asdict(column) for column in table.columns],
        "rows": list(table.rows),
        "entries": list(_entries(table)),
        "notes": list(_all_notes(table)),
    }
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _csv(table: Table) -> str:
    """One line an entry; per-seed values and settings are JSON."""
    stream = io.StringIO()
    lines = [
        {key: json.dumps(value) if isinstance(value, dict | list) else value for key, value in entry.items()}
        for entry in _entries(table)
    ]
    writer = csv.DictWriter(stream, fieldnames=list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return stream.getvalue()


def _entries(table: Table) -> Iterator[dict[str, Any]]:
    for column in table.columns:
        for row in table.rows:
            entry = table.entries.get((row, column.label))
            if entry is not None:
                yield _entry(row, column, entry, "dev", entry.selection.by_dev)
                if table.oracle:
                    yield _entry(row, column, entry, "oracle", entry.selection.by_test)


def _entry(row: str, column: Column, entry: Entry, chosen_by: str, configuration: Configuration) -> dict[str, Any]:
    scores = {"test": configuration.test, "test_clean": configuration.test_clean, "dev": configuration.dev}
    return {
        "column": column.label,
        "task": column.task,
        "metric": column.metric,
        "row": row,
        "label": configuration.label,
        "chosen_by": chosen_by,
        **{f"{view}_mean": estimate and estimate.mean for view, estimate in scores.items()},
        **{f"{view}_sd": estimate and estimate.sd for view, estimate in scores.items()},
        **{f"{view}_values": estimate and list(estimate.values) for view, estimate in scores.items()},
        "seeds": list(configuration.seeds),
        "p_value": entry.p_value if chosen_by == "dev" else None,
        "majority_runs": configuration.majority,
        "steps": configuration.steps,
        "examples": configuration.examples,
        "tokens": configuration.tokens,
        "seconds": configuration.seconds,
        "candidates": entry.selection.candidates,
        "incomplete": entry.selection.incomplete,
        "cut": entry.cut,
        "group": configuration.group,
        "settings": dict(configuration.choices),
    }
