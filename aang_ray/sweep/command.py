"""`aang sweep` as a function: from a sweep file to finished cells."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from aang_ray.store import Store
from aang_ray.sweep.agenda import write_agenda
from aang_ray.sweep.expand import expand
from aang_ray.sweep.plan import plan
from aang_ray.sweep.preview import preview
from aang_ray.sweep.run import SweepOutcome, run_sweep
from aang_ray.sweep.spec import SweepOverrides, load_sweep


def sweep_file(
    path: Path,
    overrides: SweepOverrides,
    store: Store,
    console: Console,
    *,
    dry_run: bool = False,
    keep_failed: bool = False,
    max_hours: float | None = None,
) -> SweepOutcome | None:
    """Run the sweep of a file into a store and say how it ended; with `dry_run` only show what it would do (None).

    Cells with a done row are skipped, so running the same sweep again goes on where it ended.

    Raises:
        UserError: for a sweep, a task or an encoder that is not as it should be.
    """
    spec = load_sweep(path, overrides)
    runs = expand(spec, overrides, str(path))
    from aang_ray.train.plan import resolve  # after the file was read: a slip in it is told at once

    cells = plan(runs, spec.seeds, store.done(), resolve)
    if dry_run:
        preview(cells, store, console, keep_failed=keep_failed)
        return None
    done = sum(cell.state == "done" for cell in cells)
    if done == len(cells):
        console.print(f"all {done} cells are done")
    else:
        console.print(f"{len(cells)} cells, {done} of them done")
    write_agenda(store.uri, path, cells)
    outcome = run_sweep(cells, store, console, keep_failed=keep_failed, max_hours=max_hours)
    _report(outcome, console, max_hours)
    return outcome


def _report(outcome: SweepOutcome, console: Console, max_hours: float | None) -> None:
    for title, error in outcome.failed.items():
        console.print(f"failed: {title}: {error}", markup=False, highlight=False, soft_wrap=True)
    if outcome.remaining:
        reason = f"--max-hours {max_hours:g} is over" if max_hours is not None else "the sweep ended early"
        console.print(f"{reason}: {outcome.remaining} cells remain; run the same command again to go on")
