"""`aang try`: from a folder of labelled texts to an answer and a model, without a setting."""

from __future__ import annotations

import hashlib
import math
import os
import signal
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass, field, replace
from multiprocessing import get_context, parent_process
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import yaml
from pyarrow import fs
from pydantic import BaseModel, ConfigDict, ValidationError
from rich.console import Console

from aang_ray.config import RunConfig
from aang_ray.config.sections import DataConfig
from aang_ray.data import load_end_task
from aang_ray.data.corpora import external_sources
from aang_ray.data.modalities import modality_of
from aang_ray.data.pretrained import PACKAGED
from aang_ray.data.sources import find_source
from aang_ray.data.tasks import TEXT
from aang_ray.errors import RunFailure, UserError
from aang_ray.objectives.objective import EXTERNAL
from aang_ray.report.logged import readable
from aang_ray.store import CellRecord, Store
from aang_ray.store.files import open_location, publish
from aang_ray.sweep.cluster import own_cluster
from aang_ray.sweep.command import SweepOutcome, export_run, sweep_file
from aang_ray.sweep.plan import START_SECONDS, Need, PlannedCell, duration, plan, trials_at_once
from aang_ray.sweep.spec import SweepOverrides, expand, load_sweep

FOLDER = (".progress", "try")
MINUTES = 30.0
"""How long the answer may take, unless the command says otherwise."""


class Size(BaseModel):
    """How large the runs of the recipe are."""

    model_config = ConfigDict(frozen=True)

    layers: int
    steps: int
    eval_every: int
    max_tokens: int | None = None
    """None: the encoder's limit."""

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of a run of this size."""
        data = {} if self.max_tokens is None else {"data": {"max_tokens": self.max_tokens}}
        schedule = {"steps": self.steps, "eval_every": self.eval_every}
        return {"encoder": {"name": PACKAGED, "layers": self.layers}, "schedule": schedule, **data}


SIZES = (
    Size(layers=3, steps=150, eval_every=15),
    Size(layers=3, steps=100, eval_every=20),
    Size(layers=2, steps=100, eval_every=20),
    Size(layers=2, steps=75, eval_every=15),
    Size(layers=2, steps=50, eval_every=10),
    Size(layers=2, steps=50, eval_every=10, max_tokens=128),
)
"""From the whole recipe to the smallest; the first one that fits the time is run. There are never fewer seeds."""

RECIPE: Mapping[str, Any] = {
    "base": {"n": 6, "batch": {"end_task": 32, "auxiliary": 48}},
    "methods": ["finetune", "static", "aang"],
    "seeds": [0, 1, 2],
}
"""What is tried without other labelled sets; the size is added, and `space`, by the text that is given."""

FORWARD = 1 / 3
"""Time to score a text, as a share of the time to train on it: the backward pass takes twice as long as the forward."""
LONG_STEP = 5.0
"""Seconds of a first step from which on no further step is timed."""
_SHOWN = 3


def recipe_with(sets: Sequence[str], size: Size) -> dict[str, Any]:
    """Return what is tried beside other labelled sets, with the settings that docs/evidence.md was measured with.

    Args:
        sets: The sets, as in `data.external`.
        size: The size of the runs.
    """
    auxiliary = max(48, 8 * len(sets))
    return {
        "base": {
            "data": {"external": list(sets)},
            "n": "all",
            "batch": {"end_task": 16, "auxiliary": auxiliary},
            "optim": {"body_lr": 2e-4, "head_lr": 1e-3},
        },
        "methods": [
            # It may see as many texts as the others do.
            {"method": {"name": "finetune", "tied_compute": True}, "optim": {"body_lr": 5e-5}},
            {"method": {"name": "pooled", "pooled_steps": size.steps, "batch": auxiliary}},
            "static",
            {"method": {"name": "halving", "batch": 48}},
        ],
        "seeds": RECIPE["seeds"],
    }


def labels_of(sets: Sequence[str], folder: Path) -> Path:
    """Write the space that has the labels of each set as an objective, and return its path.

    Args:
        sets: The sets, as in `data.external`.
        folder: Where the file is written.

    Raises:
        UserError: A set does not exist, is not of texts, or has the same name as another.
    """
    data = [f"{EXTERNAL}{name}" for name in external_sources(DataConfig(external=tuple(sets)))]
    block = {"data": data, "transform": ["no-op"], "representation": ["bidirectional"], "output": ["supervised"]}
    file = folder / "other_labels.yaml"
    file.write_text(yaml.safe_dump({"blocks": [block]}), encoding="utf-8")
    return file


def try_task(
    task: str,
    overrides: SweepOverrides,
    store: Store,
    console: Console,
    *,
    sets: Sequence[str] = (),
    minutes: float | None = None,
    whole: bool = False,
    dry_run: bool = False,
) -> SweepOutcome | None:
    """Compare fine-tuning with auxiliary objectives on a task, print the answer, and write the best model.

    The runs are made smaller until they end in time, as far as three steps of each method on this machine tell. A size
    that was chosen once is kept in the store, so that the same command continues the same runs.

    Args:
        task: A folder, a file, or whatever else `data.task` may name.
        overrides: What the command line changes about the recipe.
        store: Where rows, checkpoints and the model are.
        console: Where all is printed.
        sets: Other labelled sets that may help, as in `data.external`: then their labels are the objectives.
        minutes: How long the answer may take; None: `MINUTES`.
        whole: Run the whole recipe, however long it takes.
        dry_run: Only say what would be done.

    Returns:
        How the runs ended; None after a dry run.

    Raises:
        UserError: The task or a setting is not valid.
        RunFailure: Memory ran out while steps were timed.
    """
    if minutes is not None and not 0 < minutes < math.inf:
        raise UserError(f"--minutes {minutes:g}: must be above 0 and finite")
    if whole and minutes is not None:
        raise UserError("try: give either --minutes or --whole")
    data = DataConfig(task=task)
    if (modality := modality_of(data)) != TEXT:
        raise UserError(f"try: {task} is a task of {modality}; use `aang sweep jobs/digits.yaml`")
    with tempfile.TemporaryDirectory() as folder:
        if sets:
            space = str(labels_of(sets, Path(folder)))
        else:
            space = "td_ed" if "in_domain" in find_source(data).corpora else "td"
        trial = _Trial(task, sets, space, overrides, store, Path(folder) / "try.yaml")
        full = trial.cells(SIZES[0])
        from aang_ray.train.check import check_runs

        groups = {cell.config.group: cell.config for cell in full}
        _print(console, *check_runs(groups.values(), here=own_cluster()))
        size = trial.choose(console, math.inf if whole else 60 * (minutes or MINUTES), keep=not dry_run)
        cells = trial.cells(size)
        outcome = sweep_file(trial.file, overrides, store, console, dry_run=dry_run, keep_models=True, described=True)
    if outcome is None or outcome.exit_code:
        return outcome
    records = [store.record(cell.cell) for cell in cells]
    best = max(_rows(records).values(), key=_mean_dev)
    _print(console, "", *_answer(records, best), *_objectives(records))
    if cut := describe_cut(cells[0].config, full[0].config):
        _print(console, f"The runs were cut ({cut}): the whole recipe, --whole, may give another answer.")
    chosen = max(best, key=lambda record: _score(record, "dev"))
    model = (Path("models") if "://" in store.uri else Path(store.uri) / "models") / cells[0].config.task_name
    _print(console, f"The best model is that of {chosen.result.row}, seed {chosen.result.seed}.")
    export_run(chosen.result.cell, store, console, model)
    _print(
        console,
        f"`aang predict {model} --input FILE` says the label of each text in a file; `aang report {store.uri} -o FILE` "
        "shows all runs as one page.",
    )
    return outcome


def _print(console: Console, *lines: str) -> None:
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def describe_cut(cut: RunConfig, whole: RunConfig) -> str:
    """Say what a run of the recipe has less than the whole recipe: `100 of 150 steps, 2 of 3 layers`; or nothing."""
    parts = []
    if (steps := cut.schedule.steps or 0) < (whole_steps := whole.schedule.steps or 0):
        parts.append(f"{steps} of {whole_steps} steps")
    if cut.encoder.layers != whole.encoder.layers:
        parts.append(f"{cut.encoder.layers} of {whole.encoder.layers} layers")
    if cut.data.max_tokens != whole.data.max_tokens:
        parts.append(f"texts cut at {cut.data.max_tokens} tokens")
    return ", ".join(parts)


@dataclass(frozen=True)
class Pace:
    """How fast a run of the recipe is on this machine, beside as many others as will run at once."""

    start: float
    """Seconds until its first step."""
    step: float
    """Seconds a step."""
    score: float
    """Seconds to score dev at each evaluation, and test once."""

    def seconds(self, config: RunConfig) -> float:
        """Return how long a run takes at most."""
        return self.start + config.total_steps * self.step + self.score


@dataclass
class _Trial:
    """The runs of the recipe on one task, in the sizes that were looked at."""

    task: str
    sets: Sequence[str]
    space: str
    overrides: SweepOverrides
    store: Store
    file: Path
    """The sweep file of the size that was looked at last."""
    timed: dict[str, tuple[RunConfig, Pace]] = field(default_factory=dict)
    """By row: the run that was timed, and its pace."""

    def cells(self, size: Size) -> list[PlannedCell]:
        """Write the sweep file of a size, and plan it."""
        from aang_ray.train.plan import resolve

        recipe = recipe_with(self.sets, size) if self.sets else RECIPE
        base = {"space": self.space, **recipe["base"]}
        for section, values in size.settings.items():
            base[section] = {**base.get(section, {}), **values}
        self.file.write_text(yaml.safe_dump({**recipe, "base": base, "tasks": [self.task]}), encoding="utf-8")
        spec = load_sweep(self.file, self.overrides)
        return plan(expand(spec, self.overrides, "try"), spec.seeds, self.store.done(), resolve)

    def choose(self, console: Console, limit: float, *, keep: bool) -> Size:
        """Return the first size whose runs end in time, else the last one, and say what will be done.

        Args:
            console: Where the runs, what is cut of them, and the time are printed.
            limit: Seconds.
            keep: Whether the store keeps the choice for the next call.
        """
        location = open_location(self.store.uri)
        whole = self.cells(SIZES[0])
        key = "\n".join([str(limit), *dict.fromkeys(cell.config.group for cell in whole)])
        path = location.path(*FOLDER, f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json")
        kept: Size | None = SIZES[0] if limit == math.inf else None
        if location.filesystem.get_file_info(path).type == fs.FileType.File:
            with location.filesystem.open_input_file(path) as stream:
                try:
                    kept = Size.model_validate_json(stream.read())
                except ValidationError:
                    raise UserError(f"{path} is damaged; delete it, and the size is chosen anew") from None
        size = kept or SIZES[0]
        cells = self.cells(size)
        left = [cell for cell in cells if cell.state != "done"]
        rows = ", ".join(dict.fromkeys(cell.config.row_name for cell in cells))
        seeds = ", ".join(dict.fromkeys(str(cell.config.seed) for cell in cells))
        _print(console, f"{len(cells)} runs ({rows}; seeds {seeds}), {len(left)} to do")
        if not left or not own_cluster():
            return size
        if kept is None:
            began = time.monotonic()
            seconds = whole_seconds = self._seconds(whole, console)
            left_over = limit - (time.monotonic() - began)
            longest = int(_lengths(whole[0].config).max(initial=0))
            for size in (one for one in SIZES if one.max_tokens is None or one.max_tokens < longest):
                cells = self.cells(size)
                seconds = self._seconds(cells, console)
                if seconds <= left_over:
                    break
            else:
                _print(console, f"also the smallest size takes longer than the {duration(limit)} that it may")
            if keep:
                publish(location, path, size.model_dump_json().encode())
        else:
            seconds = self._seconds(cells, console)
        if cut := describe_cut(cells[0].config, whole[0].config):
            why = "chosen by an earlier call" if kept else f"all of it takes about {duration(whole_seconds)}"
            _print(console, f"cut to answer in time: {cut} ({why}); --whole runs all, --minutes M sets another limit")
        cores = len(os.sched_getaffinity(0))
        _print(console, f"time: at most about {duration(seconds)} on {cores} cores")
        return size

    def _seconds(self, cells: Sequence[PlannedCell], console: Console) -> float:
        """Estimate how long the cells that are not done take.

        Each row is timed once, in the first size that is looked at; the pace of a smaller size is a share of that. To
        time every size took longer than ten minutes on a busy machine.
        """
        left = [cell.config for cell in cells if cell.state != "done"]
        if not left:
            return 0.0
        at_once = trials_at_once([Need.of(config) for config in left], [{"CPU": float(_cores())}])
        new = {config.row_name: config for config in left if config.row_name not in self.timed}
        with closing(measure(list(new.values()), at_once, max(_cores() // at_once, 1))) as paces:
            for row, config in new.items():
                depth = f"{config.encoder.layers} layers" if config.encoder.layers else "all layers"
                _print(console, f"timing up to three steps of {row} with {depth}, {at_once} runs at once")
                self.timed[row] = (config, next(paces))
        seconds = []
        for config in left:
            timed, pace = self.timed[config.row_name]
            seconds.append(replace(pace, step=pace.step * _share(config, timed)).seconds(config))
        return START_SECONDS + max(sum(seconds) / at_once, *seconds)


def _share(config: RunConfig, timed: RunConfig) -> float:
    """Return how long a step takes, as a share of one of the same row in the size that was timed.

    Time goes with the layers, the embeddings and heads counted as one more, and with the tokens of a text.
    """
    layers, timed_layers = config.encoder.layers, timed.encoder.layers
    share = (layers + 1) / (timed_layers + 1) if layers and timed_layers else 1.0
    if (most := config.data.max_tokens) is not None and most != timed.data.max_tokens:
        lengths = _lengths(timed)
        share *= float(np.minimum(lengths, most).mean() / lengths.mean())
    return share


def _lengths(config: RunConfig) -> np.ndarray:
    """Return the numbers of tokens of all texts that runs train on."""
    task = load_end_task(config.data, config.encoder)
    return np.concatenate([part.lengths for part in (task.train.tokens, *task.corpora.values())])


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def measure(configs: Sequence[RunConfig], at_once: int, threads: int) -> Generator[Pace]:
    """Measure the pace of runs, each beside copies of itself: cores that share caches and memory are slower together.

    Args:
        configs: The runs.
        at_once: How many copies run at once.
        threads: CPU threads of each.

    Yields:
        The pace of each run, in order.

    Raises:
        UserError: A run cannot start.
        RunFailure: A process was killed.
    """
    with ProcessPoolExecutor(at_once, get_context("spawn"), _end_with_parent) as pool:
        for config in configs:
            try:
                paces = list(pool.map(pace_of, [config] * at_once, [threads] * at_once))
            except BrokenProcessPool:
                raise RunFailure(
                    f"a process that timed {config.row_name} ended unexpectedly: out of memory? lower batch.micro, or "
                    "run fewer at once by a larger resources.cpus"
                ) from None
            yield Pace(*(mean(getattr(pace, part) for pace in paces) for part in ("start", "step", "score")))


def _end_with_parent() -> None:
    """Have this process end at once on Ctrl-C, without a traceback, and when its parent is gone, however it ended."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)

    def wait() -> None:
        if (parent := parent_process()) is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def pace_of(config: RunConfig, threads: int) -> Pace:
    """Make a resolved run, and time two steps after a first one, or the first one alone if it takes long."""
    from aang_ray.train.device import choose_compute
    from aang_ray.train.rounds import make_stepper
    from aang_ray.train.setup import build

    began = time.perf_counter()
    config = config.changed(resources=config.resources.changed(threads=threads))
    stepper = make_stepper(setup := build(config, choose_compute(config)))
    first = time.perf_counter()
    stepper.step(stepper.prepare(0))
    warm = time.perf_counter()
    seconds = warm - first
    if seconds < LONG_STEP:
        for step in (1, 2):
            stepper.step(stepper.prepare(step))
        seconds = (time.perf_counter() - warm) / 2
    texts = -(-config.total_steps // config.schedule.eval_every) * len(setup.task.dev) + len(setup.task.test)
    trained = (config.batch.end_task or 0) + ((config.batch.auxiliary or 0) if config.method.auxiliary else 0)
    trained += config.batch.dev if config.method.uses_dev else 0
    return Pace(first - began, seconds, FORWARD * seconds / trained * texts)


def _rows(records: Sequence[CellRecord]) -> dict[str, list[CellRecord]]:
    rows: dict[str, list[CellRecord]] = defaultdict(list)
    for record in records:
        rows[record.result.row].append(record)
    return rows


def _score(record: CellRecord, split: str) -> float:
    return float(getattr(getattr(record.result, split), record.result.metric))


def _mean_dev(records: Sequence[CellRecord]) -> float:
    return mean(_score(record, "dev") for record in records)


def _answer(records: Sequence[CellRecord], best: Sequence[CellRecord]) -> list[str]:
    """Say in words which row is best by dev, and how it compares with fine-tuning on test, seed by seed."""
    rows = _rows(records)
    plain_row = next(row for row, runs in rows.items() if runs[0].result.method == "finetune")
    plain = {record.result.seed: record for record in rows.pop(plain_row)}
    other = best if best[0].result.method != "finetune" else max(rows.values(), key=_mean_dev)
    result = other[0].result
    differences = [_score(record, "test") - _score(plain[record.result.seed], "test") for record in other]
    ours, base = (100 * mean(_score(record, "test") for record in part) for part in (other, plain.values()))
    wins = sum(difference > 0 for difference in differences)
    verdict = "is worth it" if other is best else "is not worth it"
    return [
        f"On {result.task}, by dev, {result.row} {verdict}: its {result.metric} on test is {ours:.2f} %, that of plain "
        f"fine-tuning {base:.2f} % ({100 * mean(differences):+.2f}, better in {wins} of {len(other)} seeds).",
        f"{len(other)} seeds are few: `--seeds 0-9` runs more, and keeps these.",
    ]


def _objectives(records: Sequence[CellRecord]) -> list[str]:
    """Say what the methods that choose among objectives favoured."""
    return [*_favoured(records), *_kept(records)]


def _favoured(records: Sequence[CellRecord]) -> list[str]:
    """Say which objectives learned weights favoured: their mean weight over time and seeds."""
    weights: dict[str, list[float]] = defaultdict(list)
    for record in records:
        for row in record.weights if record.result.method == "aang" else ():
            for name, weight in row.weights.items():
                weights[name].append(weight)
    if len(weights) < 2:
        return []
    order = sorted(weights, key=lambda name: -mean(weights[name]))
    most, least = (
        [f"{readable(name)} ({mean(weights[name]):.3f})" for name in part] for part in (order[:_SHOWN], order[-_SHOWN:])
    )
    return [f"The learned weights favoured {', '.join(most)}; least weight had {', '.join(reversed(least))}."]


def _kept(records: Sequence[CellRecord]) -> list[str]:
    """Say which sets the searches by short trials kept, and in how many seeds."""
    searches = [record.weights[-1].weights for record in records if record.result.method == "halving"]
    if not searches:
        return []
    kept = {name: sum(search.get(name, 0.0) > 0 for search in searches) for name in searches[0]}
    sets = [f"{name.split('/')[0].removeprefix(EXTERNAL)} in {count}" for name, count in kept.items() if count]
    return [f"In {len(searches)} searches by short trials, these sets helped: {', '.join(sets) or 'none'}."]
