"""The functions that `import aang_ray as aang` offers. Each is a verb of the command line, for use in Python."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import pandas as pd

    from aang_ray.config import RunConfig
    from aang_ray.store import CellRecord, Store
    from aang_ray.sweep.command import SweepOutcome

STORE_VARIABLE = "AANG_STORE"
"""Environment variable that names the store where none is given."""
DEFAULT_STORE = "results"


def train(
    config: RunConfig | Mapping[str, Any] | str | Path | None = None,
    *,
    settings: Sequence[str] = (),
    store: Store | str | Path | None = None,
    export: str | Path | None = None,
    track: Sequence[str] = (),
    quiet: bool = False,
) -> CellRecord:
    """Train one configuration, and write its row into the store.

    A run that is done already is read from the store. A run that was interrupted continues from its checkpoint.

    Example:
        >>> record = aang.train({"method": "finetune", "data": {"task": "my-folder"}})  # doctest: +SKIP
        >>> record.result.test.accuracy  # doctest: +SKIP
        0.7523

    Args:
        config: A configuration, a mapping of settings, or a YAML file of settings. Whatever is not set has its default.
        settings: Further settings as text, such as `"optim.body_lr=1e-4"`.
        store: The store, or its folder or URI. None: the variable `AANG_STORE` of the environment, or `results`.
        export: Folder for the trained classifier, which `load_classifier` reads.
        track: Experiment trackers, as for `sweep`.
        quiet: Print nothing.

    Returns:
        The record of the run: `result` (scores, steps, seconds, ...; `result.status` is `done` or `failed`), `history`
        (evaluations) and `weights` (of the objectives over time).

    Raises:
        UserError: For a configuration, a task or an encoder that is not valid; the message is one line.
    """
    from aang_ray.config import RunConfig, load_config, parse_config
    from aang_ray.config.load import override
    from aang_ray.sweep.command import train_once

    if config is None or isinstance(config, str | Path):
        run = load_config(None if config is None else Path(config), settings)
    else:
        mapping = config.model_dump(mode="json") if isinstance(config, RunConfig) else config
        run = parse_config(override(mapping, settings), "configuration")
    return train_once(run, open_store(store), _console(quiet), None if export is None else Path(export), track)


def sweep(
    spec: Mapping[str, Any] | str | Path,
    *,
    tasks: Sequence[str] = (),
    metric: str | None = None,
    seeds: Sequence[int] = (),
    settings: Sequence[str] = (),
    store: Store | str | Path | None = None,
    max_hours: float | None = None,
    keep_failed: bool = False,
    scheduler: Literal["asha"] | None = None,
    keep_models: Literal["best"] | None = None,
    track: Sequence[str] = (),
    quiet: bool = False,
) -> SweepOutcome:
    """Run a grid of configurations with Ray. Runs that the store has are not run again.

    Example:
        >>> grid = {"methods": ["finetune", {"method": "aang", "n": 6}], "seeds": [0, 1, 2]}
        >>> outcome = aang.sweep(grid, tasks=["my-folder"], metric="macro_f1")  # doctest: +SKIP
        >>> outcome.done, outcome.failed  # doctest: +SKIP
        (6, {})

    Args:
        spec: A sweep file, or a mapping with the content of one. `aang status` names a mapping's sweep `sweep`.
        tasks: End tasks, in place of those of the file.
        metric: `accuracy` or `macro_f1`, for every task.
        seeds: Seeds, in place of those of the file.
        settings: Settings of all runs as text, such as `"optim.body_lr=1e-4"`.
        store: The store, or its folder or URI. None: the variable `AANG_STORE` of the environment, or `results`.
        max_hours: End after so many hours. The same call later continues.
        keep_failed: Do not run failed runs again.
        scheduler: `asha` cuts runs of the less promising configurations short.
        keep_models: `best` keeps in the store the model of the best run of each row of the table.
        track: Experiment trackers that get every evaluation: `tensorboard`, `mlflow`, `wandb` or `trackio`, each with
            or without `=WHERE` (a folder, a tracking URI, a project).
        quiet: Print nothing.

    Returns:
        How many runs there are (`cells`), how many are `done`, which `failed` and how many are `remaining`.

    Raises:
        UserError: For a sweep, a task or an encoder that is not valid; the message is one line.
    """
    import yaml

    from aang_ray.sweep.command import sweep_file
    from aang_ray.sweep.spec import Asha, SweepOverrides

    overrides = SweepOverrides(tuple(tasks), metric, tuple(seeds), tuple(settings))
    with tempfile.TemporaryDirectory() as folder:
        if isinstance(spec, Mapping):
            path = Path(folder) / "sweep.yaml"
            path.write_text(yaml.safe_dump(dict(spec)), encoding="utf-8")
        else:
            path = Path(spec)
        outcome = sweep_file(
            path,
            overrides,
            open_store(store),
            _console(quiet),
            keep_failed=keep_failed,
            max_hours=max_hours,
            asha=Asha() if scheduler == "asha" else None,
            keep_models=keep_models is not None,
            track=track,
        )
    assert outcome is not None  # it is None after a dry run only
    return outcome


def table(store: Store | str | Path | None = None, *, metric: str | None = None, oracle: bool = False) -> pd.DataFrame:
    """Return the table of a store: the test scores of each method on each task, mean and deviation over the seeds.

    Example:
        >>> frame = aang.table("results")  # doctest: +SKIP
        >>> frame.pivot(index="row", columns="task", values="test_mean")  # doctest: +SKIP

    Args:
        store: The store, or its folder or URI. None: the variable `AANG_STORE` of the environment, or `results`.
        metric: `accuracy` or `macro_f1`, for every task; None: the metric of each task.
        oracle: Also report the configurations with the best test score, which is how the papers chose.

    Returns:
        One line for each task, method and way to choose; `aang_ray.report.build_table` lists the columns. Scores are
        fractions. `attrs["notes"]` holds the foot notes. `aang_ray.report.render` makes Markdown or LaTeX of it.

    Raises:
        UserError: Where the store has no finished run.
    """
    from aang_ray.report import build_table

    return build_table(open_store(store), metric=metric, oracle=oracle)


def objectives(space: str | Path = "td", *, published: bool = False) -> pd.DataFrame:
    """Return the auxiliary objectives of a search space, and those that are ruled out.

    Example:
        >>> frame = aang.objectives("td")
        >>> int(frame["legal"].sum())
        23

    Args:
        space: The name of a file of `search_spaces/`, or a path to one.
        published: Use the legality of the research code.

    Returns:
        One line for each objective: `objective` (its name), `data`, `transform`, `representation`, `output`, `legal`,
        and the `reason` where it is ruled out.

    Raises:
        UserError: For a space that is not valid.
    """
    import pandas as pd

    from aang_ray.objectives.objective import STAGES
    from aang_ray.objectives.space import enumerate_space, read_space

    name = str(space)
    found = enumerate_space(name, read_space(name), "published" if published else "sound")
    reasons: dict[Any, str | None] = {**dict.fromkeys(found.objectives), **found.ruled_out}
    lines = [(one.key, *one.stages, reason is None, reason) for one, reason in reasons.items()]
    return pd.DataFrame(lines, columns=["objective", *STAGES, "legal", "reason"])


def open_store(store: Store | str | Path | None) -> Store:
    """Return the store of a folder or URI; None: of `AANG_STORE`, or of the folder `results`.

    Raises:
        UserError: For a folder below the working directory of a Ray job, because Ray removes it when the job ends.
    """
    from aang_ray.errors import UserError
    from aang_ray.store import Store
    from aang_ray.sweep.cluster import in_ray_job

    if isinstance(store, Store):
        return store
    uri = str(os.environ.get(STORE_VARIABLE) or DEFAULT_STORE) if store is None else str(store)
    if in_ray_job() and not ("://" in uri or Path(uri).is_absolute()):
        raise UserError(f"--store {uri}: the folder of a Ray job goes away; give an absolute path or a URI")
    return Store(uri)


def _console(quiet: bool) -> Any:
    from rich.console import Console

    return Console(quiet=quiet)
