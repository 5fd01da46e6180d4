"""What a sweep would do, without doing it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from aang_ray.config import RunConfig
from aang_ray.store import Store
from aang_ray.sweep.needs import Need, trials_at_once
from aang_ray.sweep.plan import PlannedCell, seconds_per_text, to_run
from aang_ray.sweep.progress import duration
from aang_ray.sweep.search_space import SearchSpec


def preview(cells: Sequence[PlannedCell], store: Store, console: Console, *, keep_failed: bool) -> None:
    """Print the cells with their state, the steps that are left and, where the store has a measure, the time.

    The estimate: texts left x seconds a text of finished rows (see `seconds_per_text`), over the trials that
    this machine holds at once. Early stopping makes it an upper bound.
    """
    left = to_run(cells, keep_failed=keep_failed)
    console.print(_table(cells))
    steps = sum(cell.steps for cell in left)
    texts = sum(cell.work for cell in left)
    console.print(f"{len(cells)} cells, {len(left)} to run: {steps:,} steps at most, {texts:,} texts through the body")
    if not left:
        return
    finished = [_measured(row) for row in store.results().to_pylist() if row["status"] == "done"]
    rates = [seconds_per_text(cell.config, finished) for cell in left]
    known = [cell.work * rate for cell, rate in zip(left, rates, strict=True) if rate is not None]
    if len(known) < len(left):
        console.print(
            "time: unknown until a first cell with this encoder has finished; the sweep then shows what is left"
        )
        return
    at_once = trials_at_once([Need.of(cell.config) for cell in left], [this_machine()])
    console.print(
        f"time: at most about {duration(sum(known) / at_once)} at {at_once} trials at once, by the rows in the store"
    )


def preview_search(runs: Sequence[RunConfig], spec: SearchSpec, seeds: Sequence[int], console: Console) -> None:
    """Print what a search would ask for: its configurations depend on results, so they are not known before."""
    for run in runs:
        console.print(
            f"{run.task_name} · {run.row_name}: {spec.samples} configurations x {len(seeds)} seeds", highlight=False
        )
    for key, values in spec.space.items():
        console.print(f"  {key}: {values}", markup=False, highlight=False)


def this_machine() -> dict[str, float]:
    """CPUs and GPUs of this machine, as Ray would count them, without starting Ray."""
    import torch

    return {"CPU": float(len(os.sched_getaffinity(0))), "GPU": float(torch.cuda.device_count())}


def _table(cells: Sequence[PlannedCell]) -> Table:
    table = Table("task", "row", "seed", "cell", "steps", "state")
    for cell in cells:
        config = cell.config
        columns = (cell.task, config.row_name, str(config.seed), cell.cell, f"{cell.steps:,}", cell.state)
        table.add_row(*columns)
    return table


def _measured(row: Mapping[str, Any]) -> dict[str, Any]:
    return {**row, "config": json.loads(row["config"])}
