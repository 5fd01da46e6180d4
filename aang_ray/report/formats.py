"""A table as terminal text, Markdown, LaTeX, HTML, CSV or JSON, from the frame that `build_table` returns."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from html import escape
from typing import Any, Literal

import pandas as pd

from aang_ray.errors import UserError
from aang_ray.report.published import published
from aang_ray.report.significance import p_text
from aang_ray.report.table import CUT_MARK, ENTRY, MAJORITY_MARK

Format = Literal["json", "csv", "markdown", "latex", "html", "terminal"]
Mark = Literal["", "best", "second"]

ABSENT = "–"
ORACLE = "oracle: the configuration with the best mean test score, as the papers chose; not a fair estimate."
_MARKDOWN_MARKS = {"best": "**{}**", "second": "<u>{}</u>", "": "{}"}
_TERMINAL_MARKS = {"best": "bold", "second": "underline", "": ""}
_LATEX_MARKS = {"best": "textbf:--rwrap", "second": "underline:--rwrap", "": ""}
_HTML_MARKS = {"best": "font-weight: bold", "second": "text-decoration: underline", "": ""}

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


@dataclass(frozen=True)
class Grid:
    """One table of text under a title."""

    title: str
    text: pd.DataFrame
    marks: pd.DataFrame | None = None
    """For each place `best`, `second` or nothing."""


def render(table: pd.DataFrame, form: Format = "markdown") -> str:
    """Return a table as text that ends in a newline.

    Scores are fractions in JSON and CSV and percentages elsewhere. LaTeX needs the package booktabs.

    Args:
        table: What `build_table` returns.
        form: `terminal`, `markdown`, `latex`, `html`, `json` or `csv`.

    Raises:
        UserError: for an unknown format.
    """
    renderers: dict[str, Callable[[pd.DataFrame], str]] = {
        "json": _json,
        "csv": _csv,
        "markdown": _markdown,
        "latex": _latex,
        "html": _html,
        "terminal": _terminal,
    }
    if form not in renderers:
        raise UserError(f"format {form!r} is unknown; choose one of {', '.join(renderers)}")
    return renderers[form](table)


def grids(table: pd.DataFrame) -> list[Grid]:
    """Return what the formats for readers show.

    By default: the scores of all tasks where there are several, then each task in detail. With `paper`: the paper's
    Table 2, and its published scores of the same tasks. With rows or columns of one's own: one grid for each block.
    With `tests`, then the comparisons of each column.
    """
    chosen = table[table["chosen_by"] == "dev"]
    if table.attrs["paper"]:
        found = [_paper(chosen)]
    elif table.attrs["pivot"]:
        found = [_matrix(part) for _, part in chosen.groupby("block")]
    else:
        details = [_detail(part) for _, part in table.groupby("column", observed=True)]
        found = details if len(details) == 1 else [_matrix(chosen), *details]
    if table.attrs["paper"] or table.attrs["splits_n"]:
        number = 2 if table.attrs["paper"] else 3
        theirs = published(set(chosen["task"]), number)
        if theirs is not None:
            title = f"Published (Dery et al. 2023, Table {number}; RoBERTa-base, 3 seeds, chosen on test), in %"
            found.append(Grid(title, theirs))
    if table.attrs["tests"]:
        compared = chosen[chosen["pairs"].notna()]
        found += [_tests(part) for _, part in compared.groupby(["block", "column"], observed=True)]
    return found


def _matrix(chosen: pd.DataFrame) -> Grid:
    """Mean scores of all rows and columns of one block."""
    view, pivot = chosen.attrs["view"], chosen.attrs["pivot"]
    metrics, block = chosen["metric"].unique(), chosen["block"].iloc[0]
    single = pivot and len(metrics) == 1 and not chosen.attrs["task_columns"]
    texts = [
        ABSENT if pd.isna(line[f"{view}_mean"]) else f"{_test(line, view)} ({len(line['seeds'])})"
        for line in chosen.to_dict("records")
    ]
    heading = chosen["column"].astype(str) + ("" if single else ", " + chosen["metric"])
    lines = chosen.assign(heading=pd.Categorical(heading, list(dict.fromkeys(heading))), text=texts)
    rows = chosen["row"].cat.categories
    means = lines.pivot(index="row", columns="heading", values=f"{view}_mean").reindex(rows)
    text = lines.pivot(index="row", columns="heading", values="text").reindex(rows).astype(object)
    text.columns, means.columns = (pd.Index([str(name) for name in frame.columns]) for frame in (text, means))
    if pivot:
        rows = rows[means.notna().any(axis=1)]
        text, means = text.loc[rows], means.loc[rows]
    if chosen.attrs["task_columns"] and (means.shape[1] > 1 or not pivot):
        means["average"] = means.mean(axis=1, skipna=False)
        text["average"] = [None if pd.isna(mean) else f"{100 * mean:.2f}" for mean in means["average"]]
    where = f"{block}: " if block else ""
    of = f" ({metrics[0]})" if single else ""
    what = "Test scores" if view == "test" else "Scores on test texts that are neither in train nor in dev"
    title = f"{where}{what}{of} in %, mean ± standard deviation (seeds), chosen by dev"
    text = text.fillna(ABSENT).rename_axis(index="method" if not pivot else "row").reset_index()
    return Grid(title, text, _marks(means, text) if pivot else None)


def _marks(means: pd.DataFrame, text: pd.DataFrame) -> pd.DataFrame:
    """Mark the best and the second place of each column of `means`, by their printed values, in the shape of `text`."""
    marks = pd.DataFrame("", text.index, text.columns)
    for name in means.columns:
        printed = (100 * means[name]).round(2).reset_index(drop=True)
        order = sorted(set(printed.dropna()), reverse=True)
        for value, mark in zip(order, ("best", "second"), strict=False):
            if len(order) > 1:
                marks.loc[printed.eq(value).to_numpy(), name] = mark
    return marks


def _paper(chosen: pd.DataFrame) -> Grid:
    """The shape of Table 2 of the AANG paper: p-values stand at the best row of several objectives (by dev)."""
    view, base = chosen.attrs["view"], _matrix(chosen)
    facts = chosen.drop_duplicates("row").set_index("row")[["adaptive", "objectives"]]
    text = base.text[base.text["method"].isin(facts.index)].copy()
    for column, part in chosen.groupby("column", observed=True):
        several = part[part["objectives"] > 1]
        if len(several):
            best = max(several.to_dict("records"), key=lambda line: float(line["dev_mean"]))
            at = text["method"] == best["row"]
            name = f"{column}, {best['metric']}"
            text.loc[at, name] = text.loc[at, name] + f" [p {_p(best)}]"
    text.insert(0, "task-adaptive", ["yes" if facts.loc[row, "adaptive"] else "no" for row in text["method"]])
    text.insert(2, "#", [str(facts.loc[row, "objectives"]) for row in text["method"]])
    text = text.sort_values("task-adaptive", kind="stable").reset_index(drop=True)
    lines = chosen.assign(heading=chosen["column"].astype(str) + ", " + chosen["metric"])
    means = lines.pivot(index="row", columns="heading", values=f"{view}_mean").reindex(text["method"])
    if "average" in text:
        means["average"] = means.mean(axis=1, skipna=False)
    return Grid(
        f"{base.title}; # objectives; [p: best row of several objectives against best of one (pairs)]",
        text,
        _marks(means, text),
    )


def _tests(part: pd.DataFrame) -> Grid:
    """Comparisons of the rows of one column with their baseline."""
    lines = part.to_dict("records")

    def points(value: float) -> str:
        return ABSENT if pd.isna(value) else f"{100 * value:+.2f}"

    def interval(line: Mapping[Any, Any]) -> str:
        low, high = points(line["difference_low"]), points(line["difference_high"])
        return ABSENT if low == ABSENT else f"{low} to {high}"

    columns = {
        "method": [line["label"] for line in lines],
        "pairs": [f"{line['pairs']:.0f}" for line in lines],
        "difference": [points(line["difference"]) for line in lines],
        "95 % interval": [interval(line) for line in lines],
        "p (t)": [p_text(line["p_value"]) for line in lines],
        "p (Holm)": [p_text(line["p_holm"]) for line in lines],
        "p (Wilcoxon)": [p_text(line["p_wilcoxon"]) for line in lines],
        "seeds for 80 % power": [_seeds(line) for line in lines],
    }
    block = part["block"].iloc[0]
    return Grid(
        f"{block + ': ' if block else ''}{part['column'].iloc[0]}: differences in points", pd.DataFrame(columns)
    )


def _seeds(line: Mapping[Any, Any]) -> str:
    if pd.isna(line["p_value"]):
        return ABSENT
    return "> 10,000" if pd.isna(line["seeds_needed"]) else f"{line['seeds_needed']:,.0f}"


def _detail(part: pd.DataFrame) -> Grid:
    """Scores and compute of every row in one column of the table."""
    by = {choice: lines.to_dict("records") for choice, lines in part.groupby("chosen_by")}
    first, chosen = by["dev"][0], by["dev"]
    sizes, has_clean = f"{first['test_examples']:,} test examples", 0 < first["clean_examples"] < first["test_examples"]
    columns: dict[str, list[str]] = {
        "method": [line["label"] for line in chosen],
        "test": [_test(line, "test") for line in chosen],
    }
    if has_clean:
        sizes += f", {first['clean_examples']:,} of them neither in train nor in dev (clean)"
        columns["test clean"] = [_percent(line, "test_clean") for line in chosen]
    elif not first["clean_examples"]:
        sizes += ", all of them also in train or in dev"
    if "oracle" in by:
        columns["oracle"] = [_percent(line, "test") for line in by["oracle"]]
    columns["dev"] = [_percent(line, "dev") for line in chosen]
    columns["seeds"] = [str(len(line["seeds"])) for line in chosen]
    columns["p (pairs)"] = [_p(line) for line in chosen]
    for name, digits in {"steps": 0, "examples": 0, "tokens": 0, "seconds": 1}.items():
        columns[name] = [f"{line[name]:,.{digits}f}" for line in chosen]
    rows = part["row"].cat.categories
    text = pd.DataFrame(columns, index=[line["row"] for line in chosen]).reindex(rows)
    text["method"] = text["method"].fillna(pd.Series(rows, index=rows, dtype=object))
    title = f"{first['column']}: {first['metric']} in %, {sizes}"
    return Grid(title, text.fillna(ABSENT).reset_index(drop=True))


def _p(line: Any) -> str:
    return ABSENT if pd.isna(line["pairs"]) else f"{p_text(line['p_value'])} ({line['pairs']:.0f})"


def _test(line: Mapping[Any, Any], view: str) -> str:
    marks = (MAJORITY_MARK if line["majority_runs"] else "") + (CUT_MARK if line["cut"] else "")
    return _percent(line, view) + marks


def _percent(line: Mapping[Any, Any], view: str) -> str:
    """Return `76.10 ± 0.90`, as in the papers; without a deviation for one seed."""
    mean, deviation = line[f"{view}_mean"], line[f"{view}_sd"]
    if pd.isna(mean):
        return ABSENT
    return f"{100 * mean:.2f}" if pd.isna(deviation) else f"{100 * mean:.2f} ± {100 * deviation:.2f}"


def _all_notes(table: pd.DataFrame) -> list[str]:
    """What the numbers are, then what a reader must know about single ones."""
    against = "the best row without auxiliary objectives"
    if table.attrs["paper"]:
        against = "the best row of one objective, for the best row of several (best: by dev)"
    if table.attrs["against"] is not None:
        against = f"the row {table.attrs['against']}"
    of = " on the texts that are neither in train nor in dev" if table.attrs["view"] == "test_clean" else ""
    legend = (
        "Test: mean ± sample standard deviation over the seeds of the configuration with the best mean dev score. "
        f"p: paired t-test{of} over matching seeds (in brackets: how many pairs) against {against}. "
        "Steps, end-task examples, tokens and seconds: mean of a run."
    )
    tests = (
        "Differences: mean over the pairs; interval: 95 % bootstrap percentiles over the pairs; Holm: corrected for "
        "all rows of the column; seeds: pairs that a t-test at 0.05 needs for 80 % power to find this difference."
    )
    oracle = [ORACLE] if (table["chosen_by"] == "oracle").any() else []
    return [legend, *([tests] if table.attrs["tests"] else []), *oracle, *table.attrs["notes"]]


def _markdown(table: pd.DataFrame) -> str:
    parts = [f"{_markdown_text(grid.title)}\n\n{markdown_grid(grid.text, grid.marks)}" for grid in grids(table)]
    notes = "\n".join(f"- {_markdown_text(note)}" for note in _all_notes(table))
    return "\n\n".join([*parts, notes]) + "\n"


def markdown_grid(grid: pd.DataFrame, marks: pd.DataFrame | None = None, left: int | None = None) -> str:
    """Return a frame of text as a Markdown table, padded so that it reads as a table in a terminal, too.

    Args:
        grid: The texts.
        marks: What stands out, of the same shape.
        left: How many columns stand at the left; None: those that hold names.
    """
    lines = [[_markdown_text(str(text)) for text in line] for line in (grid.columns, *grid.to_numpy())]
    if marks is not None:
        for line, marked in zip(lines[1:], marks.to_numpy(), strict=True):
            line[:] = [_MARKDOWN_MARKS[mark].format(text) for text, mark in zip(line, marked, strict=True)]
    widths = [max(3, *map(len, column)) for column in zip(*lines, strict=True)]
    left = _left(grid) if left is None else left
    rule = ["-" * width if at < left else "-" * (width - 1) + ":" for at, width in enumerate(widths)]
    texts = [
        [
            text.ljust(width) if at < left else text.rjust(width)
            for at, (text, width) in enumerate(zip(line, widths, strict=True))
        ]
        for line in lines
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in (texts[0], rule, *texts[1:]))


def _left(grid: pd.DataFrame) -> int:
    """Return how many columns from the left hold names, and stand at the left."""
    return 2 if grid.columns[0] == "task-adaptive" else 1


def _markdown_text(text: str) -> str:
    """Escape what would end a cell or begin HTML."""
    return text.replace("|", "\\|").replace("<", "\\<").replace("\\< ", "< ").replace("\n", " ")


def _terminal(table: pd.DataFrame) -> str:
    """Tables for a terminal, as wide as it is."""
    from rich.cells import cell_len
    from rich.console import Console, JustifyMethod
    from rich.table import Table
    from rich.text import Text

    console = Console(file=io.StringIO(), force_terminal=True)
    for grid in grids(table):
        # Names of columns may be folded, numbers may not: a table that is too wide for the terminal stays whole.
        widths = [max((cell_len(str(text)) for text in grid.text[name]), default=1) for name in grid.text.columns]
        console.width = max(shutil.get_terminal_size((120, 24)).columns, sum(widths) + 3 * len(widths) + 1)
        shown = Table(title=Text(grid.title), title_justify="left", title_style="bold")
        for position, name in enumerate(grid.text.columns):
            justify: JustifyMethod = "right" if position >= _left(grid.text) else "left"
            shown.add_column(Text(str(name)), justify=justify, overflow="fold", min_width=widths[position])
        marks = pd.DataFrame("", grid.text.index, grid.text.columns) if grid.marks is None else grid.marks
        for texts, marked in zip(grid.text.to_numpy(), marks.to_numpy(), strict=True):
            cells = zip(texts, marked, strict=True)
            shown.add_row(*(Text(str(text), style=_TERMINAL_MARKS[mark]) for text, mark in cells))
        console.print(shown)
    for note in _all_notes(table):
        console.print(Text(f"- {note}"))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def _latex(table: pd.DataFrame) -> str:
    """One `table` environment for each grid, then the notes."""
    parts = []
    for grid in grids(table):
        style = grid.text.style.hide(axis="index").format(_latex_text).format_index(_latex_text, axis="columns")
        if grid.marks is not None:
            style = style.apply(lambda _, marks=grid.marks: marks.map(_LATEX_MARKS.__getitem__), axis=None)
        parts.append(
            style.to_latex(
                column_format="l" * _left(grid.text) + "r" * (grid.text.shape[1] - _left(grid.text)),
                caption=_latex_text(grid.title),
                position_float="centering",
                hrules=True,
            )
        )
    items = "\n".join(rf"\item {_latex_text(note)}" for note in _all_notes(table))
    return "\n".join([*parts, f"\\begin{{itemize}}\n{items}\n\\end{{itemize}}\n"])


def _latex_text(text: object) -> str:
    """Escape text. Styler's own escape knows none of the signs that are not ASCII."""
    return str(text).translate(_LATEX)


def _html(table: pd.DataFrame) -> str:
    """One `table` element for each grid, then the notes as a list."""
    parts = []
    for number, grid in enumerate(grids(table)):
        style = grid.text.style.hide(axis="index").format(escape="html").format_index(escape="html", axis="columns")
        if grid.marks is not None:
            style = style.apply(lambda _, marks=grid.marks: marks.map(_HTML_MARKS.__getitem__), axis=None)
        parts.append(style.set_uuid(f"aang{number}").set_caption(escape(grid.title)).to_html())
    notes = "".join(f"<li>{escape(note)}</li>\n" for note in _all_notes(table))
    return "\n".join([*parts, f"<ul>\n{notes}</ul>\n"])


def _json(table: pd.DataFrame) -> str:
    entries = _entries(table)
    columns = table.drop_duplicates("column")
    facts = columns[["column", "task", "metric", "test_examples", "clean_examples"]].rename(columns={"column": "label"})
    value = {
        "columns": facts.to_dict("records"),
        "rows": list(table["row"].cat.categories),
        "entries": entries.to_dict("records"),
        "notes": _all_notes(table),
    }
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _csv(table: pd.DataFrame) -> str:
    """One line for each entry; lists and settings are JSON."""
    entries = _entries(table).map(lambda value: json.dumps(value) if isinstance(value, dict | list) else value)
    return entries.to_csv(index=False, lineterminator="\n")


def _entries(table: pd.DataFrame) -> pd.DataFrame:
    """The columns of `ENTRY` as Python values; what is missing is None, and whole numbers stay whole."""
    names = [name for name in ENTRY if name in table and (name != "block" or table.attrs["pivot"])]
    entries = table[names].astype(object)
    for name in ("pairs", "seeds_needed"):
        if name in entries:
            whole = [None if pd.isna(value) else int(value) for value in entries[name]]
            entries[name] = pd.Series(whole, entries.index, dtype=object)
    return entries.where(entries.notna(), None)
