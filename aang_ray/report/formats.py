"""A table as Markdown, LaTeX, CSV or JSON, from the frame that `build_table` returns."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, Literal

import pandas as pd

from aang_ray.errors import UserError
from aang_ray.report.table import CUT_MARK, ENTRY, MAJORITY_MARK

Format = Literal["json", "csv", "markdown", "latex"]

ABSENT = "–"
LEGEND = (
    "Test: mean ± sample standard deviation over the seeds of the configuration with the best mean dev score. "
    "p: paired t-test over matching seeds against the best row without auxiliary objectives. "
    "Steps, end-task examples, tokens and seconds: mean of a run."
)
SMALLEST_P = 0.0005
"""P-values below this would be rounded to 0.000."""
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


def render(table: pd.DataFrame, form: Format = "markdown") -> str:
    """Return a table as text that ends in a newline.

    Scores are percentages in Markdown and LaTeX (for the package booktabs), and fractions in JSON and CSV.

    Args:
        table: What `build_table` returns.
        form: `markdown`, `latex`, `json` or `csv`.

    Raises:
        UserError: for an unknown format.
    """
    renderers: dict[str, Callable[[pd.DataFrame], str]] = {
        "json": _json,
        "csv": _csv,
        "markdown": _markdown,
        "latex": _latex,
    }
    if form not in renderers:
        raise UserError(f"format {form!r} is unknown; choose one of {', '.join(renderers)}")
    return renderers[form](table)


def grids(table: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """Return titles and frames of text: the scores of all tasks where there are several, then each task in detail."""
    details = [_detail(part) for _, part in table.groupby("column")]
    return details if len(details) == 1 else [_overview(table), *details]


def _overview(table: pd.DataFrame) -> tuple[str, pd.DataFrame]:
    chosen = table[table["chosen_by"] == "dev"].copy()
    chosen["heading"] = chosen["column"] + ", " + chosen["metric"]
    chosen["text"] = [f"{_test(line)} ({len(line['seeds'])})" for line in chosen.to_dict("records")]
    rows = table["row"].cat.categories
    text = chosen.pivot(index="row", columns="heading", values="text").reindex(rows)
    average = chosen.pivot(index="row", columns="heading", values="test_mean").reindex(rows).mean(axis=1, skipna=False)
    text["average"] = [f"{100 * mean:.2f}" for mean in average]
    text["average"] = text["average"].where(average.notna())
    title = "Test scores in %, mean ± standard deviation (seeds), chosen by dev"
    return title, text.fillna(ABSENT).rename_axis(index="method").reset_index()


def _detail(part: pd.DataFrame) -> tuple[str, pd.DataFrame]:
    """Scores and compute of every row in one column of the table."""
    by = {choice: lines.to_dict("records") for choice, lines in part.groupby("chosen_by")}
    first, chosen = by["dev"][0], by["dev"]
    sizes, has_clean = f"{first['test_examples']:,} test examples", 0 < first["clean_examples"] < first["test_examples"]
    columns: dict[str, list[str]] = {"method": [line["label"] for line in chosen], "test": [*map(_test, chosen)]}
    if has_clean:
        sizes += f", {first['clean_examples']:,} of them neither in train nor in dev (clean)"
        columns["test clean"] = [_percent(line, "test_clean") for line in chosen]
    if "oracle" in by:
        columns["oracle"] = [_percent(line, "test") for line in by["oracle"]]
    columns["dev"] = [_percent(line, "dev") for line in chosen]
    columns["seeds"] = [str(len(line["seeds"])) for line in chosen]
    columns["p"] = [*map(_p_value, chosen)]
    for name, digits in {"steps": 0, "examples": 0, "tokens": 0, "seconds": 1}.items():
        columns[name] = [f"{line[name]:,.{digits}f}" for line in chosen]
    rows = part["row"].cat.categories
    text = pd.DataFrame(columns, index=[line["row"] for line in chosen]).reindex(rows)
    text["method"] = text["method"].fillna(pd.Series(rows, index=rows, dtype=object))
    return f"{first['column']}: {first['metric']} in %, {sizes}", text.fillna(ABSENT).reset_index(drop=True)


def _test(line: Mapping[Any, Any]) -> str:
    marks = (MAJORITY_MARK if line["majority_runs"] else "") + (CUT_MARK if line["cut"] else "")
    return _percent(line, "test") + marks


def _p_value(line: Mapping[Any, Any]) -> str:
    """Return `0.121`, or `< 0.001`; with the number of pairs in brackets where it is not the row's number of seeds."""
    p_value, pairs = line["p_value"], line["pairs"]
    if pd.isna(p_value):
        return ABSENT
    text = "< 0.001" if p_value < SMALLEST_P else f"{p_value:.3f}"
    return text if pairs == len(line["seeds"]) else f"{text} ({pairs} pairs)"


def _percent(line: Mapping[Any, Any], view: str) -> str:
    """Return `76.10 ± 0.90`, as in the papers; without a deviation for one seed."""
    mean, deviation = line[f"{view}_mean"], line[f"{view}_sd"]
    if pd.isna(mean):
        return ABSENT
    return f"{100 * mean:.2f}" if pd.isna(deviation) else f"{100 * mean:.2f} ± {100 * deviation:.2f}"


def _all_notes(table: pd.DataFrame) -> list[str]:
    return [LEGEND, *([ORACLE] if (table["chosen_by"] == "oracle").any() else []), *table.attrs["notes"]]


def _markdown(table: pd.DataFrame) -> str:
    parts = [f"{title}\n\n{markdown_grid(grid)}" for title, grid in grids(table)]
    notes = "\n".join(f"- {_markdown_text(note)}" for note in _all_notes(table))
    return "\n\n".join([*parts, notes]) + "\n"


def markdown_grid(grid: pd.DataFrame) -> str:
    """Return a frame of text as a Markdown table, padded so that it reads as a table in a terminal, too."""
    lines = [[_markdown_text(str(text)) for text in line] for line in (grid.columns, *grid.to_numpy())]
    widths = [max(3, *map(len, column)) for column in zip(*lines, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    texts = [
        [line[0].ljust(widths[0]), *(text.rjust(width) for text, width in zip(line[1:], widths[1:], strict=True))]
        for line in lines
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in (texts[0], rule, *texts[1:]))


def _markdown_text(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _latex(table: pd.DataFrame) -> str:
    """One `table` environment for each grid, then the notes."""
    parts = [
        grid.style.hide(axis="index")
        .format(_latex_text)
        .format_index(_latex_text, axis="columns")
        .to_latex(
            column_format="l" + "r" * (grid.shape[1] - 1),
            caption=_latex_text(title),
            position_float="centering",
            hrules=True,
        )
        for title, grid in grids(table)
    ]
    items = "\n".join(rf"\item {_latex_text(note)}" for note in _all_notes(table))
    return "\n".join([*parts, f"\\begin{{itemize}}\n{items}\n\\end{{itemize}}\n"])


def _latex_text(text: object) -> str:
    """Escape text. Styler's own escape knows none of the signs that are not ASCII."""
    return str(text).translate(_LATEX)


def _json(table: pd.DataFrame) -> str:
    columns = table.drop_duplicates("column")
    facts = columns[["column", "task", "metric", "test_examples", "clean_examples"]].rename(columns={"column": "label"})
    value = {
        "columns": facts.to_dict("records"),
        "rows": list(table["row"].cat.categories),
        "entries": _entries(table).to_dict("records"),
        "notes": _all_notes(table),
    }
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _csv(table: pd.DataFrame) -> str:
    """One line for each entry; lists and settings are JSON."""
    entries = _entries(table).map(lambda value: json.dumps(value) if isinstance(value, dict | list) else value)
    return entries.to_csv(index=False, lineterminator="\n")


def _entries(table: pd.DataFrame) -> pd.DataFrame:
    """The columns of `ENTRY` as Python values; what is missing is None."""
    entries = table[list(ENTRY)].astype(object)
    return entries.where(entries.notna(), None)
