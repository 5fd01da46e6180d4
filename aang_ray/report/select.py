"""The runs of a store, and which configuration of each method a table reports (docs/semantics.md, section 5).

The configuration with the best mean DEV score over its seeds is chosen; its TEST scores are reported and compared.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, lru_cache
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
_NULLS = {"data.train_size": "all", "data.external_size": "all", "encoder.layers": "all"}
"""What null means; for all other settings `none`."""
_DIGITS = 12  # digits of a fingerprint that a label shows
_SAME = (
    "cell",
    "group",
    "seed",
    "status",
    "task",
    "method",
    "majority",
    "steps",
    "examples",
    "tokens",
    "seconds",
    "best_step",
)


def read_runs(store: Store, metric: str | None = None, split: Sequence[str] = ()) -> pd.DataFrame:
    """Read all runs of a store, one line each, sorted by configuration and seed.

    Args:
        store: The store.
        metric: `accuracy` or `macro_f1`, for every task; None: the metric of each task.
        split: Settings by dotted name that a table has rows or columns for. They do not enter the label of the column.

    Returns:
        A frame with the columns `cell`, `group` (the configuration without the seed), `seed`, `status`, `row` (for
        example `aang-td`), `label` (`aang-td n=6`), `task`, `method`, `auxiliary`, `metric`, `problem` and `column`
        (label of the problem, and without the settings of `split`; only of runs that are done), `dev`, `test`,
        `test_clean` (scores by the metric), `test_examples`, `clean_examples`, `majority`, `steps`, `examples`,
        `tokens`, `seconds`, `choices` (the settings of the solution, as text) and `split` (the values of `split`; None
        for a setting that the method does not have).

    Raises:
        UserError: for an unknown metric, a store that does not exist, or one without a run that is done, or a setting
            that no run has.
    """
    if metric is not None and metric not in METRICS:
        raise UserError(f"metric {metric!r} is unknown; choose one of {', '.join(METRICS)}")
    if not store.exists():
        raise UserError(f"there is no store at {store.uri}; run a sweep first, or name another with --store")
    scores = [f"{view}_{name}" for view in VIEWS for name in METRICS]
    sizes = {"test_examples": "test_examples", "test_clean_examples": "clean_examples"}
    runs: pd.DataFrame = store.results([*_SAME, "row", "n", "space", "metric", "config", *scores, *sizes]).to_pandas()
    runs["metric"] = metric or runs["metric"]
    for view in VIEWS:
        runs[view] = runs[f"{view}_macro_f1"].where(runs["metric"] == "macro_f1", runs[f"{view}_accuracy"])
    # A run that is done has been scored on both splits. A row without these scores cannot stand in a table.
    runs = runs[(runs["status"] != "done") | (runs["dev"].notna() & runs["test"].notna())]
    if not (runs["status"] == "done").any():
        failed = (runs["status"] == "failed").sum()
        raise UserError(f"store {store.uri} has no finished run ({failed} failed); run a sweep first")
    for stored, name in sizes.items():
        runs[name] = runs[stored].fillna(0).astype(int)
    runs["auxiliary"], runs["n"] = runs["space"].notna(), runs["n"].astype(object).where(runs["n"].notna(), None)
    runs["label"] = runs["row"].astype(object)
    # `aang-td n=6` and `aang-td n=3` are configurations of the row `aang-td`.
    runs["row"] = [row.removesuffix(f" n={n}") for row, n in zip(runs["label"], runs["n"], strict=True)]
    # Runs of one group differ in nothing that matters here, so one configuration of each is enough.
    runs = runs.sort_values(["group", "seed"], ignore_index=True)
    groups = {line["group"]: _group(line, split) for line in runs.drop_duplicates("group").to_dict("records")}
    for key in split:
        if all(one["split"][key] is None for one in groups.values()):
            raise UserError(f"no run of store {store.uri} has the setting {key}; name one as in `aang show --full`")
    _label_columns([groups[name] for name in runs["group"][runs["status"] == "done"].unique()], split)
    for name in ("problem", "column", "choices", "split"):
        runs[name] = pd.Series([groups[group][name] for group in runs["group"]], dtype=object)
    kept: pd.DataFrame = runs.drop(columns=["config", "space", "n", *scores, "test_clean_examples"])
    return kept


def _group(row: Mapping[Any, Any], split: Sequence[str]) -> dict[str, Any]:
    """What a configuration says, without the labels of its column: these depend on the other configurations."""
    settings = _settings(json.loads(row["config"]))
    replaced = {name for key, names in _NAMES.items() if settings.get(key) for name in names}
    kinds = {key: _kind(key) for key in settings if key not in replaced}
    facts = {"metric": row["metric"]} | {key: settings[key] for key, kind in kinds.items() if kind == "problem"}
    # Without auxiliary objectives their number is not a setting that means anything.
    values = {key: (settings.get(key) if key != "n" or row["auxiliary"] else None) for key in split}
    return {
        "task": row["task"],
        "settings": settings,
        "facts": facts,
        "choices": {key: settings[key] for key, kind in kinds.items() if kind == "choice"},
        "split": values,
        "problem": None,
        "column": None,
    }


@cache
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
            yield f"{prefix}{key}", _text_of(value) if value.__hash__ else json.dumps(value)


@lru_cache(maxsize=4096, typed=True)
def _text_of(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


# Without the settings of the method: the default configuration has another method than most rows.
_DEFAULTS = dict(flatten(RunConfig().model_dump(mode="json", exclude={"method"})))


def _label_columns(groups: Sequence[dict[str, Any]], split: Sequence[str]) -> None:
    """Set `problem` and `column` of configurations.

    Runs stand in one column if they solve the same problem: same data, encoder and metric. Where they do not, the
    label adds the settings that differ, for example `movie (train_size=100)`.
    """
    by_task: dict[str, list[dict[str, Any]]] = {}
    for group in groups:
        by_task.setdefault(group["task"], []).append(group)
    for same in by_task.values():
        values: dict[str, set[str | None]] = {key: set() for group in same for key in group["facts"]}
        for key, found in values.items():
            found.update(group["facts"].get(key) for group in same)
        for name, skipped in (("problem", ()), ("column", split)):
            differing = [key for key in sorted(values) if len(values[key]) > 1 and key not in skipped]
            labels: dict[tuple[str, ...], str] = {}
            for group in same:
                # The same facts get the same label, and making one costs a look at all configurations.
                facts = tuple(f"{group['facts'].get(key)}" for key in differing)
                if facts not in labels:
                    parts = [part for key in differing for part in _label_parts(key, group, same)]
                    labels[facts] = f"{group['task']} ({', '.join(parts)})" if parts else group["task"]
                group[name] = labels[facts]


def _label_parts(key: str, group: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return `name=value`; for a fingerprint the names that it stands for, if these tell the problems apart."""
    names = [name for name in _NAMES.get(key, ()) if len({other["settings"].get(name) for other in groups}) > 1]
    by_names = {tuple(other["settings"].get(name) for name in names) for other in groups}
    # The content of a file may change and its name stay. Then only the digits tell the columns apart.
    if names and len(by_names) == len({other["facts"].get(key) for other in groups}):
        return [f"{name.rpartition('.')[2]}={value_text(name, group['settings'].get(name, ''))}" for name in names]
    return [f"{key.rpartition('.')[2]}={value_text(key, group['facts'].get(key, ''))[:_DIGITS]}"]


def value_text(key: str, text: str) -> str:
    """Return the value of a setting as people read it: null has a word."""
    return _NULLS.get(key, "none") if text == "null" else text


def select(runs: pd.DataFrame) -> dict[Literal["dev", "oracle"], dict[str, Any]]:
    """Choose among the configurations of one place in a table; only those with the most seeds compete.

    Ties go to the smaller group name, so that the choice does not depend on the order of the rows.

    Args:
        runs: Lines of `read_runs` that are done, of one place.

    Returns:
        The configuration with the best mean dev score, and the one with the best mean test score, as the papers
        chose (an oracle). Each is the part of a line of `build_table` that one place determines.
    """
    sizes = runs.groupby("group").size()
    candidates = runs[runs["group"].isin(sizes.index[sizes == sizes.max()])]
    counts = {"candidates": candidates["group"].nunique(), "incomplete": int((sizes < sizes.max()).sum())}
    settings = candidates.drop_duplicates("group")["choices"].tolist()

    def best(view: str) -> dict[str, Any]:
        # A score that is not a number loses to every other one.
        means = candidates.groupby("group")[view].mean().fillna(-math.inf)
        # pandas rounds sums: what is equal up to that is compared by the exact mean.
        near = candidates[candidates["group"].isin(means.index[means >= means.max() - 1e-12])]
        exact = near.groupby("group")[view].agg(fmean).fillna(-math.inf)
        chosen = _configuration(near, max(exact.index, key=exact.__getitem__))
        differing = {
            key: value
            for key, value in chosen["settings"].items()
            if any(other.get(key) != value for other in settings)
        }
        return chosen | counts | {"differing": differing}

    return {"dev": best("dev"), "oracle": best("test")}


def _configuration(runs: pd.DataFrame, group: str) -> dict[str, Any]:
    """Summarise the runs of a group, which differ in nothing but the seed."""
    runs = runs[runs["group"] == group]
    # A run whose test texts all stand in train or dev, too, has no score on the clean view.
    scores = {view: None if runs[view].isna().any() and view == "test_clean" else list(runs[view]) for view in VIEWS}
    return {
        "label": runs["label"].iloc[0],
        **{f"{view}_mean": values and fmean(values) for view, values in scores.items()},
        **{f"{view}_sd": _deviation(values) for view, values in scores.items()},
        **{f"{view}_values": values for view, values in scores.items()},
        "seeds": list(runs["seed"]),
        "majority_runs": int(runs["majority"].fillna(False).sum()),
        **{name: fmean(runs[name]) for name in ("steps", "examples", "tokens", "seconds")},
        "group": group,
        "settings": runs["choices"].iloc[0],
    }


def _deviation(values: Sequence[float] | None) -> float | None:
    """Return the sample standard deviation; None where there is none."""
    return stdev(values) if values and len(values) > 1 and not any(map(math.isnan, values)) else None
