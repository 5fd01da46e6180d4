"""The command `aang`. Each verb imports what it needs when it runs, so that `aang --help` is quick."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer
from typer.core import TyperCommand
from typer.exceptions import TyperException

from aang_ray import __version__, completion, model_verbs, setup_verbs, store_verbs
from aang_ray.api import DEFAULT_STORE, open_store
from aang_ray.errors import RunFailure, UserError
from aang_ray.store_verbs import StoreUri
from aang_ray.train.control import Interrupted

INTERRUPTED = 130
"""Exit code after Ctrl-C: 128 + SIGINT."""


class _OfMethods(TyperCommand):
    """A verb that trains. Its help ends with the names of the methods."""

    def format_help(self, *place: Any, **named: Any) -> None:
        from aang_ray.config.methods import method_sections

        self.epilog = (
            f"Methods (--set method=NAME; a sweep's are in its file): {', '.join(method_sections())}. Their settings "
            "(--set method.SETTING=VALUE): docs/methods/README.md."
        )
        super().format_help(*place, **named)


app = typer.Typer(
    help="Does an automatically generated auxiliary objective beat plain fine-tuning on your data, and by how much?",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(help="End tasks.", no_args_is_help=True)
space_app = typer.Typer(help="Search spaces of auxiliary objectives.", no_args_is_help=True)
preset_app = typer.Typer(help="The paper's grids, for `aang sweep --preset`.", no_args_is_help=True)
app.add_typer(data_app, name="data")
app.add_typer(store_verbs.app)  # without a name: its verbs stand beside these
app.add_typer(model_verbs.app)
app.add_typer(setup_verbs.app)
app.add_typer(store_verbs.store_app, name="store")
app.add_typer(space_app, name="space")
app.add_typer(preset_app, name="preset")

Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="A setting, for example optim.body_lr=1e-4; may be repeated.",
        autocompletion=completion.settings,
    ),
]
Word = str | None
Track = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME[=WHERE]",
        help="Log every evaluation with tensorboard (WHERE: a folder), mlflow (a URI), wandb or trackio (a project).",
    ),
]


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


@app.command(cls=_OfMethods)
def train(
    config: Annotated[Path | None, typer.Argument(help="YAML file with settings of a run; none: the defaults.")] = None,
    settings: Settings = None,
    store: StoreUri = DEFAULT_STORE,
    export: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Write the trained classifier there.")] = None,
    track: Track = None,
) -> None:
    """Run one configuration, print its scores and write them into the store. Run again after a stop, it continues."""
    from rich.console import Console

    from aang_ray.config import load_config
    from aang_ray.sweep.command import train_once
    from aang_ray.train.process import set_up_process

    run = load_config(config, settings or [])
    console = Console()
    if run.resources.workers == 1:  # each of several workers is a process of its own
        console.print(set_up_process(run.resources), highlight=False, soft_wrap=True)
    result = train_once(run, open_store(store), console, export, track or ()).result
    if result.status == "failed":
        raise RunFailure(result.error or "the run failed")


@app.command(cls=_OfMethods)
def sweep(
    file: Annotated[Path | None, typer.Argument(help="Sweep file, for example jobs/demo.yaml.")] = None,
    preset: Annotated[
        Word,
        typer.Option(
            metavar="NAME", help="A grid of the paper; see `aang preset list`.", autocompletion=completion.presets
        ),
    ] = None,
    task: Annotated[list[str] | None, typer.Option(help="Task in place of the file's; may be repeated.")] = None,
    metric: Annotated[Word, typer.Option(help="accuracy or macro_f1.")] = None,
    seeds: Annotated[Word, typer.Option(help="Seeds in place of those of the file: 0,1,2 or 0-4.")] = None,
    settings: Settings = None,
    store: StoreUri = DEFAULT_STORE,
    max_hours: Annotated[float | None, typer.Option(help="End after so many hours; run again to continue.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show the runs and an estimate of the time.")] = False,
    keep_failed: Annotated[bool, typer.Option("--keep-failed", help="Do not run failed runs again.")] = False,
    scheduler: Annotated[Literal["asha"] | None, typer.Option(help="Cut less promising runs short.")] = None,
    grace: Annotated[
        float | None, typer.Option(help="asha: share of its steps that a run takes before the first cut [0.1].")
    ] = None,
    keep_models: Annotated[
        Literal["best"] | None, typer.Option(help="best: keep in the store the model of the best run of each row.")
    ] = None,
    reduction: Annotated[
        int | None, typer.Option(help="asha: at each cut, one configuration out of so many continues [3].")
    ] = None,
    track: Track = None,
) -> None:
    """Run a grid of configurations in parallel and print the table. Run again, it continues where it ended.

    The exit code is 1 if a run failed or remains.
    """
    from rich.console import Console

    from aang_ray.report import build_table, render
    from aang_ray.sweep.command import sweep_file
    from aang_ray.sweep.spec import Asha, SweepOverrides, parse_seeds

    if max_hours is not None and not 0 < max_hours < math.inf:
        raise UserError(f"--max-hours {max_hours:g}: must be above 0 and finite")
    given = {name: value for name, value in (("grace", grace), ("reduction", reduction)) if value is not None}
    if given and scheduler is None:
        raise UserError(f"--{next(iter(given))}: only with --scheduler asha")
    asha: Asha | None = Asha(**given) if scheduler == "asha" else None  # type: ignore[arg-type]
    chosen = Path(preset) if preset is not None else file
    if chosen is None or (preset is not None and file is not None):
        raise UserError("sweep: give either a sweep file or --preset NAME")
    opened = open_store(store)
    overrides = SweepOverrides(
        tuple(task or ()), metric, () if seeds is None else parse_seeds(seeds), tuple(settings or ())
    )
    outcome = sweep_file(
        chosen,
        overrides,
        opened,
        Console(),
        dry_run=dry_run,
        keep_failed=keep_failed,
        max_hours=max_hours,
        asha=asha,
        is_preset=preset is not None,
        keep_models=keep_models is not None,
        track=track or (),
    )
    if outcome is None:
        return
    if outcome.done:
        typer.echo("")
        typer.echo(render(build_table(opened, groups=outcome.groups)))
        typer.echo(f"\nresults: {opened.uri}")
    raise typer.Exit(outcome.exit_code)


@app.command("try")
def try_(
    task: Annotated[str, typer.Argument(help="A folder, a labelled file, or anything else that `--task` takes.")],
    sets: Annotated[
        list[str] | None, typer.Option("--with", help="Another labelled set that may help; may be given again.")
    ] = None,
    metric: Annotated[str | None, typer.Option("--metric", help="accuracy or macro_f1.")] = None,
    seeds: Annotated[str | None, typer.Option("--seeds", help="0,1,2 or 0-4; more seeds, more certainty.")] = None,
    settings: Settings = None,
    store: StoreUri = DEFAULT_STORE,
    minutes: Annotated[float | None, typer.Option(help="Make the runs smaller until they end in time [30].")] = None,
    whole: Annotated[bool, typer.Option("--whole", help="Run the whole recipe, however long it takes.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show the data, the runs and the time.")] = False,
) -> None:
    """Compare fine-tuning with auxiliary objectives on your data, say which is better, and write the best model."""
    from rich.console import Console

    from aang_ray.report import build_table, render
    from aang_ray.sweep.recipe import try_task
    from aang_ray.sweep.spec import SweepOverrides, parse_seeds

    chosen = () if seeds is None else parse_seeds(seeds)
    opened, changes = open_store(store), SweepOverrides((), metric, chosen, tuple(settings or ()))
    given = tuple(sets or ())
    outcome = try_task(task, changes, opened, Console(), sets=given, minutes=minutes, whole=whole, dry_run=dry_run)
    if outcome is not None:
        if outcome.done:
            typer.echo("")
            typer.echo(render(build_table(opened, groups=outcome.groups)))
        raise typer.Exit(outcome.exit_code)


@app.command()
def status(
    file: Annotated[Path | None, typer.Argument(help="Name of a sweep file; none: the last sweep.")] = None,
    store: StoreUri = DEFAULT_STORE,
) -> None:
    """Show how far a sweep is: runs done, running, waiting and failed, and the time left.

    With RAY_ADDRESS (HOST:PORT of the head of a cluster, or auto on the cluster) it shows the nodes, too.
    """
    from rich.console import Console

    from aang_ray.store import Store
    from aang_ray.sweep.cluster import cluster_lines
    from aang_ray.sweep.status import read_status, show_status

    for line in cluster_lines():
        typer.echo(line)
    show_status(read_status(Store(store), file), Console())


@app.command()
def watch(
    file: Annotated[Path | None, typer.Argument(help="Name of a sweep file; none: the last sweep.")] = None,
    store: StoreUri = DEFAULT_STORE,
) -> None:
    """Show a sweep as it goes, from another shell: runs, scores, weights, time left. Ctrl-C ends the watching only.

    It ends with the sweep. The exit code is 1 if a run failed or remains.
    """
    from rich.console import Console

    from aang_ray.store import Store
    from aang_ray.sweep.watch import watch as show

    status = show(Store(store), file, Console())
    if not status.alive:
        raise typer.Exit(1 if status.having("failed", "stopped", "waiting") or status.file.to_come else 0)


@app.command()
def theory(
    lipschitz: Annotated[float, typer.Option(help="L: Lipschitz constant of both losses.")] = 0.2,
    smooth_end: Annotated[float, typer.Option(help="beta_e: that of the gradient of the end task's loss.")] = 100.0,
    smooth_auxiliary: Annotated[float, typer.Option(help="beta_a: the same for the auxiliary objective.")] = 1.0,
    dissimilarity: Annotated[float, typer.Option(help="Delta: largest distance of the gradients, at most 2L.")] = 0.1,
    examples_end: Annotated[float, typer.Option(help="N_e: examples of the end task.")] = 500.0,
    examples_auxiliary: Annotated[float, typer.Option(help="N_a: examples of the auxiliary objective.")] = 5000.0,
    end_task_weight: Annotated[float, typer.Option(help="lambda_e: probability of an end-task example.")] = 0.5,
    step_size: Annotated[float, typer.Option(help="c: the learning rate at step t is at most c/t.")] = 0.1,
    steps: Annotated[float, typer.Option(help="T: steps of SGD.")] = 1000.0,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw the bound against Delta and N'.")] = None,
) -> None:
    """Compute the bound of Theorem E.5 of the AANG paper on the generalisation error, both branches."""
    from aang_ray.theory import Problem, bound_of, default_ranges, generalisation_bound, plot_bound

    losses = (lipschitz, smooth_end, smooth_auxiliary, dissimilarity)
    problem = Problem(*losses, examples_end, examples_auxiliary, end_task_weight, step_size, steps)
    tightest = generalisation_bound(problem)
    for bound in (bound_of(problem, "dissimilarity"), bound_of(problem, "smoothness")):
        holds = " (the tighter one)" if bound == tightest else ""
        vacuous = " (trivial: losses are at most 1)" if bound.vacuous else ""
        typer.echo(f"by {bound.branch}: {bound.value:.4g}{holds}{vacuous}")
    if plot is not None:
        plot_bound(problem, *default_ranges(problem), plot)
        typer.echo(f"drawn: {plot}")


@data_app.command("show")
def data_show(
    task: Annotated[str, typer.Argument(help="A card, a folder, a labelled file or a Hugging Face dataset id.")],
    settings: Settings = None,
) -> None:
    """Show sizes and labels of an end task, and lengths and duplicates of its texts."""
    from rich.console import Console

    from aang_ray.config import load_config
    from aang_ray.data import print_task
    from aang_ray.data.pretrained import PACKAGED

    # Any tokenizer tells lengths: where none is named, one that is at hand needs no download.
    usual = [f"encoder.name={PACKAGED}"] if find_spec(PACKAGED.removeprefix("package:")) else []
    config = load_config(None, [*usual, *(settings or ()), f"data.task={task}"])
    print_task(config.data, config.encoder, Console())


@space_app.command("show")
def space_show(
    name: Annotated[str, typer.Argument(help="Name of a file of search_spaces/, or a path to one.")],
    published: Annotated[bool, typer.Option("--published", help="Use the legality of the research code.")] = False,
) -> None:
    """Show the objectives of a space, and why others are ruled out."""
    from rich.console import Console

    from aang_ray.objectives.space import render_space

    render_space(name, "published" if published else "sound", Console())


@preset_app.command("list")
def preset_list() -> None:
    """List the names of all presets."""
    from aang_ray.sweep.presets import preset_names

    for name in preset_names():
        typer.echo(name)


@preset_app.command("show")
def preset_show(
    name: Annotated[
        str, typer.Argument(help="For example paper/citation_intent/aang-td.", autocompletion=completion.presets)
    ],
) -> None:
    """Print a preset as a sweep file, to start your own from."""
    import yaml

    from aang_ray.sweep.presets import preset

    typer.echo(yaml.safe_dump(preset(name), sort_keys=False), nl=False)


def run(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line, and end the process with its exit code."""
    code = main(arguments)
    files = sys.modules.get("aang_ray.store.files")  # not imported: no store was opened
    if files is not None and files.still_asking():
        # Python's own way to end a process would wait for the store that does not answer.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code is 0, 1 (a run failed), 2 (a wrong input), 130 (Ctrl-C) or 143 (SIGTERM).

    Errors that a user can correct are one line on stderr, without a traceback.
    """
    try:
        code = typer.main.get_command(app).main(
            list(sys.argv[1:] if arguments is None else arguments), prog_name="aang", standalone_mode=False
        )
    except TyperException as error:
        # A group of verbs without a verb has printed its help, and its message is empty.
        return _print_error(error.format_message(), 2) if error.format_message() else 2
    except UserError as error:
        return _print_error(str(error), 2)
    except RunFailure as error:
        return _print_error(str(error), 1)
    except Interrupted as stop:
        return _print_error(stop.message, 143)
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except BrokenPipeError:  # the reader of the output, such as `head`, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # a file that cannot be read or written
        return _print_error(f"{error.filename}: {error.strerror}" if error.filename else str(error), 1)
    except RecursionError as error:
        return _print_error(f"nested too deeply: {error}", 1)
    except MemoryError:
        return _print_error("out of memory: lower data.train_size, batch.auxiliary or encoder.layers", 1)
    if code == INTERRUPTED:
        return _print_error(
            "interrupted; what has finished is in the store, the same command continues from there", code
        )
    return code if isinstance(code, int) else 0


def _print_error(line: str, code: int) -> int:
    # What a file holds may be part of the line, and must not reach the terminal as a command to it.
    printable = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in " ".join(line.split()))
    typer.echo(f"error: {printable}", err=True)
    return code
