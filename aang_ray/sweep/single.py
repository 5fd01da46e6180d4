"""`aang train` as a function: one cell, in this process or on a group of workers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from rich.console import Console

from aang_ray.config import RunConfig
from aang_ray.store import CellRecord, HistoryRow, Scores, Store
from aang_ray.sweep.capacity import Capacity
from aang_ray.sweep.cluster import ray_cluster
from aang_ray.sweep.needs import Need
from aang_ray.sweep.progress import duration
from aang_ray.sweep.run import check_fits


def train_once(config: RunConfig, store: Store, console: Console, export: Path | None = None) -> CellRecord:
    """Run one cell, from its checkpoint if it has one, print its evaluations and scores, and write its row.

    A cell that is done is only shown, unless its model is wanted: `export` is a folder that takes it.

    Raises:
        UserError: for a task or an encoder that is not as it should be.
    """
    from aang_ray.train.checkpoint import checkpoint_folder, discard
    from aang_ray.train.plan import resolve

    config = resolve(config)
    checkpoints = checkpoint_folder(store.uri)
    done = store.done().get(config.cell) == "done"
    if done and export is None:
        console.print(f"cell {config.cell} is done already, from the store:")
        record = store.record(config.cell)
    else:
        store.check_writable()
        console.print(f"cell {config.cell}: {config.row_name}, seed {config.seed}, at most {config.total_steps} steps")

        def evaluated(row: HistoryRow) -> None:
            share, said = f"step {row.step}/{config.total_steps}", _losses(row.losses)
            if row.dev is not None:
                said = f"dev {_scores(row.dev)}"
            console.print(f"{share} · {said} · {duration(row.seconds)}", markup=False, highlight=False)

        record = _run(config, checkpoints, evaluated, export)
        if not done:
            store.write(record)
        if record.result.status == "done":
            discard(checkpoints, config.cell)
    show_scores(record, console)
    return record


def _run(
    config: RunConfig, checkpoints: str, evaluated: Callable[[HistoryRow], None], export: Path | None
) -> CellRecord:
    """One worker needs no Ray; several are actors of the cluster of RAY_ADDRESS, or of one on this machine."""
    if config.resources.workers == 1:
        from aang_ray.train.run import run_cell

        return run_cell(config, on_evaluation=evaluated, checkpoints=checkpoints, export=export)
    with ray_cluster():
        from aang_ray.train.workers.launch import launch

        check_fits([Need.of(config)], Capacity())
        threads = config.resources.threads or max(1, int(config.resources.cpus_per_worker))
        config = config.model_copy(update={"resources": config.resources.model_copy(update={"threads": threads})})
        return launch(config, on_evaluation=evaluated, checkpoints=checkpoints, export=export)


def show_scores(record: CellRecord, console: Console) -> None:
    """The scores of a cell, a line each; nothing for a failed one."""
    row = record.result
    views = {
        "dev before the final fine-tuning": row.dev_before,
        "test before the final fine-tuning": row.test_before,
        "dev": row.dev,
        "test": row.test,
        "test without texts of train or dev": row.test_clean,
    }
    for name, scores in views.items():
        if scores is not None:
            classes = ", ".join(f"{label} {count}" for label, count in scores.per_class.items())
            console.print(f"{name}: {_scores(scores)}, {scores.examples} examples ({classes})", highlight=False)
    if row.test_clean_low is not None and row.test_clean_high is not None:
        interval = f"{100 * row.test_clean_low:.2f} to {100 * row.test_clean_high:.2f}"
        console.print(f"95 % of resampled such tests lie between {interval} {row.metric}", highlight=False)
    if row.majority:
        console.print("warning: dev never left what the majority class scores")
    if row.status == "done":
        console.print(
            f"best step {row.best_step} of {row.steps}, {duration(row.seconds)}, {row.device}, {row.precision}"
        )


def _losses(losses: Mapping[str, float]) -> str:
    return ", ".join(f"loss of {name} {loss:.3f}" for name, loss in losses.items())


def _scores(scores: Scores) -> str:
    return f"accuracy {100 * scores.accuracy:.2f}, macro-F1 {100 * scores.macro_f1:.2f}"
