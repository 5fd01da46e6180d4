"""The table of a store as a pandas frame: methods by tasks, each with its chosen configuration's scores over seeds."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pandas as pd

from aang_ray.config.methods import AlphavilConfig, DiwConfig
from aang_ray.report.select import paired_p_value, read_runs, select
from aang_ray.store import Store

MAJORITY_MARK = "†"
CUT_MARK = "‡"
ENTRY = (
    *("column", "task", "metric", "row", "label", "chosen_by"),
    *("test_mean", "test_clean_mean", "dev_mean", "test_sd", "test_clean_sd", "dev_sd"),
    *("test_values", "test_clean_values", "dev_values", "seeds", "p_value", "majority_runs"),
    *("steps", "examples", "tokens", "seconds", "candidates", "incomplete", "cut", "group", "settings"),
)
"""Columns of the table that JSON and CSV show for each entry."""
_ROUNDS = {str(section.model_fields["name"].default) for section in (AlphavilConfig, DiwConfig)}


def build_table(store: Store, *, metric: str | None = None, oracle: bool = False) -> pd.DataFrame:
    """Build the table of a store.

    Reported are the test scores of the configuration with the best mean dev score.

    Args:
        store: The store.
        metric: `accuracy` or `macro_f1`, for every task; None: the metric of each task.
        oracle: Also report the configuration with the best mean test score, which is how the papers chose.

    Returns:
        A frame with one line for each problem, row and way to choose. Scores are fractions.

        - `column`: the problem: the task, with the settings that differ between columns of one task. `task`,
          `metric`, `test_examples` and `clean_examples` (test texts that occur neither in train nor in dev) belong
          to it.
        - `row`: the method and its space. A row without a run that is done on any task is a category of `row`.
        - `label`: the row with the chosen `n`; `settings`: all settings of the chosen configuration; `differing`:
          those in which it differs from another candidate; `group`: its name in the store.
        - `chosen_by`: `dev`, or `oracle`: the line was chosen on test, and is no fair estimate.
        - `test_mean`, `test_sd`, `test_values`, and the same of `test_clean` and `dev`: mean, sample standard
          deviation (missing for one seed) and the values in the order of `seeds`.
        - `p_value`: of a paired t-test over the common seeds against the best row (by dev) without auxiliary
          objectives, whose label is `against`; `pairs`: the number of these seeds. Missing where there is no test.
        - `steps`, `examples` (of the end task), `tokens`, `seconds`: mean of a run.
        - `candidates`: configurations that competed; `incomplete`: those that did not, because others have more
          seeds; `cut`: runs that a scheduler cut short; `majority_runs`: runs that never left the majority class.

        `attrs["notes"]` holds the foot notes: what a reader must know before comparing two numbers.

    Raises:
        UserError: for an unknown metric, or where the store has nothing to report.
    """
    runs = read_runs(store, metric)
    done, unfinished = runs[runs["status"] == "done"], runs[runs["status"] != "done"]
    entries = [
        {"column": column, "row": row, "runs": members, **select(members)}
        for (row, column), members in done.groupby(["row", "column"], sort=False)
    ]
    cut = unfinished[unfinished["status"] == "cut"].groupby(["row", "task"]).size().to_dict()
    auxiliary = set(runs["row"][runs["auxiliary"]])
    sizes = done.groupby("column")[["test_examples", "clean_examples"]].max()
    lines: list[dict[str, Any]] = []
    for entry in entries:
        first = entry["runs"].iloc[0]
        shared = {
            **{name: first[name] for name in ("column", "row", "task", "metric")},
            **{name: int(sizes.loc[entry["column"], name]) for name in sizes.columns},
            "cut": cut.get((first["row"], first["task"]), 0),
        }
        lines.append({**shared, "chosen_by": "dev", **_test(entry, entries, auxiliary), **entry["dev"]})
        if oracle:
            lines.append({**shared, "chosen_by": "oracle", **_NO_TEST, **entry["oracle"]})
    frame = pd.DataFrame(lines, columns=[*ENTRY, "test_examples", "clean_examples", "differing", "pairs", "against"])
    # Rows without auxiliary objectives first, AANG last, as in Table 2 of the AANG paper.
    order = sorted(set(zip(runs["auxiliary"], runs["method"] == "aang", runs["row"], strict=True)))
    frame["row"] = pd.Categorical(frame["row"], [row for _, _, row in order])
    numbers = [name for name in ENTRY if name.endswith(("_mean", "_sd", "p_value"))]
    frame[numbers] = frame[numbers].astype(float)
    frame = frame.sort_values(["column", "row", "chosen_by"], ignore_index=True)
    frame.attrs["notes"] = [*_notes(frame[frame["chosen_by"] == "dev"]), *_unfinished_notes(unfinished)]
    return frame


_NO_TEST = {"p_value": None, "pairs": 0, "against": None}


def _test(entry: Mapping[str, Any], entries: Sequence[Mapping[str, Any]], auxiliary: set[str]) -> dict[str, Any]:
    """Compare a row with auxiliary objectives with the best row without them in the same column."""
    singles = [
        other["dev"] for other in entries if other["column"] == entry["column"] and other["row"] not in auxiliary
    ]
    if entry["row"] not in auxiliary or not singles:
        return _NO_TEST
    best = max(singles, key=lambda single: float(single["dev_mean"]))
    p_value, pairs = paired_p_value(entry["dev"], best)
    return {"p_value": p_value, "pairs": pairs, "against": best["label"]}


def _notes(frame: pd.DataFrame) -> Iterator[str]:
    """Yield the foot notes on finished runs, by kind, then row and column."""
    places = sorted(frame.to_dict("records"), key=lambda line: (line["row"], line["column"]))
    for line in places:
        if line["majority_runs"]:
            yield (
                f"{MAJORITY_MARK} {line['row']} on {line['column']}: {line['majority_runs']} of "
                f"{_runs(len(line['seeds']))} never left the majority class on dev."
            )
    for line in places:
        if line["candidates"] > 1:
            settings = ", ".join(f"{key}={value}" for key, value in sorted(line["differing"].items()))
            yield (
                f"{line['row']} on {line['column']}: {settings}; best mean dev of {line['candidates']} configurations."
            )
    for line in places:
        if line["incomplete"]:
            have = "configuration has" if line["incomplete"] == 1 else "configurations have"
            yield (
                f"{line['row']} on {line['column']}: {line['incomplete']} further {have} fewer than "
                f"{len(line['seeds'])} seeds and did not compete."
            )
    for line in places:
        if not math.isnan(line["p_value"]) and line["pairs"] < len(line["seeds"]):
            yield (
                f"{line['row']} on {line['column']}: p rests on the {line['pairs']} of {len(line['seeds'])} seeds "
                f"that {line['against']} has, too."
            )
    for column in sorted({line["column"] for line in places}):
        budgets = {line["row"]: _budget(line) for line in places if line["column"] == column}
        if len(set(budgets.values())) > 1:
            each = ", ".join(f"{row} {'unknown' if size is None else f'{size:,}'}" for row, size in budgets.items())
            yield f"{column}: budgets of end-task examples differ: {each}."


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
    for (row, task), members in runs[runs["status"] == "cut"].groupby(["row", "task"]):
        first, last = members["steps"].min(), members["steps"].max()
        steps = f"{first:,}" if first == last else f"{first:,} to {last:,}"
        verb = "was" if len(members) == 1 else "were"
        yield (
            f"{CUT_MARK} {row} on {task}: {_runs(len(members))} {verb} cut short by a scheduler after {steps} steps "
            f"and did not compete."
        )
    for (row, task), members in runs[runs["status"] == "failed"].groupby(["row", "task"]):
        yield f"{row} on {task}: {_runs(len(members))} failed."


def _runs(count: int) -> str:
    return f"{count} run" if count == 1 else f"{count} runs"
