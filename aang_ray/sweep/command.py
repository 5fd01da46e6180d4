"""`aang sweep` as a function: from a sweep file to finished cells."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from aang_ray.config import RunConfig
from aang_ray.errors import UserError
from aang_ray.store import Store
from aang_ray.sweep.agenda import write_agenda
from aang_ray.sweep.expand import expand
from aang_ray.sweep.halving import Halving
from aang_ray.sweep.jobs import Grid, Strategy
from aang_ray.sweep.needs import Need
from aang_ray.sweep.outcome import SweepOutcome, outcome_of, report
from aang_ray.sweep.past import dev_scores, read_past
from aang_ray.sweep.plan import PlannedCell, plan, to_run
from aang_ray.sweep.preview import preview, preview_search
from aang_ray.sweep.progress import SweepProgress
from aang_ray.sweep.run import Ends, run_jobs
from aang_ray.sweep.rungs import Asha
from aang_ray.sweep.search_space import check_space
from aang_ray.sweep.spec import SweepOverrides, SweepSpec, load_sweep


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
) -> SweepOutcome | None:
    """Run the sweep of a file, or the preset of that name, into a store and say how it ended.

    With `dry_run` only show what it would do (None).

    Cells with a done row are skipped, so running the same sweep again goes on where it ended. With `asha` runs of the
    less promising configurations are cut short.

    Raises:
        UserError: for a sweep, a task or an encoder that is not as it should be.
    """
    spec = load_sweep(path, overrides, is_preset=is_preset)
    if spec.search is not None and asha is not None:
        raise UserError(f"{path}: search: does not go with --scheduler asha; choose one")
    runs = expand(spec, overrides, str(path))
    from aang_ray.train.plan import (
        check_n,  # after the file was read: a slip in it is told at once
        resolve,
    )

    if spec.search is not None:
        outcome = _search(path, spec, runs, store, console, dry_run=dry_run, max_hours=max_hours)
    else:
        for run in runs:
            check_n(run)
        cells = plan(runs, spec.seeds, store.done(), resolve)
        if dry_run:
            preview(cells, store, console, keep_failed=keep_failed)
            return None
        outcome = _grid(path, cells, store, console, keep_failed=keep_failed, max_hours=max_hours, asha=asha)
    if outcome is not None:
        report(outcome, console, max_hours)
    return outcome


def _grid(
    path: Path,
    cells: Sequence[PlannedCell],
    store: Store,
    console: Console,
    *,
    keep_failed: bool,
    max_hours: float | None,
    asha: Asha | None,
) -> SweepOutcome:
    """Every cell of the plan, to its end or as far as a scheduler lets it."""
    from aang_ray.train.checkpoint import checkpoint_folder, discard_done

    store.check_writable()
    _say_done(cells, len(cells), console)
    write_agenda(store.uri, path, cells)
    discard_done(checkpoint_folder(store.uri), {cell.cell for cell in cells if cell.state == "done"})
    left = to_run(cells, keep_failed=keep_failed)
    strategy: Strategy = Grid(left)
    if asha is not None:
        kept = [cell for cell in cells if cell.state == "done" or cell in left]
        strategy = Halving(kept, read_past(store, [cell.cell for cell in kept]), asha)
    ends = Ends()
    if not strategy.finished:
        needs = [Need.of(cell.config) for cell in left]
        ends = run_jobs(strategy, needs, store, console, SweepProgress(left, console), max_hours)
    return outcome_of(cells, ends, scheduled=asha is not None)


def _search(
    path: Path,
    spec: SweepSpec,
    runs: Sequence[RunConfig],
    store: Store,
    console: Console,
    *,
    dry_run: bool,
    max_hours: float | None,
) -> SweepOutcome | None:
    """The configurations that Optuna asks for."""
    from aang_ray.sweep.search import Search
    from aang_ray.sweep.search_memory import SearchMemory
    from aang_ray.train.plan import resolve

    assert spec.search is not None
    check_space(spec.search, runs)
    if dry_run:
        preview_search(runs, spec.search, spec.seeds, console)
        return None
    store.check_writable()
    status = store.done()
    progress = SweepProgress([], console)
    agenda: list[PlannedCell] = []

    def lay_out(run: RunConfig) -> list[PlannedCell]:
        return plan([run], spec.seeds, status, resolve)

    def planned(cells: Sequence[PlannedCell]) -> None:
        agenda.extend(cells)
        progress.add([cell for cell in cells if cell.state != "done"])
        write_agenda(store.uri, path, agenda)

    strategy = Search(runs, spec.search, lay_out, dev_scores(store), SearchMemory(store.uri), planned)
    _say_done(strategy.cells, len(strategy.cells) + strategy.unasked * len(spec.seeds), console)
    ends = Ends()
    if not strategy.finished:
        needs = [Need.of(run) for run in runs for _ in range(spec.search.samples * len(spec.seeds))]
        ends = run_jobs(strategy, needs, store, console, progress, max_hours)
    return outcome_of(strategy.cells, ends, to_come=strategy.unasked * len(spec.seeds))


def _say_done(cells: Sequence[PlannedCell], all_cells: int, console: Console) -> None:
    done = sum(cell.state == "done" for cell in cells)
    console.print(f"all {done} cells are done" if done == all_cells else f"{all_cells} cells, {done} of them done")
