"""What a sweep has to do: its cells, which of them are done, what a trial needs, and how long it may take."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from aang_ray.config import RunConfig
from aang_ray.config.methods import HalvingConfig
from aang_ray.store import Status, Store
from aang_ray.sweep.spec import SearchSpec

State = Literal["done", "failed", "cut", "waiting"]
"""`cut`: a scheduler ended the run early, and its checkpoint is kept."""

OWN_CPUS = 0.0001
"""What the process of a trial with several workers reserves: it only waits for them. The least that Ray counts."""

WORKERS_SHARE = 0.99
"""Share of `cpus_per_worker` that is reserved. A node full of workers keeps 1 % of its CPUs free, which is room for the
processes of 100 trials a CPU."""


START_SECONDS = 20.0
"""Ray and its first processes start in this time, on two cores."""


@dataclass(frozen=True)
class PlannedCell:
    """One resolved run of the sweep, and its state in the store when the sweep was planned."""

    config: RunConfig
    cell: str
    state: State
    variant: str = ""
    """The settings that tell it from cells of the same row, task and seed: `method.aux_lr=0.1`; empty without such."""

    @property
    def steps(self) -> int:
        """Optimiser steps at most; early stopping may end the run sooner."""
        return self.config.total_steps

    @property
    def work(self) -> int:
        """Texts that go forward and backward through the body: steps x (end task + auxiliary + dev), in every stage.

        The unit of all estimates of time. Fitting the dev head is forward alone and not counted.
        """
        config, batch = self.config, self.config.batch
        texts = batch.end_task or 0
        if config.method.auxiliary:
            texts += batch.auxiliary or 0
        if config.method.uses_dev:
            texts += batch.dev
        final = config.final_finetune.steps * (batch.end_task or 0) if config.final_finetune is not None else 0
        before = config.method.pretraining_texts
        if isinstance(config.method, HalvingConfig):
            trial = (batch.end_task or 0) + (config.method.batch or batch.auxiliary or 0)
            before = config.method.pretraining_steps * trial
        return before + config.train_steps * texts + final

    @property
    def title(self) -> str:
        """Task, row, settings where needed, and seed: the name of the run in every message."""
        row = f"{self.config.row_name} ({self.variant})" if self.variant else self.config.row_name
        return f"{self.config.task_name} · {row} · seed {self.config.seed}"


def plan(
    runs: Sequence[RunConfig],
    seeds: Sequence[int],
    status: Mapping[str, Status],
    resolve: Callable[[RunConfig], RunConfig],
    variant: str | None = None,
) -> list[PlannedCell]:
    """Lay runs out over the seeds; of runs with the same cell the first is kept.

    Seeds vary slowest, so that a sweep that is cut short holds whole seeds of every method.

    Args:
        runs: The runs of the sweep file.
        seeds: The seeds of every run.
        status: State of the cells that have a row in the store.
        resolve: Fills in what a run leaves open. It is called once a run, because nothing of it depends on the seed.
        variant: What tells these cells from others of the same row; None: the settings in which the runs differ.
    """
    resolved = [resolve(run) for run in runs]
    variants = [variant] * len(resolved) if variant is not None else _variants(resolved)
    cells: dict[str, PlannedCell] = {}
    for seed in seeds:
        for run, told in zip(resolved, variants, strict=True):
            config = run.model_copy(update={"seed": seed})
            cell = config.cell
            if cell not in cells:
                cells[cell] = PlannedCell(config, cell, status.get(cell, "waiting"), told)
    return list(cells.values())


def _variants(runs: Sequence[RunConfig]) -> list[str]:
    """For each run, the settings in which it differs from other cells of the same task and row."""
    settings = [dict(_flat(_settings(run))) for run in runs]
    rows: dict[tuple[str, str], list[dict[str, str]]] = defaultdict(list)
    for run, own in zip(runs, settings, strict=True):
        rows[run.task_name, run.row_name].append(own)
    texts = []
    for run, own in zip(runs, settings, strict=True):
        others = rows[run.task_name, run.row_name]
        keys = sorted({key for one in others for key in one.keys() | own.keys() if one.get(key) != own.get(key)})
        texts.append(", ".join(f"{key}={own.get(key, 'default')}" for key in keys))
    return texts


def _settings(run: RunConfig) -> dict[str, Any]:
    """Return what determines the result, by the names that a person gave."""
    settings = run.identity()
    del settings["fingerprints"]
    settings["data"]["task"], settings["encoder"]["name"] = run.data.task, run.encoder.name
    return settings


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value)


def to_run(cells: Iterable[PlannedCell], *, keep_failed: bool) -> list[PlannedCell]:
    """The cells that are not done; with `keep_failed` also without those that failed before."""
    return [cell for cell in cells if cell.state != "done" and not (keep_failed and cell.state == "failed")]


@dataclass(frozen=True, order=True)
class Need:
    """The resources of one trial."""

    workers: int
    cpus: float
    """CPUs of each worker, as asked for."""
    gpus: float
    """GPUs of each worker."""

    @classmethod
    def of(cls, config: RunConfig) -> Need:
        resources = config.resources
        if resources.workers == 1:
            return cls(1, resources.cpus, resources.gpus)
        return cls(resources.workers, resources.cpus_per_worker, resources.gpus_per_worker)

    @property
    def nested(self) -> bool:
        """Whether the workers are further processes, which the trial's own process starts."""
        return self.workers > 1

    @property
    def worker_cpus(self) -> float:
        """What Ray reserves of each worker's CPUs."""
        return round(WORKERS_SHARE * self.cpus, 4) if self.nested else self.cpus

    @property
    def trial(self) -> dict[str, float]:
        """What Tune reserves for the trial's own process."""
        return {"cpu": OWN_CPUS, "gpu": 0.0} if self.nested else {"cpu": self.cpus, "gpu": self.gpus}

    @property
    def bundles(self) -> list[dict[str, float]]:
        """What must be free at once, each bundle on one node."""
        worker = {"CPU": self.worker_cpus} | ({"GPU": self.gpus} if self.gpus else {})
        return [worker] * self.workers

    def held_by(self, nodes: Iterable[Mapping[str, float]]) -> int:
        """How many such trials the nodes hold at once: whole workers a node, `workers` of them a trial."""
        worker = self.bundles[0]
        found = (min(int(node.get(name, 0.0) / amount + 1e-9) for name, amount in worker.items()) for node in nodes)
        return sum(found) // self.workers

    def __str__(self) -> str:
        each = amounts({"CPU": self.cpus} | ({"GPU": self.gpus} if self.gpus else {}))
        return f"{self.workers} workers of {each} each" if self.nested else each


def amounts(resources: Mapping[str, float]) -> str:
    """`4 CPU and 1 GPU`, and other resources after them."""
    names = sorted(resources, key=lambda name: (name not in ("CPU", "GPU"), name))
    return " and ".join(f"{resources[name]:g} {name}" for name in names)


def trials_at_once(needs: Sequence[Need], nodes: Sequence[Mapping[str, float]]) -> int:
    """How many trials run side by side: as many as the nodes hold of the smallest, at most all; at least 1."""
    return max(1, min(len(needs), max(need.held_by(nodes) for need in set(needs))))


def preview(cells: Sequence[PlannedCell], store: Store, console: Console, *, keep_failed: bool) -> None:
    """Print the cells with their state, the steps that are left and, where the store has a measure, the time.

    The estimate is (texts left) x (seconds a text) / (trials that this machine holds at once) + Ray's start. With early
    stopping it is an upper bound.
    """
    import torch

    left = to_run(cells, keep_failed=keep_failed)
    table = Table("task", "row", "seed", "cell", "steps", "state")
    for cell in cells:
        config = cell.config
        row = f"{config.row_name} ({cell.variant})" if cell.variant else config.row_name
        table.add_row(config.task_name, row, str(config.seed), cell.cell, f"{cell.steps:,}", cell.state)
    console.print(table)
    steps, texts = sum(cell.steps for cell in left), sum(cell.work for cell in left)
    console.print(f"{len(cells)} cells, {len(left)} to run: {steps:,} steps at most, {texts:,} texts through the body")
    if not left:
        return
    columns = ["status", "row", "config", "steps", "seconds"]
    rows = (row for row in store.results(columns).to_pylist() if row["status"] == "done")
    finished = [{**row, "config": json.loads(row["config"])} for row in rows]
    seconds = 0.0
    for cell in left:
        rate = seconds_per_text(cell.config, finished)
        if rate is None:
            console.print("time: unknown until a first cell with this encoder has finished; then the sweep shows it")
            return
        seconds += cell.work * rate
    machine = {"CPU": float(len(os.sched_getaffinity(0))), "GPU": float(torch.cuda.device_count())}
    at_once = trials_at_once([Need.of(cell.config) for cell in left], [machine])
    total = duration(seconds / at_once + START_SECONDS)
    told = f"time: at most about {total} at {at_once} trials at once, Ray's start included, by the rows in the store"
    console.print(told, soft_wrap=True)


def preview_search(runs: Sequence[RunConfig], spec: SearchSpec, seeds: Sequence[int], console: Console) -> None:
    """Print how many configurations a search asks for and from which values; which ones depends on results."""
    for run in runs:
        console.print(
            f"{run.task_name} · {run.row_name}: {spec.samples} configurations x {len(seeds)} seeds", highlight=False
        )
    for key, values in spec.space.items():
        console.print(f"  {key}: {values}", markup=False, highlight=False)


def seconds_per_text(config: RunConfig, finished: Iterable[Mapping[str, Any]]) -> float | None:
    """Mean seconds a text of finished rows with the same encoder, of the same row where there are any; else None.

    Args:
        config: The run whose time is estimated.
        finished: `row`, `config` (a mapping), `seconds` and `steps` of done cells. A row whose configuration is not
            valid in this version is left out.
    """
    same_row: list[tuple[float, int]] = []
    others: list[tuple[float, int]] = []
    encoder = config.model_dump(mode="json")["encoder"]
    for row in finished:
        if row["config"]["encoder"] != encoder or not row["steps"]:
            continue
        try:
            past = RunConfig.stored(row["config"])
        except ValidationError:
            continue
        work = PlannedCell(past, "", "done").work * row["steps"] // max(past.total_steps, 1)
        (same_row if row["row"] == config.row_name else others).append((row["seconds"], work))
    chosen = same_row or others
    total = sum(work for _, work in chosen)
    return sum(seconds for seconds, _ in chosen) / total if total else None


def duration(seconds: float) -> str:
    """Seconds for a person: `42 s`, `3 min 05 s`, `2 h 10 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
