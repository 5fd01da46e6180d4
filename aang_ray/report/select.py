"""Which configuration of a row is reported (semantics section 5): the one with the best mean dev score over seeds."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from aang_ray.report.runs import Run


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
