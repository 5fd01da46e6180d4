"""One run of a store as text: its configuration, scores, history and weights, and why it failed if it did."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from aang_ray.config import RunConfig
from aang_ray.errors import UserError
from aang_ray.report.formats import ABSENT, markdown_grid
from aang_ray.report.select import flatten
from aang_ray.store import HistoryRow, ResultRow, Scores, Store, WeightRow

_EXAMPLES = 3  # runs that the message about an unknown name lists
_VIEWS = {
    "dev_before": "dev before the final fine-tuning",
    "test_before": "test before the final fine-tuning",
    "test_clean_before": "clean test before the final fine-tuning",
    "dev": "dev",
    "test": "test",
    "test_clean": "test without texts of train or dev",
}


def list_runs(store: Store) -> str:
    """Return a table of all runs of a store, and the errors of those that failed.

    Raises:
        UserError: for a store that does not exist or is empty.
    """
    rows = _rows(store)
    header = ["cell", "row", "task", "seed", "status"]
    grid = _grid(header, [[str(row[name]) for name in header] for row in rows])
    errors = [f"{row['cell']} failed: {row['error']}" for row in rows if row["error"] is not None]
    return "\n\n".join([grid, "\n".join(errors)]).rstrip() + "\n"


def describe_run(store: Store, name: str, *, full: bool = False) -> str:
    """Return everything that a store knows about one run.

    Args:
        store: The store.
        name: The name of the run (its cell), or as many of its first characters as tell it from the others.
        full: Show the whole configuration instead of the settings that differ from the defaults.

    Raises:
        UserError: for a name that no run has, or that several runs begin with.
    """
    record = store.record(find_run(store, name))
    parts = [_summary(record.result), _configuration(record.result.config, full=full)]
    if record.result.error is not None or record.result.log_tail is not None:
        parts.append(_failure(record.result))
    parts += [_scores(record.result), _history(record.history)]
    if record.weights:
        parts.append(_weights(record.weights[-1], record.history[-1].losses if record.history else {}))
    return "\n\n".join(part for part in parts if part) + "\n"


def find_run(store: Store, name: str) -> str:
    """Return the name of the run that a name, or its first characters, mean.

    Raises:
        UserError: for a name that no run has, or that several runs begin with.
    """
    rows = _rows(store)
    found = [row for row in rows if row["cell"].startswith(name)]
    if len(found) != 1:
        there = [f"{row['cell']} ({row['row']} on {row['task']}, seed {row['seed']})" for row in found or rows]
        more = f" and {len(there) - _EXAMPLES} more" if len(there) > _EXAMPLES else ""
        problem = f"{len(found)} runs begin with {name}" if found else f"no run begins with {name}"
        raise UserError(f"{problem}; store {store.uri} has {', '.join(there[:_EXAMPLES])}{more}")
    return str(found[0]["cell"])


def _rows(store: Store) -> list[dict[str, Any]]:
    """All result rows of a store by task, row and seed."""
    names = ["cell", "row", "task", "seed", "status", "error"]
    rows: list[dict[str, Any]] = store.results(names).to_pylist() if store.exists() else []
    if not rows:
        raise UserError(f"there are no runs in store {store.uri}; run a sweep first, or name another with --store")
    return sorted(rows, key=lambda row: (row["task"], row["row"], row["seed"], row["cell"]))


def _summary(row: ResultRow) -> str:
    effort = f"{row.steps:,} steps, {row.examples:,} end-task examples, {row.tokens:,} tokens, {row.seconds:,.1f} s"
    best = "" if row.best_step is None else f", best dev at step {row.best_step:,}"
    majority = "\nwarning: dev was never better than predicting the majority class" if row.majority else ""
    return (
        f"cell {row.cell}: {row.row} on {row.task}, seed {row.seed}: {row.status}\n"
        f"{effort}{best}\n"
        f"on {row.device} in {row.precision}, finished {row.finished_at}, "
        f"{', '.join(f'{name} {version}' for name, version in row.versions.items())}{majority}"
    )


def _configuration(config: Mapping[str, Any], *, full: bool) -> str:
    settings = dict(flatten(config))
    if full:
        title = "Configuration"
    else:
        title = "Configuration: settings that differ from the defaults (--full shows all)"
        # The method's section in the defaults is the one of this run's method.
        name = config["method"]["name"]
        defaults = dict(flatten(RunConfig.model_validate({"method": {"name": name}}).model_dump(mode="json")))
        defaults["method.name"] = ""
        settings = {key: value for key, value in settings.items() if defaults.get(key) != value}
    return "\n".join([title, "", *(f"  {key}: {value}" for key, value in settings.items())])


def _failure(row: ResultRow) -> str:
    log = f"\n\nLast lines of the log, with the traceback if there was one\n\n{row.log_tail}" if row.log_tail else ""
    return f"Error: {row.error}{log}" if row.error is not None else log.strip()


def _scores(row: ResultRow) -> str:
    lines = []
    for view, title in _VIEWS.items():
        scores: Scores | None = getattr(row, view)
        if scores is not None:
            lines.append([title, *_score_texts(scores), f"{scores.examples:,}", scores.classes])
    if not lines:
        return ""
    low, high = row.test_clean_low, row.test_clean_high
    interval = (
        ""
        if low is None or high is None
        else (
            f"\n\n95 % bootstrap interval of {row.metric} on the test without texts of train or dev: "
            f"{100 * low:.2f} to {100 * high:.2f}"
        )
    )
    header = ["scores in %", "accuracy", "macro-F1", "loss", "examples", "examples of each class"]
    return _grid(header, lines) + interval


def _score_texts(scores: Scores | None) -> list[str]:
    """Accuracy and macro-F1 in %, and the loss."""
    if scores is None:
        return [ABSENT] * 3
    return [f"{100 * scores.accuracy:.2f}", f"{100 * scores.macro_f1:.2f}", f"{scores.loss:.4f}"]


def _history(history: Sequence[HistoryRow]) -> str:
    """The evaluations, each with the mean training loss of the end task since the one before."""
    lines = [
        [
            f"{row.step:,}",
            row.stage or ABSENT,
            *_score_texts(row.dev),
            _number(row.losses.get("end-task")),
            f"{row.examples:,}",
            f"{row.seconds:,.1f}",
        ]
        for row in history
    ]
    header = ["step", "stage", "dev accuracy", "dev macro-F1", "dev loss", "train loss", "examples", "seconds"]
    return _grid(header, lines) if lines else ""


def _weights(row: WeightRow, losses: Mapping[str, float]) -> str:
    """The last logged weights of the objectives, their logits' own part (A), and their last mean losses."""
    own = row.factors.get("A", {})
    names = sorted({*own, *row.weights}, key=lambda name: (-own.get(name, 0.0), name))
    lines = [
        [name, _number(row.weights.get(name)), _number(own.get(name)), _number(losses.get(name))] for name in names
    ]
    factors = [
        f"{stage}: {', '.join(f'{name} {value:.4f}' for name, value in values.items())}"
        for stage, values in row.factors.items()
        if stage != "A"
    ]
    title = f"Weights at step {row.step:,}: {row.end_task_weight:.4f} of the end task; of the objectives"
    return "\n\n".join([title, _grid(["objective", "weight", "factor A", "loss"], lines), "\n".join(factors)]).rstrip()


def _number(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.4f}"


def _grid(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return markdown_grid(pd.DataFrame(lines, columns=list(header)))
