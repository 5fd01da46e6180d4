"""The runs of a store, and which configuration of each method a table reports (docs/semantics.md, section 5).

The configuration with the best mean DEV score over its seeds is chosen; its TEST scores are reported and compared.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any, Literal

import pandas as pd

from aang_ray.config import RunConfig
from aang_ray.errors import UserError
from aang_ray.store import Store

METRICS = ("accuracy", "macro_f1")
VIEWS = ("test", "test_clean", "dev")

# Settings that define the problem: runs that differ in one of them stand in different columns of the table.
_PROBLEM = (
    *("data.", "encoder.name", "encoder.revision", "encoder.layers"),
    *("fingerprints.data", "fingerprints.encoder", "fingerprints.token_types"),
)
# Settings of the data section that belong to the solution.
_CHOICES = ("data.class_weights", "data.max_tokens")
# Settings that are neither: the seed, what the row states itself, and what changes nothing but rounding.
_NEITHER = ("seed", "label", "resources.", "batch.micro", "fingerprints.", "data.metric")
# Settings that the fingerprint of their content replaces.
_NAMES = {
    "fingerprints.data": ("data.task", "data.in_domain", "data.out_of_domain", "data.retrieve_from"),
    "fingerprints.encoder": ("encoder.name", "encoder.revision"),
}
_DIGITS = 12  # digits of a fingerprint that a label shows


def read_runs(store: Store, metric: str | None = None) -> pd.DataFrame:
    """Read all runs of a store, one line each, sorted by configuration and seed.

    Args:
        store: The store.
        metric: `accuracy` or `macro_f1`, for every task; None: the metric of each task.

    Returns:
        A frame with the columns `cell`, `group` (the configuration without the seed), `seed`, `status`, `row` (for
        example `aang-td`), `label` (`aang-td n=6`), `task`, `method`, `auxiliary`, `metric`, `column` (label of the
        problem; only of runs that are done), `dev`, `test`, `test_clean` (scores by the metric), `test_examples`,
        `clean_examples`, `majority`, `steps`, `examples`, `tokens`, `seconds` and `choices` (the settings of the
        solution, as text).

    Raises:
        UserError: for an unknown metric, a store that does not exist, or one without a run that is done.
    """
    if metric is not None and metric not in METRICS:
        raise UserError(f"metric {metric!r} is unknown; choose one of {', '.join(METRICS)}")
    if not store.exists():
        raise UserError(f"there is no store at {store.uri}; run a sweep first, or name another with --store")
    rows = store.results().to_pylist(maps_as_pydicts="strict")
    lines = [_line(row, metric or row["metric"]) for row in rows]
    # A run that is done has been scored on both splits. A row without these scores cannot stand in a table.
    lines = [line for line in lines if line["status"] != "done" or not (line["dev"] is None or line["test"] is None)]
    done = [line for line in lines if line["status"] == "done"]
    if not done:
        failed = sum(line["status"] == "failed" for line in lines)
        raise UserError(f"store {store.uri} has no finished run ({failed} failed); run a sweep first")
    for task in {line["task"] for line in done}:
        _label_columns([line for line in done if line["task"] == task])
    frame = pd.DataFrame(lines).drop(columns=["settings", "problem"])
    return frame.sort_values(["group", "seed"], ignore_index=True)


def _line(row: Mapping[str, Any], metric: str) -> dict[str, Any]:
    """One line of `read_runs` without the label of its column, and the `settings` and `problem` that make that."""
    settings = _settings(json.loads(row["config"]))
    replaced = {name for key, names in _NAMES.items() if settings.get(key) for name in names}
    kinds = {key: _kind(key) for key in settings if key not in replaced}
    same = ("cell", "group", "seed", "status", "task", "method", "majority", "steps", "examples", "tokens", "seconds")
    return {
        **{name: row[name] for name in same},
        # `aang-td n=6` and `aang-td n=3` are configurations of the row `aang-td`.
        "row": row["row"] if row["n"] is None else row["row"].removesuffix(f" n={row['n']}"),
        "label": row["row"],
        "auxiliary": row["space"] is not None,
        "metric": metric,
        "column": None,
        **{view: row[f"{view}_{metric}"] for view in VIEWS},
        "test_examples": row["test_examples"] or 0,
        "clean_examples": row["test_clean_examples"] or 0,
        "settings": settings,
        "problem": {"metric": row["metric"]} | {key: settings[key] for key, kind in kinds.items() if kind == "problem"},
        "choices": {key: settings[key] for key, kind in kinds.items() if kind == "choice"},
    }


def _kind(key: str) -> Literal["problem", "choice"] | None:
    if key.startswith(_PROBLEM) and key not in (*_CHOICES, "data.metric"):
        return "problem"
    return None if key.startswith(_NEITHER) else "choice"


def _settings(config: Mapping[str, Any]) -> dict[str, str]:
    """All settings of a configuration by dotted name; a setting that is younger than the row has its default.

    With the defaults, runs of different versions that solve the same problem stand in one column.
    """
    stored = dict(flatten(config))
    younger = {
        name: text
        for name, text in _DEFAULTS.items()
        if name not in stored and not any(other.startswith(f"{name}.") for other in stored)
    }
    return stored | younger


def flatten(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield all settings of a configuration: dotted name and value as text."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value)


# Without the settings of the method: the default configuration has another method than most rows.
_DEFAULTS = dict(flatten(RunConfig().model_dump(mode="json", exclude={"method"})))


def _label_columns(runs: Sequence[dict[str, Any]]) -> None:
    """Set `column` of runs on one task.

    Runs stand in one column if they solve the same problem: same data, encoder and metric. Where they do not, the
    label adds the settings that differ, for example `movie (train_size=100)`.
    """
    keys = sorted({key for run in runs for key in run["problem"]})
    differing = [key for key in keys if len({run["problem"].get(key) for run in runs}) > 1]
    for run in runs:
        parts = [part for key in differing for part in _label_parts(key, run, runs)]
        run["column"] = f"{run['task']} ({', '.join(parts)})" if parts else run["task"]


def _label_parts(key: str, run: Mapping[str, Any], runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return `name=value`; for a fingerprint the names that it stands for, if these tell the runs apart."""
    names = [name for name in _NAMES.get(key, ()) if len({other["settings"].get(name) for other in runs}) > 1]
    by_names = {tuple(other["settings"].get(name) for name in names) for other in runs}
    # The content of a file may change and its name stay. Then only the digits tell the columns apart.
    if names and len(by_names) == len({other["problem"].get(key) for other in runs}):
        return [f"{name.rpartition('.')[2]}={run['settings'].get(name, '')}" for name in names]
    return [f"{key.rpartition('.')[2]}={run['problem'].get(key, '')[:_DIGITS]}"]


def select(runs: pd.DataFrame) -> dict[Literal["dev", "oracle"], dict[str, Any]]:
    """Choose among the configurations of one row in one column; only those with the most seeds compete.

    Ties go to the smaller group name, so that the choice does not depend on the order of the rows.

    Args:
        runs: Lines of `read_runs` that are done, of one row and one column.

    Returns:
        The configuration with the best mean dev score, and the one with the best mean test score, as the papers
        chose (an oracle). Each is the part of a line of `build_table` that one row of one column determines.
    """
    groups = [members for _, members in runs.groupby("group")]
    most = max(map(len, groups))
    candidates = [_configuration(members) for members in groups if len(members) == most]
    counts = {"candidates": len(candidates), "incomplete": len(groups) - len(candidates)}

    def best(score: str) -> dict[str, Any]:
        # A score that is not a number loses to every other one.
        chosen = max(candidates, key=lambda one: -math.inf if math.isnan(one[score]) else one[score])
        differing = {
            key: value
            for key, value in chosen["settings"].items()
            if any(other["settings"].get(key) != value for other in candidates)
        }
        return chosen | counts | {"differing": differing}

    return {"dev": best("dev_mean"), "oracle": best("test_mean")}


def _configuration(runs: pd.DataFrame) -> dict[str, Any]:
    """Summarise runs that differ in nothing but the seed."""
    scores = {view: None if runs[view].isna().any() and view == "test_clean" else list(runs[view]) for view in VIEWS}
    return {
        "label": runs["label"].iloc[0],
        **{f"{view}_mean": values and fmean(values) for view, values in scores.items()},
        **{f"{view}_sd": stdev(values) if values and len(values) > 1 else None for view, values in scores.items()},
        **{f"{view}_values": values for view, values in scores.items()},
        "seeds": list(runs["seed"]),
        "majority_runs": int(runs["majority"].fillna(False).sum()),
        **{name: fmean(runs[name]) for name in ("steps", "examples", "tokens", "seconds")},
        "group": runs["group"].iloc[0],
        "settings": runs["choices"].iloc[0],
    }


def paired_p_value(ours: Mapping[str, Any], baseline: Mapping[str, Any]) -> tuple[float | None, int]:
    """Return the two-sided p-value of `mean(test difference) = 0` over the seeds that two configurations share.

    With differences d_i over m common seeds, t = mean(d) / (sd(d) / sqrt(m)) with m - 1 degrees of freedom. The
    p-value is None with fewer than two common seeds, or where all differences are equal, for t is not defined then.

    Args:
        ours: `seeds` and `test_values` of one configuration.
        baseline: The same of the one that it is compared with.

    Returns:
        The p-value, and the number m of pairs that it rests on.
    """
    pairs = [dict(zip(one["seeds"], one["test_values"], strict=True)) for one in (ours, baseline)]
    common = sorted(pairs[0].keys() & pairs[1].keys())
    differences = [pairs[0][seed] - pairs[1][seed] for seed in common]
    if len(common) < 2 or max(differences) - min(differences) <= 1e-12:
        return None, len(common)
    from scipy import stats  # here, because importing it takes longer than making the table

    p = float(stats.ttest_rel(*([pair[seed] for seed in common] for pair in pairs)).pvalue)
    return None if math.isnan(p) else p, len(common)
