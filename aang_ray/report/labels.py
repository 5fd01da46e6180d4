"""Names of a table's columns."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from aang_ray.report.runs import NAMES, Run

_SHORT = 12  # characters of a fingerprint that tell it from others


def column_labels(runs: Sequence[Run]) -> dict[str, str]:
    """The label of each run's column, by cell.

    Runs on the same task stand in one column if they solve the same problem: same data, encoder and metric. Where
    they do not, the label adds the settings that differ, for example `movie (train_size=100)`.
    """
    by_task: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        by_task[run.task].append(run)
    labels = {}
    for task, members in by_task.items():
        keys = sorted({key for run in members for key in run.problem})
        differing = [key for key in keys if len({run.problem.get(key) for run in members}) > 1]
        for run in members:
            parts = [part for key in differing for part in _parts(key, run, members)]
            labels[run.cell] = f"{task} ({', '.join(parts)})" if parts else task
    return labels


def _parts(key: str, run: Run, members: Sequence[Run]) -> list[str]:
    """`name=value`; for a fingerprint the names behind it, if they differ, tell more than its digits."""
    names = [name for name in NAMES.get(key, ()) if len({other.settings.get(name) for other in members}) > 1]
    # Different content may stand behind the same names: then only the digits tell the columns apart.
    by_names = {tuple(other.settings.get(name) for name in names) for other in members}
    if names and len(by_names) == len({other.problem.get(key) for other in members}):
        return [f"{_last(name)}={run.settings.get(name, '')}" for name in names]
    return [f"{_last(key)}={run.problem.get(key, '')[:_SHORT]}"]


def _last(key: str) -> str:
    return key.rpartition(".")[2]
