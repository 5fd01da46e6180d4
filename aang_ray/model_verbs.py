"""The verbs of `aang` that write and use trained models."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from aang_ray import completion
from aang_ray.api import DEFAULT_STORE
from aang_ray.errors import RunFailure, UserError
from aang_ray.store_verbs import StoreUri

app = typer.Typer()


@app.command()
def export(
    cell: Annotated[
        str | None,
        typer.Argument(help="Name of a finished run, or its first characters.", autocompletion=completion.cells),
    ] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", metavar="DIR", help="Folder of the model.")] = None,
    best: Annotated[
        str | None,
        typer.Option(
            metavar="TASK",
            help="The best run of a task, or column of the table, by dev.",
            autocompletion=completion.tasks,
        ),
    ] = None,
    store: StoreUri = DEFAULT_STORE,
) -> None:
    """Write the model of a finished run. The store keeps no models, so the run is trained again."""
    from rich.console import Console

    from aang_ray.report.logged import best_run
    from aang_ray.report.show import find_run
    from aang_ray.store import Store
    from aang_ray.sweep.command import export_run

    if output is None:
        raise UserError("export: give a folder with -o DIR")
    if (cell is None) == (best is None):
        raise UserError("export: give either the name of a run (`aang show` lists them) or --best TASK")
    opened, console = Store(store), Console()
    if best is not None:
        place, cell = best_run(opened, best)
        console.print(place, markup=False, highlight=False, soft_wrap=True)
    assert cell is not None
    result = export_run(find_run(opened, cell), opened, console, output).result
    if result.status == "failed":
        raise RunFailure(result.error or "the run failed")


@app.command()
def predict(
    model: Annotated[Path, typer.Argument(help="Folder of an exported model.", metavar="DIR")],
    source: Annotated[
        Path | None,
        typer.Option("--input", metavar="FILE", help="A .jsonl or .csv file, or one text a line; none: stdin."),
    ] = None,
    form: Annotated[
        Literal["jsonl", "csv", "lines"] | None,
        typer.Option("--format", help="Form of the input.", show_default="by its ending; stdin: lines"),
    ] = None,
    text: Annotated[str | None, typer.Option(metavar="COLUMN", help="Column of the text; none: as in the run.")] = None,
    text_b: Annotated[str | None, typer.Option(metavar="COLUMN", help="Column of the second text of pairs.")] = None,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Where to compute.")] = "auto",
) -> None:
    """Classify texts: one JSON line with label and probabilities for each, in the order of the input."""
    import torch

    from aang_ray.train.export import load_classifier
    from aang_ray.train.predict import predict_stream

    there = torch.cuda.is_available()
    if device == "cuda" and not there:
        raise UserError("--device cuda: this machine has no usable GPU")
    classifier = load_classifier(model, "cuda" if there and device != "cpu" else "cpu")
    predict_stream(classifier, source, sys.stdout, form, (text, text_b))
