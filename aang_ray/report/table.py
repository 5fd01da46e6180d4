"""The table of a store as a pandas frame: methods by tasks, each with its chosen configuration's scores over seeds."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Literal

import pandas as pd

from aang_ray.config.methods import AlphavilConfig, DiwConfig
from aang_ray.errors import UserError
from aang_ray.report.select import read_runs, select, value_text
from aang_ray.report.significance import COMPARED, THOROUGH, compare, holm
from aang_ray.store import Store

MAJORITY_MARK = "†"
CUT_MARK = "‡"
ENTRY = (
    *("block", "column", "task", "metric", "row", "label", "chosen_by"),
    *("test_mean", "test_clean_mean", "dev_mean", "test_sd", "test_clean_sd", "dev_sd"),
    *("test_values", "test_clean_values", "dev_values", "seeds", *COMPARED, *THOROUGH, "majority_runs"),
    *("steps", "examples", "tokens", "seconds", "candidates", "incomplete", "cut", "group", "settings"),
    *("objectives", "adaptive"),
)
"""Columns of the table that JSON and CSV show for each entry, where the table has them."""
View = Literal["test", "test_clean"]
ADAPTIVE = frozenset({"aang", "attittud", "alphavil", "diw", "cosine_gating"})
"""Methods whose weights follow the end task."""
_ROUNDS = {str(section.model_fields["name"].default) for section in (AlphavilConfig, DiwConfig)}


def build_table(
    store: Store,
    *,
    metric: str | None = None,
    oracle: bool = False,
    view: View = "test",
    rows: Sequence[str] = ("method",),
    cols: Sequence[str] = ("task",),
    against: str | None = None,
    tests: bool = False,
    paper: bool = False,
    groups: Collection[str] | None = None,
) -> pd.DataFrame:
    """Build the table of a store.

    Reported are the test scores of the configuration with the best mean dev score.

    Args:
        store: The store.
        metric: `accuracy` or `macro_f1`, for every task; None: the metric of each task.
        oracle: Also report the configuration with the best mean test score, which is how the papers chose.
        view: The test scores that are compared: `test`, or `test_clean`, without the texts of train and dev.
        rows: What has a row of its own: `method`, `task`, and settings such as `n` or `data.train_size`.
        cols: The same for columns. Each `method` and each `task` that neither names is a block, a table of its own.
        against: Compare with this row; None: with the best row (by dev) without auxiliary objectives.
        tests: Also compute intervals, Wilcoxon's test, Holm's correction and the number of seeds needed.
        paper: Also tell the number of objectives, and compare rows of several objectives with the best row of one, as
            Table 2 of the AANG paper does.
        groups: Only the columns in which one of these configurations stands, with all their rows; None: all columns.

    Returns:
        A frame with one line for each place in the table and way to choose. Scores are fractions.

        - `block`, `row`, `column`: the place. By default there is one block, `row` is the method and its space, and
          `column` the problem: the task, with the settings that differ between columns of one task. `task`, `metric`,
          `test_examples` and `clean_examples` (test texts that occur neither in train nor in dev) belong to it. A row
          without a run that is done is a category of `row`.
        - `label`: the row with the chosen `n`; `settings`: all settings of the chosen configuration; `differing`:
          those in which it differs from another candidate; `group`: its name in the store.
        - `chosen_by`: `dev`, or `oracle`: the line was chosen on test, and is no fair estimate.
        - `test_mean`, `test_sd`, `test_values`, and the same of `test_clean` and `dev`: mean, sample standard
          deviation (missing for one seed) and the values in the order of `seeds`.
        - `pairs`, `difference`, `p_value`, `no_test` and, if asked for, `p_holm` and others: the comparison over the
          common seeds (see `significance.compare`). `p_holm` is corrected for the rows of a column.
        - `steps`, `examples` (of the end task), `tokens`, `seconds`: mean of a run.
        - `candidates`: configurations that competed; `incomplete`: those that did not, because others have more
          seeds; `cut`: runs that a scheduler cut short; `majority_runs`: runs that never left the majority class.
        - `objectives`, `adaptive`: with `paper`, how many there are, and whether their weights follow the end task.

        `attrs` holds what `render` needs to know, and in `notes` what a reader must know before comparing two numbers.

    Raises:
        UserError: for an unknown metric, row or setting, or where the store has nothing to report.
    """
    runs, entries = _places(store, metric, rows, cols, groups)
    auxiliary = set(runs["method_row"][runs["auxiliary"]])
    if against is not None and against not in set(runs["method_row"]):
        raise UserError(f"there is no row {against!r}; choose one of {', '.join(sorted(set(runs['method_row'])))}")
    if paper:
        _count_objectives(store, entries)
    unfinished = _without_mended(runs)
    cut = unfinished[unfinished["status"] == "cut"].groupby(["method_row", "task"]).size().to_dict()
    sizes = runs[runs["status"] == "done"].groupby("problem")[["test_examples", "clean_examples"]].max()
    lines: list[dict[str, Any]] = []
    for entry in entries:
        first = entry["runs"].iloc[0]
        shared: dict[str, Any] = {
            **{name: first[name] for name in ("block", "row", "column", "task", "metric")},
            **{name: int(sizes.loc[first["problem"], name]) for name in sizes.columns},
            "cut": cut.get((first["method_row"], first["task"]), 0),
            **{name: entry[name] for name in ("objectives", "adaptive") if name in entry},
        }
        baseline = _baseline(entry, entries, auxiliary, against, paper)
        test: dict[str, Any] = {} if baseline is None else compare(entry["dev"], baseline, view=view, thorough=tests)
        lines.append({**shared, "chosen_by": "dev", **test, **entry["dev"]})
        if oracle:
            lines.append({**shared, "chosen_by": "oracle", **entry["oracle"]})
    left_out = (() if paper else ("objectives", "adaptive")) + (() if tests else THOROUGH)
    names = [name for name in ENTRY if name not in left_out]
    frame = pd.DataFrame(lines, columns=[*names, "test_examples", "clean_examples", "differing"])
    if tests:
        for _, column in frame[frame["chosen_by"] == "dev"].groupby(["block", "column"]):
            p_values = [None if pd.isna(p) else float(p) for p in column["p_value"]]
            frame.loc[column.index, "p_holm"] = pd.Series(holm(p_values), column.index, dtype=float)
    for axis in ("row", "column"):
        order = runs if axis == "row" and "task" not in rows else runs[runs["status"] == "done"]
        ordered: list[tuple[Any, str]] = sorted(zip(order[f"{axis}_order"], order[axis], strict=True))
        frame[axis] = pd.Categorical(frame[axis], list(dict.fromkeys(label for _, label in ordered)))
    numbers = [
        name for name in names if name.endswith(("_mean", "_sd", "_low", "_high", "difference")) or name[:2] == "p_"
    ]
    frame[numbers] = frame[numbers].astype(float)
    frame = frame.sort_values(["block", "column", "row", "chosen_by"], ignore_index=True)
    frame.attrs |= {"view": view, "against": against, "tests": tests, "paper": paper}
    frame.attrs["pivot"] = (tuple(rows), tuple(cols)) != (("method",), ("task",))
    frame.attrs |= {"task_columns": tuple(cols) == ("task",), "splits_n": "n" in (*rows, *cols)}
    frame.attrs["notes"] = [*_notes(frame[frame["chosen_by"] == "dev"]), *_unfinished_notes(unfinished)]
    return frame


def _without_mended(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the runs that are not done, without those that failed and are done with the same settings.

    Such a run has another name where its data, its encoder or its space were mended: the fingerprints are no settings.
    """

    def what(line: Any) -> str:
        return json.dumps([line.task, line.label, line.seed, line.choices], sort_keys=True)

    unfinished = runs[runs["status"] != "done"]
    failed = set(unfinished["label"][unfinished["status"] == "failed"])
    # A large store has very many runs that are done, and few that failed.
    done = {what(line) for line in runs[(runs["status"] == "done") & runs["label"].isin(failed)].itertuples()}
    mended = [line.status == "failed" and what(line) in done for line in unfinished.itertuples()]
    return unfinished[~pd.Series(mended, unfinished.index, dtype=bool)]


def trace(store: Store, place: str, **options: Any) -> str:
    """Return which runs and configurations stand behind a number of the table.

    Args:
        store: The store.
        place: `ROW@COLUMN`, `ROW@TASK` for all columns of a task, or `ROW` for all columns.
        options: `metric`, `rows` and `cols` of `build_table`.

    Raises:
        UserError: for a place that the table does not have.
    """
    _, entries = _places(store, options.get("metric"), options.get("rows", ("method",)), options.get("cols", ("task",)))
    row, _, column = place.partition("@")
    found = [
        entry
        for entry in entries
        if row in (entry["row"], entry["dev"]["label"])
        and column in (entry["column"], entry["runs"]["task"].iloc[0], "")
    ]
    if not found:
        there = ", ".join(sorted(f"{entry['row']}@{entry['column']}" for entry in entries))
        raise UserError(f"the table has no place {place!r}; it has {there}")
    return "\n".join(_traced(entry) for entry in found)


def _traced(entry: Mapping[str, Any]) -> str:
    runs, chosen = entry["runs"], entry["dev"]
    lines = [
        f"{entry['row']} on {entry['column']}: {chosen['label']}, configuration {chosen['group']}, chosen among "
        f"{chosen['candidates']} by its mean dev {runs['metric'].iloc[0]} of {100 * chosen['dev_mean']:.2f}"
    ]
    lines += [f"  {key}: {value}" for key, value in sorted(chosen["differing"].items())]
    for run in runs[runs["group"] == chosen["group"]].to_dict("records"):
        clean = "" if pd.isna(run["test_clean"]) else f", clean test {100 * run['test_clean']:.2f}"
        scores = f"dev {100 * run['dev']:.2f}, test {100 * run['test']:.2f}{clean}"
        lines.append(f"  seed {run['seed']}: {scores}, cell {run['cell']}")
    for group, others in runs[runs["group"] != chosen["group"]].groupby("group"):
        settings = others["choices"].iloc[0]
        differing = sorted(
            f"{key}={settings.get(key)}" for key in settings if settings[key] != chosen["settings"].get(key)
        )
        lines.append(
            f"  not chosen: {group}, mean dev {100 * others['dev'].mean():.2f} over {len(others)} seeds; "
            f"{', '.join(differing)}"
        )
    return "\n".join(lines) + "\n"


def _places(
    store: Store,
    metric: str | None,
    rows: Sequence[str],
    cols: Sequence[str],
    groups: Collection[str] | None = None,
) -> tuple[pd.DataFrame, list[dict[str, Any]]]:
    """Return all runs with their place in the table, and the places, each with its runs and chosen configurations."""
    named = [*rows, *cols]
    if len(set(named)) < len(named):
        raise UserError(f"{', '.join(named)}: each may stand once in the rows or the columns of a table")
    runs = read_runs(store, metric, [key for key in named if key not in ("method", "task")])
    if groups is not None:
        chosen = runs["group"].isin(groups)
        runs = runs[chosen | runs["problem"].isin(runs["problem"][chosen].dropna())]
    runs = runs.rename(columns={"row": "method_row", "column": "task_label"})
    axes = {"row": rows, "column": cols, "block": [key for key in ("method", "task") if key not in named]}
    configurations = runs.drop_duplicates("group").to_dict("records")
    for axis, keys in axes.items():
        labels = {line["group"]: _axis(line, keys) for line in configurations}
        runs[axis] = runs["group"].map({group: label for group, (label, _) in labels.items()}).astype(object)
        runs[f"{axis}_order"] = runs["group"].map({group: order for group, (_, order) in labels.items()}).astype(object)
    done = runs[runs["status"] == "done"]
    return runs, [
        {"row": row, "column": column, "problem": members["problem"].iloc[0], "runs": members, **select(members)}
        for (_, row, column), members in done.groupby(["block", "row", "column"], sort=False)
    ]


def _axis(run: Mapping[Any, Any], keys: Sequence[str]) -> tuple[str, tuple[Any, ...]]:
    """Return the label of a run on one axis of the table, and what sorts the labels."""
    texts, order = [], []
    for key in keys:
        value = run["task_label"] if key == "task" else run["method_row"] if key == "method" else run["split"][key]
        if value is None:
            order.append((0, 0.0, ""))
            continue
        texts.append(value if key in ("task", "method") else f"{key.rpartition('.')[2]}={value_text(key, value)}")
        if key == "method":  # rows without auxiliary objectives first, AANG last, as in Table 2 of the AANG paper
            order.append((1, float(run["auxiliary"]) + float(run["method"] == "aang"), value))
        else:
            number = re.fullmatch(r"-?[\d.]+(e-?\d+)?", value)
            order.append((1, float(value), "") if number else (2, 0.0, value))
    return " ".join(texts) or ("–" if keys else ""), tuple(order)


def _baseline(
    entry: Mapping[str, Any],
    entries: Sequence[Mapping[str, Any]],
    auxiliary: set[str],
    against: str | None,
    paper: bool,
) -> Mapping[str, Any] | None:
    """Return the configuration that one is compared with, on the same problem; None for those that are baselines."""

    def is_baseline(one: Mapping[str, Any]) -> bool:
        name = one["runs"]["method_row"].iloc[0]
        if against is not None:
            return bool(name == against)
        return bool(one["objectives"] == 1) if paper else name not in auxiliary

    others = [one["dev"] for one in entries if one["problem"] == entry["problem"] and is_baseline(one)]
    return None if is_baseline(entry) or not others else max(others, key=lambda one: float(one["dev_mean"]))


def _count_objectives(store: Store, entries: Sequence[dict[str, Any]]) -> None:
    """Set `objectives` and `adaptive` of places: the number of objectives that the method could sample."""
    cells = {
        id(entry): entry["runs"]["cell"][entry["runs"]["group"] == entry["dev"]["group"]].iloc[0] for entry in entries
    }
    seen: dict[str, set[str]] = {}
    for line in (
        store.weights(set(cells.values())).select(["cell", "weights", "factors"]).to_pylist(maps_as_pydicts="strict")
    ):
        seen.setdefault(line["cell"], set()).update(line["weights"], line["factors"].get("A", {}))
    # Some methods log only the objectives of a step. Another row with the same space may have logged all of them.
    spaces: dict[str, int] = {}
    for entry in entries:
        space = entry["dev"]["settings"]["space"]
        spaces[space] = max(spaces.get(space, 1), len(seen.get(cells[id(entry)], ())))
    for entry in entries:
        first = entry["runs"].iloc[0]
        entry["objectives"] = spaces[entry["dev"]["settings"]["space"]] if first["auxiliary"] else 1
        entry["adaptive"] = first["method"] in ADAPTIVE


def _notes(frame: pd.DataFrame) -> Iterator[str]:
    """Yield the foot notes on finished runs, by kind, then row and column."""
    places = sorted(frame.to_dict("records"), key=lambda line: (line["row"], line["column"]))
    for line in places:
        if line["majority_runs"]:
            yield (
                f"{MAJORITY_MARK} {_place(line)}: {line['majority_runs']} of "
                f"{_runs(len(line['seeds']))} never left the majority class on dev."
            )
    for line in places:
        if line["candidates"] > 1:
            settings = ", ".join(f"{key}={value}" for key, value in sorted(line["differing"].items()))
            yield (f"{_place(line)}: {settings}; best mean dev of {line['candidates']} configurations.")
    for line in places:
        if line["incomplete"]:
            have = "configuration has" if line["incomplete"] == 1 else "configurations have"
            yield (
                f"{_place(line)}: {line['incomplete']} further {have} fewer than "
                f"{len(line['seeds'])} seeds and did not compete."
            )
    for column, block in sorted({(line["column"], line["block"]) for line in places}):
        same = [line for line in places if (line["column"], line["block"]) == (column, block)]
        budgets = {line["row"]: _budget(line) for line in same}
        if len(set(budgets.values())) > 1:
            each = ", ".join(f"{row} {'unknown' if size is None else f'{size:,}'}" for row, size in budgets.items())
            yield f"{column}: budgets of end-task examples differ: {each}."
    for reason in sorted({line["no_test"] for line in places if isinstance(line["no_test"], str)}):
        where = [f"{_place(line)} ({line['pairs']:.0f})" for line in places if line["no_test"] == reason]
        yield f"No p-value ({reason}): {', '.join(where)}."


def _place(line: Mapping[Any, Any]) -> str:
    return f"{line['row']} on {line['column']}" + (f" of {line['block']}" if line["block"] else "")


def _budget(line: Mapping[Any, Any]) -> int | None:
    """Return the end-task examples that a configuration may see: steps times batch, a final stage included.

    Rows are meant to be compared at equal budgets. In methods of rounds a step is not always one of the end task:
    there the budget is what the runs have seen, and likewise for runs until convergence.
    """
    settings, seen = line["settings"], float(line["examples"])
    if settings.get("method.name") in _ROUNDS or settings.get("schedule.until") == "converged":
        return round(seen)
    steps, batch = settings.get("schedule.steps", ""), settings.get("batch.end_task", "")
    final = settings.get("final_finetune.steps", "0")
    if not (steps.isdecimal() and batch.isdecimal()):
        return None
    tied = settings.get("method.tied_compute") == "true"
    train = int(steps) * (int(batch) + int(settings["batch.auxiliary"])) if tied else int(steps) * int(batch)
    return train + int(final) * int(batch)


def _unfinished_notes(runs: pd.DataFrame) -> Iterator[str]:
    """Yield the foot notes on runs that were cut short, then on those that failed; both stand in no average."""
    for (row, task), members in runs[runs["status"] == "cut"].groupby(["method_row", "task"]):
        first, last = members["steps"].min(), members["steps"].max()
        steps = f"{first:,}" if first == last else f"{first:,} to {last:,}"
        verb = "was" if len(members) == 1 else "were"
        yield (
            f"{CUT_MARK} {row} on {task}: {_runs(len(members))} {verb} cut short by a scheduler after {steps} steps "
            f"and did not compete."
        )
    for (row, task), members in runs[runs["status"] == "failed"].groupby(["method_row", "task"]):
        yield f"{row} on {task}: {_runs(len(members))} failed."


def _runs(count: int) -> str:
    return f"{count} run" if count == 1 else f"{count} runs"
