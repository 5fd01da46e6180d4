"""The verbs of `aang` that come before a sweep: is this machine ready, and a sweep file for given data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from aang_ray import completion
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


@app.command("init")
def init_(
    task: Annotated[str, typer.Argument(help="A folder, a labelled file, or anything else that `--task` takes.")],
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="FILE", help="The sweep file; none: the data's name with .yaml."),
    ] = None,
    encoder: Annotated[
        str | None, typer.Option(metavar="NAME", help="As encoder.name; none: the packaged encoder.")
    ] = None,
    hours: Annotated[float, typer.Option(help="How long the sweep may take on this machine.")] = 1.0,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="A setting of the data, for example data.text=review; may be repeated.",
            autocompletion=completion.settings,
        ),
    ] = None,
) -> None:
    """Look at your data and write a commented sweep file, with sizes that fit the data and this machine."""
    from rich.console import Console

    from aang_ray.data.pretrained import PACKAGED
    from aang_ray.sweep.init import write_sweep

    path = write_sweep(task, output, encoder or PACKAGED, settings or (), hours, Console())
    typer.echo(f"written: {path}")
    typer.echo(f"next: aang sweep {path} --dry-run, then without --dry-run")
