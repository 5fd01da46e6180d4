"""The verbs of `aang` that read a store: tables, figures, pages, single runs, queries, and care of the store itself."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from aang_ray import completion
from aang_ray.api import DEFAULT_STORE, STORE_VARIABLE
from aang_ray.errors import RunFailure, UserError

app = typer.Typer()
store_app = typer.Typer(help="Care of a store: pack, merge, check.", no_args_is_help=True)

StoreUri = Annotated[
    str,
    typer.Option("--store", envvar=STORE_VARIABLE, metavar="URI", help="Folder or URI of the Parquet store."),
]
StoreArgument = Annotated[
    str, typer.Argument(envvar=STORE_VARIABLE, metavar="STORE", help="Folder or URI of the Parquet store.")
]
Rows = Annotated[
    list[str] | None,
    typer.Option("--row", help="Only this row of the table; may be repeated.", autocompletion=completion.rows),
]
Tasks = Annotated[
    list[str] | None,
    typer.Option(
        "--task",
        help="Only this task, or column of the table; may be repeated.",
        autocompletion=completion.tasks,
    ),
]
Format = Literal["terminal", "markdown", "latex", "html", "csv", "json"]


@app.command()
def table(
    store: StoreUri = DEFAULT_STORE,
    output: Annotated[
        Format | None,
        typer.Option("--format", help="Format of the table.", show_default="terminal, or markdown in a pipe"),
    ] = None,
    metric: Annotated[str | None, typer.Option(help="accuracy or macro_f1, for every task.")] = None,
    oracle: Annotated[
        bool, typer.Option("--oracle", help="Add the column of configurations chosen on test, as in the papers.")
    ] = False,
    clean: Annotated[
        bool, typer.Option("--clean", help="Compare scores on the test texts that are neither in train nor in dev.")
    ] = False,
    paper: Annotated[
        bool, typer.Option("--paper", help="The shape of Table 2 of the AANG paper, beside its scores.")
    ] = False,
    rows: Annotated[
        str, typer.Option(metavar="KEYS", help="What has rows: method, task or settings, for example method,n.")
    ] = "method",
    cols: Annotated[
        str, typer.Option(metavar="KEYS", help="What has columns, for example data.train_size or n.")
    ] = "task",
    against: Annotated[
        str | None,
        typer.Option(
            metavar="ROW",
            help="Compare with this row; none: the best without auxiliary objectives.",
            autocompletion=completion.rows,
        ),
    ] = None,
    tests: Annotated[
        bool, typer.Option("--tests", help="Add intervals, Holm's correction, Wilcoxon's test and the seeds needed.")
    ] = False,
    trace: Annotated[
        str | None,
        typer.Option(metavar="ROW@COLUMN", help="Print the runs and configurations behind a number instead."),
    ] = None,
) -> None:
    """Print the table of a store: methods by tasks, mean and standard deviation over the seeds."""
    from aang_ray import report as tables
    from aang_ray.store import Store

    axes: dict[str, Any] = {"metric": metric, "rows": _split(rows), "cols": _split(cols)}
    if trace is not None:
        typer.echo(tables.trace(Store(store), trace, **axes), nl=False)
        return
    view: Literal["test", "test_clean"] = "test_clean" if clean else "test"
    options: dict[str, Any] = {"oracle": oracle, "view": view, "against": against, "tests": tests, "paper": paper}
    form = output or ("terminal" if sys.stdout.isatty() else "markdown")
    typer.echo(tables.render(tables.build_table(Store(store), **axes, **options), form))


@app.command()
def plot(
    name: Annotated[
        str, typer.Argument(help="bars, weights, objectives, curve, cost, space, distances or losses.", metavar="NAME")
    ],
    store: StoreArgument = DEFAULT_STORE,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE", help="Picture: .png, .svg or .pdf; none: NAME.png.")
    ] = None,
    rows: Rows = None,
    tasks: Tasks = None,
    metric: Annotated[str | None, typer.Option(help="accuracy or macro_f1, for every task.")] = None,
    cost: Annotated[str, typer.Option(help="What the figure cost is about: seconds or tokens.")] = "seconds",
) -> None:
    """Draw a figure of a store, and say where it is."""
    from aang_ray.report.figures import plot as draw
    from aang_ray.store import Store

    path = output or Path(f"{name}.png")
    draw(name, Store(store), path, rows=rows or (), tasks=tasks or (), metric=metric, cost=cost)
    typer.echo(f"drawn: {path}")


@app.command()
def weights(
    store: StoreArgument = DEFAULT_STORE,
    rows: Rows = None,
    tasks: Tasks = None,
    everything: Annotated[bool, typer.Option("--all", help="List all objectives, not only the first ten.")] = False,
) -> None:
    """Print which objectives and primitives carried weight, early and late, and whether the seeds agree."""
    from aang_ray.report.logged import Logged
    from aang_ray.report.weights import describe_weights
    from aang_ray.store import Store

    typer.echo(describe_weights(Logged(Store(store), rows or (), tasks or ()), everything=everything), nl=False)


@app.command()
def errors(
    first: Annotated[
        str,
        typer.Argument(help="A row of the table, for example finetune.", metavar="ROW", autocompletion=completion.rows),
    ],
    second: Annotated[
        str | None,
        typer.Argument(
            help="Another row; none: classes, confusion and calibration.",
            metavar="ROW",
            autocompletion=completion.rows,
        ),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(help="Task, or column of the table, if there are several.", autocompletion=completion.tasks),
    ] = None,
    split: Annotated[Literal["dev", "test"], typer.Option(help="Split.")] = "test",
    store: StoreUri = DEFAULT_STORE,
) -> None:
    """List the examples on which two rows differ, or the scores of the classes of one row."""
    from aang_ray.report.errors import describe_errors
    from aang_ray.report.logged import Logged
    from aang_ray.store import Store

    logged = Logged(Store(store), [first, *([second] if second else [])], [task] if task else [])
    columns = list(logged.table["column"].unique())
    if len(columns) != 1:
        raise UserError(f"choose one of the columns with --task: {', '.join(columns)}")
    texts = _texts(logged.store.record(logged.runs["cell"].iloc[0]).result.config, split) if second else None
    typer.echo(describe_errors(logged, first, second, texts, split), nl=False)


def _texts(config: Any, split: Literal["dev", "test"]) -> dict[int, str] | None:
    """Return the texts of a split of a run's task; None if they are no longer what the run read, or are no texts."""
    from aang_ray.config import parse_config
    from aang_ray.data.load import data_fingerprint
    from aang_ray.data.sources import find_source, read_task
    from aang_ray.data.tasks import TEXT, card_of

    run = parse_config(config, "store")
    card = card_of(run.data)
    try:
        if (card and card.modality != TEXT) or data_fingerprint(run.data) != run.fingerprints.data:
            return None
    except UserError:  # the folder is not on this machine
        return None
    return dict(enumerate(read_task(find_source(run.data), run.data).splits[split].texts.passages()))


@app.command()
def show(
    cell: Annotated[
        str | None,
        typer.Argument(
            help="Name of the run, or its first characters; none: list all runs.", autocompletion=completion.cells
        ),
    ] = None,
    store: StoreUri = DEFAULT_STORE,
    full: Annotated[bool, typer.Option("--full", help="Show all settings, not only those that were changed.")] = False,
) -> None:
    """Show one run: configuration, scores, history, weights, and the error and traceback of a failed one."""
    from aang_ray.report.show import describe_run, list_runs
    from aang_ray.store import Store

    opened = Store(store)
    typer.echo(list_runs(opened) if cell is None else describe_run(opened, cell, full=full), nl=False)


@app.command()
def report(
    store: StoreArgument = DEFAULT_STORE,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="The page.")] = Path("report.html"),
    metric: Annotated[str | None, typer.Option(help="accuracy or macro_f1, for every task.")] = None,
) -> None:
    """Write the results of a store as one self-contained page: findings, table, figures, every run, and the cost."""
    from aang_ray.report.page import build_page
    from aang_ray.store import Store
    from aang_ray.store.files import write_file

    page = build_page(Store(store), metric)
    try:
        write_file(output.absolute(), page.encode())
    except OSError as error:
        raise UserError(f"{output}: cannot be written ({error.strerror or error})") from error
    typer.echo(f"written: {output}")


@app.command()
def query(
    sql: Annotated[
        str, typer.Argument(help="SQL over the tables results, history, weights and predictions.", metavar="SQL")
    ],
    store: StoreUri = DEFAULT_STORE,
    output: Annotated[Literal["markdown", "csv", "json"], typer.Option("--format", help="Format of the answer.")] = (
        "markdown"
    ),
) -> None:
    """Answer a query in SQL, for example "select row, avg(test_score) from results group by row"."""
    from aang_ray.report.formats import markdown_grid
    from aang_ray.report.query import query as ask
    from aang_ray.store import Store

    answer = ask(Store(store), sql)
    if output == "csv":
        typer.echo(answer.to_csv(index=False), nl=False)
    elif output == "json":
        typer.echo(answer.to_json(orient="records", force_ascii=False))
    elif len(answer.columns):
        typer.echo(markdown_grid(answer.astype(object).where(answer.notna(), "–")))


@store_app.command("compact")
def store_compact(store: StoreArgument = DEFAULT_STORE) -> None:
    """Pack the files of finished runs into few. Sweeps may write meanwhile."""
    from aang_ray.store.upkeep import compact

    before, after = compact(store)
    typer.echo(f"{before:,} files before, {after:,} now")


@store_app.command("merge")
def store_merge(
    target: Annotated[str, typer.Argument(help="The store that gets the runs.", metavar="TARGET")],
    source: Annotated[str, typer.Argument(help="The store that they are copied from.", metavar="SOURCE")],
) -> None:
    """Copy the runs of one store into another that it does not have."""
    from aang_ray.store.upkeep import merge

    copied, kept = merge(target, source)
    typer.echo(f"{copied:,} runs copied, {kept:,} were there already")


@store_app.command("verify")
def store_verify(store: StoreArgument = DEFAULT_STORE) -> None:
    """Check that every row can be read, has the name of its configuration, and is there once. Exit code 1 if not."""
    from aang_ray.store.upkeep import verify

    problems = verify(store)
    for problem in problems:
        typer.echo(problem)
    if problems:
        raise RunFailure(f"{len(problems)} problem{'s' * (len(problems) > 1)} in store {store}")
    typer.echo(f"store {store} is sound")


def _split(keys: str) -> list[str]:
    return [key.strip() for key in keys.split(",") if key.strip()]
