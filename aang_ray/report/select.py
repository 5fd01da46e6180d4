"""Which configuration of a row is reported (semantics section 5): the one with the best mean dev score over seeds."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any, Literal

from aang_ray.config import RunConfig
from aang_ray.errors import UserError
from aang_ray.store import Store

# --- report.runs: Finished and failed runs as the table needs them, read from the store alone.


METRICS = ("accuracy", "macro_f1")

# Settings that say which problem is solved, not how: runs that differ in them stand in different columns.
_PROBLEM = ("data.", "encoder.name", "encoder.revision", "encoder.layers", "fingerprints.data", "fingerprints.encoder")
# Of the data section these are choices about the solution.
_CHOICES = ("data.class_weights", "data.max_tokens")
# Neither a problem nor a choice: the seed, what the row states itself, and what changes nothing but rounding.
_NEITHER = ("seed", "label", "resources.", "batch.micro", "fingerprints.", "data.metric")
# Names that a fingerprint of their content replaces.
NAMES = {
    "fingerprints.data": ("data.task", "data.in_domain", "data.out_of_domain"),
    "fingerprints.encoder": ("encoder.name", "encoder.revision"),
}


@dataclass(frozen=True)
class Run:
    """A done cell."""

    cell: str
    group: str
    row: str
    """Row of the table: method and space, without n."""
    label: str
    """Row name with n."""
    task: str
    method: str
    auxiliary: bool
    seed: int
    metric: str
    """The metric that is shown."""
    settings: Mapping[str, str]
    """The whole configuration: leaves by dotted name, as text."""
    problem: Mapping[str, str]
    """The settings that make the column."""
    choices: Mapping[str, str]
    """The settings that make the configuration within a row."""
    dev: float
    test: float
    test_clean: float | None
    test_examples: int
    clean_examples: int
    majority: bool
    steps: int
    examples: int
    tokens: int
    seconds: float


@dataclass(frozen=True)
class Unfinished:
    """A cell that failed, or that a scheduler cut short: it has no test score and stands in no average."""

    row: str
    task: str
    auxiliary: bool
    method: str
    status: Literal["failed", "cut"]
    steps: int


def load_runs(store: Store, metric: str | None) -> tuple[list[Run], list[Unfinished]]:
    """All runs of a store, and those without a score; scores by `metric`, or by each run's own.

    Raises `UserError` for an unknown metric, a store that is not there, and one without a finished run.
    """
    if metric is not None and metric not in METRICS:
        raise UserError(f"metric {metric!r} is unknown; choose one of {', '.join(METRICS)}")
    if not store.exists():
        raise UserError(f"there is no store at {store.uri}; run a sweep first, or name another with --store")
    rows = store.results().to_pylist(maps_as_pydicts="strict")
    runs = [_run(row, metric or row["metric"]) for row in rows if row["status"] == "done" and _scored(row)]
    unfinished = [
        Unfinished(_row_name(row), row["task"], row["space"] is not None, row["method"], row["status"], row["steps"])
        for row in rows
        if row["status"] != "done"
    ]
    if not runs:
        failed = sum(row.status == "failed" for row in unfinished)
        raise UserError(f"store {store.uri} has no finished run ({failed} failed); run a sweep first")
    return sorted(runs, key=lambda run: (run.group, run.seed)), unfinished


def _scored(row: Mapping[str, Any]) -> bool:
    """A done run has been scored on both splits; whatever has not cannot stand in a table."""
    return row["dev_examples"] is not None and row["test_examples"] is not None


def _run(row: Mapping[str, Any], metric: str) -> Run:
    settings = _settings(json.loads(row["config"]))
    replaced = {name for key, names in NAMES.items() if settings.get(key) for name in names}
    kinds = {key: _kind(key) for key in settings if key not in replaced}
    return Run(
        cell=row["cell"],
        group=row["group"],
        row=_row_name(row),
        label=row["row"],
        task=row["task"],
        method=row["method"],
        auxiliary=row["space"] is not None,
        seed=row["seed"],
        metric=metric,
        settings=settings,
        problem={"metric": row["metric"]} | {key: settings[key] for key, kind in kinds.items() if kind == "problem"},
        choices={key: settings[key] for key, kind in kinds.items() if kind == "choice"},
        dev=row[f"dev_{metric}"],
        test=row[f"test_{metric}"],
        test_clean=row[f"test_clean_{metric}"],
        test_examples=row["test_examples"],
        clean_examples=row["test_clean_examples"] or 0,
        majority=bool(row["majority"]),
        steps=row["steps"],
        examples=row["examples"],
        tokens=row["tokens"],
        seconds=row["seconds"],
    )


def _kind(key: str) -> Literal["problem", "choice"] | None:
    if key.startswith(_PROBLEM) and key not in (*_CHOICES, "data.metric"):
        return "problem"
    return None if key.startswith(_NEITHER) else "choice"


def _row_name(row: Mapping[str, Any]) -> str:
    """`aang-td n=6` and `aang-td n=3` are configurations of the row `aang-td`."""
    name: str = row["row"]
    return name if row["n"] is None else name.removesuffix(f" n={row['n']}")


def _settings(config: Mapping[str, Any]) -> dict[str, str]:
    """Leaves of a configuration by dotted name; a setting that is younger than the row has its default.

    Then runs of different versions that solve the same problem stand in one column.
    """
    stored = dict(_flatten("", config))
    younger = {
        name: text
        for name, text in _DEFAULTS.items()
        if name not in stored and not any(other.startswith(f"{name}.") for other in stored)
    }
    return stored | younger


def _flatten(prefix: str, value: Any) -> Iterator[tuple[str, str]]:
    """Leaves by dotted name, as text."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flatten(f"{prefix}.{key}" if prefix else str(key), inner)
    else:
        yield prefix, value if isinstance(value, str) else json.dumps(value)


# A method's own settings are another matter: the default configuration is of another method.
_DEFAULTS = dict(_flatten("", RunConfig().model_dump(mode="json", exclude={"method"})))


@dataclass(frozen=True)
class Estimate:
    """A score over seeds, as a fraction."""

    mean: float
    sd: float | None
    """Sample standard deviation (n - 1); None for one seed."""
    values: tuple[float, ...]
    """By seed, in the order of the configuration's `seeds`."""

    @classmethod
    def of(cls, values: Iterable[float]) -> Estimate:
        """Mean and sample standard deviation of at least one value."""
        all_values = tuple(values)
        return cls(fmean(all_values), stdev(all_values) if len(all_values) > 1 else None, all_values)


@dataclass(frozen=True)
class Configuration:
    """The runs of one configuration: they differ in nothing but the seed."""

    group: str
    label: str
    seeds: tuple[int, ...]
    choices: Mapping[str, str]
    dev: Estimate
    test: Estimate
    test_clean: Estimate | None
    majority: int
    """Runs that never left the majority class on dev."""
    steps: float
    examples: float
    tokens: float
    seconds: float
    """Compute of a run, mean over the seeds; `examples` are end-task examples, `tokens` those through the body."""


@dataclass(frozen=True)
class Selection:
    """What a row reports on a task."""

    by_dev: Configuration
    by_test: Configuration
    """Chosen on test, as the papers did: to be labelled `oracle` wherever it is shown."""
    candidates: int
    incomplete: int
    """Configurations that do not compete, because others have more seeds."""
    differing: Mapping[str, str]
    """Settings of `by_dev` in which it differs from a candidate."""


def select(runs: Sequence[Run]) -> Selection:
    """Choose among the configurations of one row on one task; those with the most seeds compete.

    Ties go to the smaller group name, so that the choice does not depend on the order of the rows.
    """
    groups: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        groups[run.group].append(run)
    most = max(len(members) for members in groups.values())
    candidates = [_configuration(members) for _, members in sorted(groups.items()) if len(members) == most]
    by_dev = _best(candidates, lambda configuration: configuration.dev.mean)
    return Selection(
        by_dev=by_dev,
        by_test=_best(candidates, lambda configuration: configuration.test.mean),
        candidates=len(candidates),
        incomplete=len(groups) - len(candidates),
        differing=_differing(by_dev, candidates),
    )


def _best(candidates: Sequence[Configuration], score: Callable[[Configuration], float]) -> Configuration:
    """The first of the best. A score that is not a number loses to every other."""
    return max(candidates, key=lambda candidate: -math.inf if math.isnan(score(candidate)) else score(candidate))


def _configuration(runs: Sequence[Run]) -> Configuration:
    runs = sorted(runs, key=lambda run: run.seed)
    clean = [run.test_clean for run in runs if run.test_clean is not None]
    return Configuration(
        group=runs[0].group,
        label=runs[0].label,
        seeds=tuple(run.seed for run in runs),
        choices=runs[0].choices,
        dev=Estimate.of(run.dev for run in runs),
        test=Estimate.of(run.test for run in runs),
        test_clean=Estimate.of(clean) if len(clean) == len(runs) else None,
        majority=sum(run.majority for run in runs),
        steps=fmean(run.steps for run in runs),
        examples=fmean(run.examples for run in runs),
        tokens=fmean(run.tokens for run in runs),
        seconds=fmean(run.seconds for run in runs),
    )


def _differing(chosen: Configuration, candidates: Sequence[Configuration]) -> dict[str, str]:
    return {
        key: value
        for key, value in chosen.choices.items()
        if any(candidate.choices.get(key) != value for candidate in candidates)
    }


# --- report.significance: Paired t-test over matching seeds (semantics section 5).


def paired_p_value(configuration: Configuration, baseline: Configuration) -> float | None:
    """Two-sided p-value of `mean(test difference) = 0` over the seeds that both have.

    With differences d_i over m common seeds, t = mean(d) / (sd(d) / sqrt(m)) with m - 1 degrees of freedom. None with
    fewer than two common seeds, or where all differences are equal and t is not defined.
    """
    ours = dict(zip(configuration.seeds, configuration.test.values, strict=True))
    theirs = dict(zip(baseline.seeds, baseline.test.values, strict=True))
    common = sorted(ours.keys() & theirs.keys())
    differences = [ours[seed] - theirs[seed] for seed in common]
    if len(common) < 2 or max(differences) - min(differences) <= 1e-12:
        return None
    # Imported where it is needed: it takes longer to import than the rest of a table to make.
    from scipy import stats

    p = float(stats.ttest_rel([ours[seed] for seed in common], [theirs[seed] for seed in common]).pvalue)
    return None if math.isnan(p) else p
