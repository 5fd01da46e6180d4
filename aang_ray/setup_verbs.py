"""The verbs of `aang` that come before a sweep: is this machine ready, and a sweep file for given data."""

from __future__ import annotations

from typing import Annotated

import typer

from aang_ray.api import DEFAULT_STORE
from aang_ray.errors import RunFailure
from aang_ray.store_verbs import StoreUri

app = typer.Typer()


@app.command()
def doctor(
    store: StoreUri = DEFAULT_STORE,
    quick: Annotated[bool, typer.Option("--quick", help="Do not start Ray, and do not ask the Hub.")] = False,
) -> None:
    """Check this machine: Python, packages, device, precision, memory, disks, Ray, the Hub. Exit code 1 if one fails.

    Each line begins with ok, note (only some runs need it) or FAIL, and is followed by what mends it.
    """
    from aang_ray.sweep.doctor import doctor as examine

    failed = []
    for name, finding in examine(store, quick=quick):
        typer.echo(f"{finding.state:<4}  {name}: {finding.text}")
        if finding.mend:
            typer.echo(f"      to mend it: {finding.mend}")
        if finding.state == "FAIL":
            failed.append(name)
    if failed:
        raise RunFailure(f"{len(failed)} checks failed: {', '.join(failed)}" if failed[1:] else f"{failed[0]} failed")
    typer.echo("this machine is ready")
