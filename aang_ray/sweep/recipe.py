"""`aang try`: from a folder of labelled texts to an answer and a model, without a setting."""

from __future__ import annotations

import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import yaml
from rich.console import Console

from aang_ray.config import RunConfig
from aang_ray.config.sections import DataConfig
from aang_ray.data.modalities import modality_of
from aang_ray.data.pretrained import PACKAGED
from aang_ray.data.sources import find_source
from aang_ray.data.tasks import TEXT
from aang_ray.errors import UserError
from aang_ray.store import CellRecord, Store
from aang_ray.sweep.cluster import own_cluster
from aang_ray.sweep.command import SweepOutcome, sweep_file, train_once
from aang_ray.sweep.plan import Need, PlannedCell, duration, plan, trials_at_once
from aang_ray.sweep.spec import SweepOverrides, expand, load_sweep

RECIPE: Mapping[str, Any] = {
    "base": {
        "encoder": {"name": PACKAGED, "layers": 3},
        "n": 6,
        "batch": {"end_task": 32, "auxiliary": 48},
        "schedule": {"steps": 150, "eval_every": 15},
    },
    "methods": ["finetune", "static", "aang"],
    "seeds": [0, 1, 2],
}
"""What is tried; `space` is added, by the text that is given."""
_SHOWN = 3


def try_task(
    task: str, overrides: SweepOverrides, store: Store, console: Console, *, dry_run: bool = False
) -> SweepOutcome | None:
    """Compare fine-tuning with auxiliary objectives on a task, print the answer, and write the best model.

    Args:
        task: A folder, a file, or whatever else `data.task` may name.
        overrides: What the command line changes about the recipe.
        store: Where rows, checkpoints and the model are.
        console: Where all is printed.
        dry_run: Only say what would be done.

    Returns:
        How the runs ended; None after a dry run.

    Raises:
        UserError: The task or a setting is not valid.
    """
    data = DataConfig(task=task)
    if (modality := modality_of(data)) != TEXT:
        raise UserError(f"try: {task} is a task of {modality}; use `aang sweep jobs/digits.yaml`")
    space = "td_ed" if "in_domain" in find_source(data).corpora else "td"
    mapping = {**RECIPE, "base": {**RECIPE["base"], "space": space}, "tasks": [task]}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "try.yaml"
        file.write_text(yaml.safe_dump(mapping), encoding="utf-8")
        spec = load_sweep(file, overrides)
        from aang_ray.train.plan import resolve

        cells = plan(expand(spec, overrides, "try"), spec.seeds, store.done(), resolve)
        if not dry_run:
            for line in _intention(cells):
                console.print(line, markup=False, highlight=False, soft_wrap=True)
        outcome = sweep_file(file, overrides, store, console, dry_run=dry_run)
    if outcome is None or outcome.exit_code:
        return outcome
    records = [store.record(cell.cell) for cell in cells]
    best = max(_rows(records).values(), key=_mean_dev)
    for line in ("", *_answer(records, best), *_objectives(records)):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    chosen = max(best, key=lambda record: _score(record, "dev"))
    model = (Path("models") if "://" in store.uri else Path(store.uri) / "models") / cells[0].config.task_name
    config = next(cell.config for cell in cells if cell.cell == chosen.result.cell)
    train_once(config, store, Console(quiet=True), model)
    console.print(
        f"The model of {chosen.result.row}, seed {chosen.result.seed}, is in {model}. To use it: "
        f"`aang predict {model} --input FILE`, or in Python "
        f'aang_ray.load_classifier("{model}").predict(["a text", "another"])',
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    return outcome


def _intention(cells: Sequence[PlannedCell]) -> Iterator[str]:
    """Say what will be done, then how long it takes, measured on two steps of each method after a first one."""
    left = [cell for cell in cells if cell.state != "done"]
    text = f"{len(cells)} runs ({', '.join(dict.fromkeys(cell.config.row_name for cell in cells))}), {len(left)} to do"
    yield text
    if not left or not own_cluster():
        return
    cores = len(os.sched_getaffinity(0))
    at_once = trials_at_once([Need.of(cell.config) for cell in left], [{"CPU": float(cores)}])
    rates: dict[str, float] = {}
    for cell in left:
        if cell.config.row_name not in rates:
            yield f"timing three steps of {cell.config.row_name}"
            rates[cell.config.row_name] = seconds_a_step(cell.config, cores // at_once)
    seconds = sum(cell.steps * rates[cell.config.row_name] for cell in left) / at_once
    last = max(cell.steps * rates[cell.config.row_name] for cell in left)  # the run that writes the model
    yield f"time: at most about {duration(seconds + last)} on {cores} cores"


def seconds_a_step(config: RunConfig, threads: int) -> float:
    """Return the seconds that a step of a resolved run takes here: the mean of two steps after a first one."""
    from aang_ray.train.device import choose_compute
    from aang_ray.train.rounds import make_stepper
    from aang_ray.train.setup import build

    resources = config.resources.model_copy(update={"threads": max(threads, 1)})
    config = config.model_copy(update={"resources": resources})
    stepper = make_stepper(build(config, choose_compute(config)))
    stepper.step(stepper.prepare(0))
    began = time.perf_counter()
    for step in (1, 2):
        stepper.step(stepper.prepare(step))
    return (time.perf_counter() - began) / 2


def _rows(records: Sequence[CellRecord]) -> dict[str, list[CellRecord]]:
    rows: dict[str, list[CellRecord]] = defaultdict(list)
    for record in records:
        rows[record.result.row].append(record)
    return rows


def _score(record: CellRecord, split: str) -> float:
    return float(getattr(getattr(record.result, split), record.result.metric))


def _mean_dev(records: Sequence[CellRecord]) -> float:
    return mean(_score(record, "dev") for record in records)


def _answer(records: Sequence[CellRecord], best: Sequence[CellRecord]) -> list[str]:
    """Say in words which row is best by dev, and how it compares with fine-tuning on test, seed by seed."""
    rows = _rows(records)
    plain = {record.result.seed: record for record in rows.pop("finetune")}
    other = best if best[0].result.method != "finetune" else max(rows.values(), key=_mean_dev)
    result = other[0].result
    differences = [_score(record, "test") - _score(plain[record.result.seed], "test") for record in other]
    ours, base = (100 * mean(_score(record, "test") for record in part) for part in (other, plain.values()))
    wins = sum(difference > 0 for difference in differences)
    verdict = "is worth it" if other is best else "is not worth it"
    return [
        f"On {result.task}, by dev, {result.row} {verdict}: its {result.metric} on test is {ours:.2f} %, that of plain "
        f"fine-tuning {base:.2f} % ({100 * mean(differences):+.2f}, better in {wins} of {len(other)} seeds).",
        f"{len(other)} seeds are few: `--seeds 0-9` runs more, and keeps these.",
    ]


def _objectives(records: Sequence[CellRecord]) -> list[str]:
    """Say which objectives the learned weights favoured: their mean weight over time and seeds."""
    weights: dict[str, list[float]] = defaultdict(list)
    for record in records:
        for row in record.weights if record.result.method == "aang" else ():
            for name, weight in row.weights.items():
                weights[name].append(weight)
    if len(weights) < 2:
        return []
    order = sorted(weights, key=lambda name: -mean(weights[name]))
    most, least = (
        [f"{name} ({mean(weights[name]):.3f})" for name in part] for part in (order[:_SHOWN], order[-_SHOWN:])
    )
    return [f"The learned weights favoured {', '.join(most)}; least weight had {', '.join(reversed(least))}."]
