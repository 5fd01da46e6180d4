"""Weights that earlier runs found, for a new run that keeps them fixed: search first, then train.

As in architecture search, what a search learned on the way is not what it would have trained best: the weights of its
last half are averaged, small ones are dropped, and a fresh run trains with the rest.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from aang_ray.config.methods import WeightsConfig
from aang_ray.config.run import RunConfig
from aang_ray.errors import UserError
from aang_ray.store import Store

DIGITS = 6
"""Decimal places of the weights, so that rounding in the mean does not decide the name of a run."""
_SAME = ("train_size", "split_seed", "dev_fraction", "test_fraction")
"""Settings of the data that must be the same, beside its content."""


def found_weights(config: RunConfig, wanted: WeightsConfig) -> WeightsConfig:
    """Return the weights that the runs of a row found, as numbers.

    The runs are those of the row's configuration with the best mean dev score, as in the table. In each, the weights
    of the logged steps t > T/2 are averaged, T being the last one; an objective that a step did not sample has no
    weight there. Then the runs are averaged. The objectives' weights are normalised to sum to 1, those below
    `drop_below` are dropped, and the rest is normalised again.

    Args:
        config: The new run, with the fingerprint of its data.
        wanted: Names the store and the row.

    Raises:
        UserError: If the store has no such runs on the same data, if they logged no weights, or if all are dropped.
    """
    store = Store(wanted.store or "")
    if not store.exists():
        raise UserError(f"method.weights.from: there is no store at {store.uri}; run the search first")
    cells = _chosen(store, config, wanted.row or "")
    logged: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in store.weights(cells).to_pylist(maps_as_pydicts="strict"):
        logged[row["cell"]].append(row)
    if not any(row["weights"] for rows in logged.values() for row in rows):
        raise UserError(f"method.weights.row: the runs of {wanted.row} in {store.uri} logged no weights of objectives")
    late = [_last_half(logged[cell]) for cell in sorted(logged)]
    objectives = _normalised(_means([_means([row["weights"] for row in rows]) for rows in late]))
    kept = {key: share for key, share in objectives.items() if share > 0 and share >= wanted.drop_below}
    if not kept:
        best = max(objectives, key=lambda key: objectives[key])
        raise UserError(
            f"method.weights.drop_below: {wanted.drop_below:g} drops all objectives; "
            f"the largest share is {objectives[best]:.3f}, of {best}"
        )
    end_task = fmean(fmean(row["end_task_weight"] for row in rows) for rows in late)
    rounded = {key: round(share, DIGITS) for key, share in sorted(_normalised(kept).items())}
    given = {"end_task": round(end_task, DIGITS), "objectives": rounded}
    return WeightsConfig.model_validate(wanted.model_dump() | given)


def _chosen(store: Store, config: RunConfig, row: str) -> list[str]:
    """Return the cells of the row's best configuration on the run's data: most seeds first, then the best mean dev."""
    names = ["cell", "group", "row", "n", "task", "status", "config", "dev_score"]
    done = [line for line in store.results(names).to_pylist() if line["status"] == "done"]
    task = config.task_name
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in done:
        short = line["row"].removesuffix(f" n={line['n']}")
        if row in (line["row"], short) and line["task"] == task and _same_data(json.loads(line["config"]), config):
            groups[line["group"]].append(line)
    if not groups:
        there = sorted({f"{line['row']} on {line['task']}" for line in done}) or ["none"]
        raise UserError(
            f"method.weights.row: store {store.uri} has no finished run of {row} on {task} with the same data; "
            f"finished rows: {', '.join(there)}"
        )
    best = max(groups, key=lambda group: (len(groups[group]), fmean(x["dev_score"] for x in groups[group]), group))
    return [line["cell"] for line in groups[best]]


def _same_data(stored: Mapping[str, Any], config: RunConfig) -> bool:
    """Return whether a stored run had the data of this one."""
    same = all(stored["data"].get(name) == getattr(config.data, name) for name in _SAME)
    return same and bool(stored["fingerprints"]["data"] == config.fingerprints.data)


def _last_half(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    last = max(row["step"] for row in rows)
    return [row for row in rows if 2 * row["step"] > last]


def _means(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the mean of each key over the rows that have it."""
    values: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        for key, value in row.items():
            values[key].append(value)
    return {key: fmean(of_key) for key, of_key in values.items()}


def _normalised(weights: Mapping[str, float]) -> dict[str, float]:
    """Return the shares of weights in their sum. Negative ones count as 0."""
    total = sum(max(0.0, weight) for weight in weights.values())
    return {key: max(0.0, weight) / total if total else 0.0 for key, weight in weights.items()}
