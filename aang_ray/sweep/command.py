"""`aang sweep` and `aang train` as functions: from a file or a configuration to rows in the store."""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from aang_ray.config import RunConfig, parse_config
from aang_ray.config.sections import ResourcesConfig
from aang_ray.data.modalities import modality_of
from aang_ray.data.tasks import TEXT
from aang_ray.errors import UserError
from aang_ray.store import CellRecord, HistoryRow, ResultRow, Scores, Store, WeightRow
from aang_ray.store.upkeep import compact_if_many
from aang_ray.sweep.cluster import check_fits, own_cluster, ray_cluster, set_environment
from aang_ray.sweep.plan import Need, PlannedCell, duration, plan, preview, preview_search, to_run
from aang_ray.sweep.progress import Evaluation, SweepProgress
from aang_ray.sweep.spec import Asha, SweepOverrides, SweepSpec, check_space, expand, load_sweep
from aang_ray.sweep.status import others_at_work
from aang_ray.sweep.trial import outcome as end_of
from aang_ray.train.record import Heartbeat, take_rows, write_row

if TYPE_CHECKING:
    from aang_ray.sweep.track import Tracking
    from aang_ray.sweep.tune import Ends


@dataclass(frozen=True)
class SweepOutcome:
    """How a sweep ended."""

    cells: int
    done: int
    """Cells with a done row, those of earlier sweeps included."""
    cut: int
    """Cells that the scheduler of this sweep cut short."""
    failed: Mapping[str, str]
    """Title of each failed cell -> its error."""
    groups: frozenset[str] = frozenset()
    """Its configurations, without seeds."""

    @property
    def remaining(self) -> int:
        """Cells that would still have to run."""
        return self.cells - self.done - self.cut - len(self.failed)

    @property
    def exit_code(self) -> int:
        """0 when every cell is done or was cut short on purpose, else 1."""
        return 0 if self.done + self.cut == self.cells else 1


def sweep_file(
    path: Path,
    overrides: SweepOverrides,
    store: Store,
    console: Console,
    *,
    dry_run: bool = False,
    keep_failed: bool = False,
    max_hours: float | None = None,
    asha: Asha | None = None,
    is_preset: bool = False,
    keep_models: bool = False,
    track: Sequence[str] = (),
    described: bool = False,
) -> SweepOutcome | None:
    """Run the sweep of a file, or the preset of that name, into a store, and print how it ended.

    Cells with a done row are skipped, so running the same sweep again continues where it ended.

    Args:
        path: The sweep file, or the name of a preset.
        overrides: What the command line changes.
        store: Where rows and checkpoints are.
        console: Where progress is printed.
        dry_run: Only show what the sweep would do.
        keep_failed: Do not run failed cells again.
        max_hours: End after so many hours, with the checkpoints of running cells written.
        asha: Cut runs of the less promising configurations short.
        is_preset: Whether `path` is the name of a preset.
        keep_models: Keep in the store the model of the best run of each row of the table.
        track: Experiment trackers, see `Tracking`.
        described: Whether the lines about the data were printed already.

    Returns:
        How the sweep ended; None after a dry run.

    Raises:
        UserError: The sweep, a task or an encoder is not valid.
    """
    spec = load_sweep(path, overrides, is_preset=is_preset)
    if spec.search is not None and asha is not None:
        raise UserError(f"{path}: search: does not go with --scheduler asha; choose one")
    runs = expand(spec, overrides, str(path))
    if keep_models:
        check_keeps(runs)
    from aang_ray.train.check import check_runs  # imports much: a mistake in the file was reported before
    from aang_ray.train.plan import check_n, resolve

    if not dry_run:
        take_rows(store)

    cells: list[PlannedCell] = []
    starting: dict[Any, RunConfig]
    if spec.search is None:
        for run in runs:
            check_n(run)
        cells = plan(runs, spec.seeds, store.done(), resolve)
        starting = {cell.config.group: cell.config for cell in to_run(cells, keep_failed=keep_failed)}
        key = "\n".join(sorted(cell.cell for cell in cells))
    else:
        check_space(spec.search, runs)
        starting = {run: resolve(run) for run in runs}
        key = "\n".join([*(run.group for run in runs), str(spec.seeds), spec.search.model_dump_json()])
    for line in check_runs(starting.values(), here=own_cluster()):
        if not described:
            console.print(line, markup=False, highlight=False, soft_wrap=True)
    if dry_run:
        if spec.search is None:
            preview(cells, store, console, keep_failed=keep_failed)
        else:
            preview_search(runs, spec.search, spec.seeds, console)
        return None
    for line in others_at_work(store, {cell.cell for cell in to_run(cells, keep_failed=keep_failed)}):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    store.check_writable()
    progress = SweepProgress(store.uri, path.stem, key, console)
    progress.add(cells, keep_failed=keep_failed)
    tracking = make_tracking(track, progress.line)
    with progress:
        outcome = _run_sweep(spec, runs, cells, store, progress, keep_failed, max_hours, asha, keep_models, tracking)
    if tracking is not None:
        tracking.close()
    if keep_models and outcome.done:
        from aang_ray.report.logged import best_cells
        from aang_ray.train.keep import keep_only

        kept = keep_only(store, best_cells(store))
        console.print(f"the store keeps {kept} models, of the best run of each row; `aang export` writes them")
    if packed := compact_if_many(store.uri):
        console.print(f"the store is packed: {packed[0]:,} files before, {packed[1]:,} now", highlight=False)
    report(outcome, console, max_hours)
    return outcome


def _run_sweep(
    spec: SweepSpec,
    runs: Sequence[RunConfig],
    cells: Sequence[PlannedCell],
    store: Store,
    progress: SweepProgress,
    keep_failed: bool,
    max_hours: float | None,
    asha: Asha | None,
    keep_models: bool,
    tracking: Tracking | None,
) -> SweepOutcome:
    """Run the cells of a grid, or those that Optuna asks for."""
    from aang_ray.train.checkpoint import checkpoint_folder, discard_done

    searches = None
    left = to_run(cells, keep_failed=keep_failed)
    needs = [Need.of(cell.config) for cell in left]
    if spec.search is not None:
        set_environment()
        from aang_ray.sweep.search import Searches

        searches = Searches(runs, spec.search, spec.seeds, store, progress, keep_failed=keep_failed)
        cells = list(searches.cells.values())
        if not searches.finished:
            needs = [Need.of(run) for run in runs for _ in range(spec.search.samples * len(spec.seeds))]
    done = [cell for cell in cells if cell.state == "done"]
    discard_done(checkpoint_folder(store.uri), {cell.cell for cell in done})
    known = len(cells) + progress.to_come
    progress.line(f"all {known} cells are done" if len(done) == known else f"{known} cells, {len(done)} of them done")
    ends: Ends = {}
    if needs:
        with ray_cluster() as scratch:
            from aang_ray.sweep.tune import Engine

            engine = Engine(store, progress, needs, max_hours, keep_models, tracking, scratch)
            ends = engine.run_grid(left, done, asha) if searches is None else engine.run_search(searches)
    cells = cells if searches is None else list(searches.cells.values())
    return outcome_of(cells, ends, scheduled=asha is not None, to_come=progress.to_come)


def make_tracking(track: Sequence[str], line: Callable[[str], None]) -> Tracking | None:
    """Return the trackers of these names; None for none."""
    if not track:
        return None
    from aang_ray.sweep.track import Tracking

    return Tracking(track, line)


def check_keeps(runs: Sequence[RunConfig]) -> None:
    """Check that the models of runs can be kept.

    Raises:
        UserError: A task is not one of text.
    """
    for run in runs:
        if (kind := modality_of(run.data)) != TEXT:
            raise UserError(f"--keep-models: only classifiers of text are kept; {run.data.task} is a task of {kind}")


def outcome_of(
    cells: Sequence[PlannedCell],
    ends: Ends,
    *,
    scheduled: bool = False,
    to_come: int = 0,
) -> SweepOutcome:
    """Count how the cells of a sweep ended.

    Args:
        cells: The plan.
        ends: Cell -> the last report of its trial, see `tune.Ends`.
        scheduled: Whether cells may be cut short on purpose.
        to_come: How many cells were not planned yet when the sweep ended.
    """
    now = {cell.cell: {"status": cell.state, "error": "failed before (kept)"} for cell in cells} | dict(ends)
    failed = {cell.title: str(now[cell.cell]["error"]) for cell in cells if now[cell.cell]["status"] == "failed"}
    done = sum(now[cell.cell]["status"] in ("done", "elsewhere") for cell in cells)
    # A cell with a row `cut` of an earlier start, which had no turn in this one, remains.
    cut = sum(end["status"] == "cut" for end in ends.values()) if scheduled else 0
    groups = frozenset(cell.config.group for cell in cells)
    return SweepOutcome(len(cells) + to_come, done, cut, failed, groups)


def report(outcome: SweepOutcome, console: Console, max_hours: float | None) -> None:
    """Print what failed, what was cut short, and what remains."""
    for title, error in outcome.failed.items():
        console.print(f"failed: {title}: {error}", markup=False, highlight=False, soft_wrap=True)
    if outcome.failed:
        console.print(
            "`aang status` names the cells that failed, and `aang show CELL` says more of one", highlight=False
        )
    if outcome.cut:
        console.print(
            f"{outcome.cut} cells were cut short by asha and have no test score; without --scheduler the same command "
            "runs them to their end",
            soft_wrap=True,
        )
    if outcome.remaining:
        reason = f"--max-hours {max_hours:g} is over" if max_hours is not None else "the sweep ended early"
        console.print(f"{reason}: {outcome.remaining} cells remain; run the same command again to continue")


def train_once(
    config: RunConfig, store: Store, console: Console, export: Path | None = None, track: Sequence[str] = ()
) -> CellRecord:
    """Run one cell, from its checkpoint if it has one, print its evaluations and scores, and write its row.

    A cell that is done is only shown, unless its model is wanted.

    Args:
        config: The run.
        store: Where its row and its checkpoint are.
        console: Where progress and scores are printed.
        export: A folder for the trained classifier.
        track: Experiment trackers, see `Tracking`.

    Raises:
        UserError: The task or the encoder is not valid.
    """
    from aang_ray.train.check import check_runs
    from aang_ray.train.checkpoint import CheckpointFiles, checkpoint_folder, discard
    from aang_ray.train.export import check_export
    from aang_ray.train.plan import resolve

    config = resolve(config)
    take_rows(store)
    checkpoints = checkpoint_folder(store.uri)
    done = store.done().get(config.cell) == "done"
    if done and export is None:
        console.print(f"cell {config.cell} is done already, from the store:")
        record = store.record(config.cell)
    else:
        if export is not None:
            check_export(export, config.data)
        for line in check_runs([config], here=config.resources.workers == 1 or own_cluster()):
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        for line in others_at_work(store, {config.cell}):
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        store.check_writable()
        console.print(f"cell {config.cell}: {config.row_name}, seed {config.seed}, at most {config.total_steps} steps")
        planned = PlannedCell(config, config.cell, "waiting")
        progress = SweepProgress(store.uri, "train", config.cell, console)
        tracking = make_tracking(track, progress.line)
        progress.add([planned])
        progress.update(config.cell, state="running", host=socket.gethostname())
        if step := CheckpointFiles(checkpoints, config.cell).newest_step():
            progress.resumed(config.cell, step)
            progress.update(config.cell, step=step)
        with progress:

            def evaluated(row: HistoryRow, weights: WeightRow | None) -> None:
                text = ", ".join(f"loss of {name} {loss:.3f}" for name, loss in row.losses.items())
                if row.dev is not None:
                    text = f"dev {_scores(row.dev)}"
                evaluation = Evaluation.of(config, row, weights)
                progress.evaluated(config.cell, evaluation)
                if tracking is not None:
                    tracking.evaluated(planned, evaluation)
                progress.line(f"step {row.step}/{config.total_steps} · {text} · {duration(row.seconds)}")

            def beat(sign: Heartbeat) -> None:
                progress.update(config.cell, step=sign.step, seconds=sign.seconds, loss=sign.loss)

            own = {"on_evaluation": evaluated, "on_beat": beat, "on_done": partial(write_row, store)}
            record = _run(config, checkpoints=checkpoints, export=export, **own)
            write_row(store, record)
            progress.update(config.cell, state="ended")
        if tracking is not None:
            tracking.ended(planned, end_of(record))
        if record.result.status == "done":
            discard(checkpoints, config.cell)
    show_scores(record, console)
    if export is not None and record.result.status == "done":
        from aang_ray.train.export import how_to_load

        _finish_export(export, store, record.result)
        console.print(how_to_load(export), markup=False, highlight=False, soft_wrap=True)
    return record


def _finish_export(export: Path, store: Store, result: ResultRow) -> None:
    """Write the scores of all seeds of a run's configuration into the card of its model."""
    from aang_ray.train.export import add_seeds

    rows = store.results(["cell", "group", "status"]).to_pylist()
    seeds = [row["cell"] for row in rows if (row["group"], row["status"]) == (result.group, "done")]
    if len(seeds) > 1:
        add_seeds(export, [store.record(cell).result for cell in seeds])


def export_run(cell: str, store: Store, console: Console, export: Path) -> CellRecord:
    """Write the model of a finished run: the one that the store keeps, else the run is trained again on this machine.

    Args:
        cell: Name of the run.
        store: Where its row is, which stays as it is.
        console: Where progress and scores are printed.
        export: A folder for the trained classifier.

    Returns:
        The record of the model that was written.

    Raises:
        UserError: The run is not finished, or its data, encoder or space are no longer there as they were.
    """
    from aang_ray.train.export import check_export, how_to_load
    from aang_ray.train.keep import unpack_model
    from aang_ray.train.plan import resolve

    stored = store.record(cell).result
    if stored.status != "done":
        raise UserError(f"run {cell} is {stored.status}; only the model of a finished run can be exported")
    config = parse_config(stored.config, f"run {cell}", stored=True)
    check_export(export, config.data)
    if unpack_model(store, cell, export):
        _finish_export(export, store, stored)
        console.print(how_to_load(export), markup=False, highlight=False, soft_wrap=True)
        return store.record(cell)
    # What the run had on its own machine says nothing about this one; threads matter for rounding.
    config = config.changed(resources=ResourcesConfig(threads=config.resources.threads))
    now = resolve(config)
    if now.cell != cell:
        before, after = dict(config.fingerprints), dict(now.fingerprints)
        changed = [name for name in before if before[name] != after[name]] or ["configuration"]
        raise UserError(f"run {cell}: its {' and '.join(changed)} changed since, so it cannot be trained again")
    console.print(
        f"the store keeps no model of this run: {stored.row}, seed {stored.seed}, is trained again (it took "
        f"{duration(stored.seconds)} on {stored.device})",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    record = train_once(config, store, console, export)
    if record.result.test is not None and stored.test is not None and record.result.test != stored.test:
        console.print(
            f"on this machine the result differs from the store's row, which stays: there test {_scores(stored.test)}",
            highlight=False,
            soft_wrap=True,
        )
    return record


def _run(config: RunConfig, **arguments: Any) -> CellRecord:
    """One worker needs no Ray; several are actors of the cluster of RAY_ADDRESS, or of one on this machine."""
    if config.resources.workers == 1:
        from aang_ray.train.run import run_cell

        return run_cell(config, **arguments)
    with ray_cluster():
        from aang_ray.train.workers.launch import launch

        check_fits([Need.of(config)])
        threads = config.resources.threads or max(1, int(config.resources.cpus_per_worker))
        config = config.model_copy(update={"resources": config.resources.model_copy(update={"threads": threads})})
        return launch(config, **arguments)


def show_scores(record: CellRecord, console: Console) -> None:
    """Print the scores of a cell, a line each; nothing for a failed one."""
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
            console.print(f"{name}: {_scores(scores)}, {scores.examples} examples ({scores.classes})", highlight=False)
    if row.test_clean_low is not None and row.test_clean_high is not None:
        interval = f"{100 * row.test_clean_low:.2f} to {100 * row.test_clean_high:.2f}"
        console.print(f"95 % of resampled such tests score {interval} {row.metric}", highlight=False)
    if row.majority:
        console.print("warning: dev never left what the majority class scores")
    if row.status == "done":
        console.print(
            f"best step {row.best_step} of {row.steps}, {duration(row.seconds)}, {row.device}, {row.precision}"
        )


def _scores(scores: Scores) -> str:
    return f"accuracy {100 * scores.accuracy:.2f}, macro-F1 {100 * scores.macro_f1:.2f}"
