"""What a sweep has to do: its cells, which of them are done, and how long the rest may take."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import ValidationError

from aang_ray.config import RunConfig
from aang_ray.store import Status

State = Literal["done", "failed", "cut", "waiting"]
"""`cut`: a scheduler ended it early, and its checkpoint waits."""


@dataclass(frozen=True)
class PlannedCell:
    """One run of the sweep, resolved, with what the store knows about it."""

    config: RunConfig
    cell: str
    state: State

    @property
    def steps(self) -> int:
        """Optimiser steps at most; early stopping may end it sooner."""
        return self.config.total_steps

    @property
    def work(self) -> int:
        """Texts that go forward and backward through the body: steps x (end task + auxiliary + dev), in every stage.

        The unit of the time estimate. The fit of the dev head is forward alone and left out.
        """
        config, batch = self.config, self.config.batch
        texts = batch.end_task or 0
        if config.method.auxiliary:
            texts += batch.auxiliary or 0
        if config.method.uses_dev:
            texts += batch.dev
        final = config.final_finetune.steps * (batch.end_task or 0) if config.final_finetune is not None else 0
        return config.method.pretraining_texts + (config.schedule.steps or 0) * texts + final

    @property
    def task(self) -> str:
        """The task without the folders that lead to it."""
        return self.config.task_name

    @property
    def title(self) -> str:
        """Task, row and seed, as a person names a run."""
        return f"{self.task} · {self.config.row_name} · seed {self.config.seed}"


def plan(
    runs: Sequence[RunConfig],
    seeds: Sequence[int],
    status: Mapping[str, Status],
    resolve: Callable[[RunConfig], RunConfig],
) -> list[PlannedCell]:
    """Resolve each run once and lay it out over the seeds, seeds varying slowest, cells that coincide dropped.

    Seeds vary slowest so that a sweep that is cut short holds whole seeds of every method. What
    `resolve` fills in does not depend on the seed.
    """
    resolved = [resolve(run) for run in runs]
    cells: dict[str, PlannedCell] = {}
    for seed in seeds:
        for run in resolved:
            config = run.model_copy(update={"seed": seed})
            cell = config.cell
            if cell not in cells:
                cells[cell] = PlannedCell(config, cell, status.get(cell, "waiting"))
    return list(cells.values())


def to_run(cells: Iterable[PlannedCell], *, keep_failed: bool) -> list[PlannedCell]:
    """The cells that are not done; without those that failed before, where they are to be kept so."""
    return [cell for cell in cells if cell.state != "done" and not (keep_failed and cell.state == "failed")]


def seconds_per_text(config: RunConfig, finished: Iterable[Mapping[str, Any]]) -> float | None:
    """Mean seconds a text from finished rows of the same encoder, of the same row where there are any; else None.

    `finished` holds `row`, `config` (a mapping), `seconds` and `steps` of done cells. A row whose configuration this
    version would refuse has no say.
    """
    same_row: list[tuple[float, int]] = []
    others: list[tuple[float, int]] = []
    encoder = config.model_dump(mode="json")["encoder"]
    for row in finished:
        if row["config"]["encoder"] != encoder or not row["steps"]:
            continue
        try:
            past = RunConfig.model_validate(row["config"])
        except ValidationError:
            continue
        work = PlannedCell(past, "", "done").work * row["steps"] // max(past.total_steps, 1)
        (same_row if row["row"] == config.row_name else others).append((row["seconds"], work))
    chosen = same_row or others
    total = sum(work for _, work in chosen)
    return sum(seconds for seconds, _ in chosen) / total if total else None
