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

Device = Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Where to compute.")]


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
    onnx: Annotated[bool, typer.Option("--onnx", help="Write it as ONNX, too, checked with onnxruntime.")] = False,
    push: Annotated[
        str | None, typer.Option("--push-to-hub", metavar="USER/NAME", help="Push it to the Hugging Face Hub, too.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository of the Hub private.")] = False,
    store: StoreUri = DEFAULT_STORE,
) -> None:
    """Write the model of a finished run. Unless a sweep with --keep-models kept it, the run is trained again."""
    from rich.console import Console

    from aang_ray.report.logged import best_run
    from aang_ray.report.show import find_run
    from aang_ray.store import Store
    from aang_ray.sweep.command import export_run
    from aang_ray.train.publish import check_onnx, check_push, push_to_hub, write_onnx

    if output is None:
        raise UserError("export: give a folder with -o DIR")
    if (cell is None) == (best is None):
        raise UserError("export: give either the name of a run (`aang show` lists them) or --best TASK")
    if onnx:
        check_onnx()
    if push is not None:
        check_push(push)
    opened, console = Store(store), Console()
    if best is not None:
        place, cell = best_run(opened, best)
        console.print(place, markup=False, highlight=False, soft_wrap=True)
    assert cell is not None
    result = export_run(find_run(opened, cell), opened, console, output).result
    if result.status == "failed":
        raise RunFailure(result.error or "the run failed")
    if onnx:
        typer.echo(f"as ONNX: {write_onnx(output)}")
    if push is not None:
        typer.echo(f"on the Hub: {push_to_hub(output, push, private=private)}")


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(help="Folder of an exported model.", metavar="A")],
    second: Annotated[Path, typer.Argument(help="Folder of another one.", metavar="B")],
    source: Annotated[Path, typer.Argument(help="A .jsonl or .csv file, or one text a line.", metavar="FILE")],
    form: Annotated[
        Literal["jsonl", "csv", "lines"] | None,
        typer.Option("--format", help="Form of the file.", show_default="by its ending"),
    ] = None,
    text: Annotated[str | None, typer.Option(metavar="COLUMN", help="Column of the text; none: as in A's run.")] = None,
    text_b: Annotated[str | None, typer.Option(metavar="COLUMN", help="Column of the second text of pairs.")] = None,
    label: Annotated[
        str | None,
        typer.Option(metavar="COLUMN", help="Column of the true labels; none: as in A's run, if it is there."),
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="List all texts on which they differ, not only 20.")
    ] = False,
    device: Device = "auto",
) -> None:
    """Compare two models on the texts of a file: agreement, McNemar's test, and the texts on which they differ."""
    from aang_ray.report.errors import SHOWN, classified, describe_comparison
    from aang_ray.train.export import load_classifier
    from aang_ray.train.predict import compare_models

    where = _device(device)
    models = load_classifier(first, where), load_classifier(second, where)
    read, answers = compare_models(*models, path=source, form=form, columns=(text, text_b, label))
    names = (str(first), str(second)) if first != second else ("first", "second")
    frames = [
        classified(read.labels, labels, probabilities, model.labels)
        for model, (labels, probabilities) in zip(models, answers, strict=True)
    ]
    texts = [" | ".join(row) for row in read.rows]
    both = zip(names, frames, strict=True)
    typer.echo(describe_comparison(next(both), next(both), texts, None if everything else SHOWN), nl=False)


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
    device: Device = "auto",
) -> None:
    """Classify texts: one JSON line with label and probabilities for each, in the order of the input."""
    from aang_ray.train.export import load_classifier
    from aang_ray.train.predict import predict_stream

    predict_stream(load_classifier(model, _device(device)), source, sys.stdout, form, (text, text_b))


def _device(wanted: str) -> str:
    import torch

    there = torch.cuda.is_available()
    if wanted == "cuda" and not there:
        raise UserError("--device cuda: this machine has no usable GPU")
    return "cuda" if there and wanted != "cpu" else "cpu"
