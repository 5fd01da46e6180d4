"""The sweep file: its fields, what the command line changes about them, and the runs that they stand for.

`load_sweep` reads and checks a file, `expand` makes its runs: tasks x methods x grid. Seeds are laid out later, by
`plan.plan`, and values of `search` are chosen while the sweep runs, by `search.Searches`.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, model_validator

from aang_ray.config import RunConfig, parse_config
from aang_ray.config.load import describe_error, nearest, override, read_yaml, set_path
from aang_ray.config.methods import method_sections
from aang_ray.errors import UserError
from aang_ray.sweep.presets import preset

Seed = Annotated[int, Field(ge=0, lt=2**32)]
Bounds = Annotated[list[float], Field(min_length=2, max_length=2)]

MOST_SEEDS = 10_000
"""Seeds in one range."""
MOST_RUNS = 20_000
"""Configurations of one sweep file, seeds not counted: more than anybody waits for."""

RESERVED = {
    "seed": "seeds (or --seeds)",
    "data.task": "tasks (or --task)",
    "method": "methods",
    "method.name": "methods",
    "fingerprints": "nothing: they are measured",
}
"""Settings that a sweep varies by a field of their own."""


class Range(BaseModel):
    """An interval of values, both ends included. Exactly one of the three kinds is given."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    uniform: Bounds | None = None
    log: Bounds | None = None
    """Uniform in the logarithm, for example for a learning rate."""
    integer: Bounds | None = None

    @model_validator(mode="after")
    def _valid(self) -> Self:
        given = list(self.model_dump(exclude_none=True).values())
        if len(given) != 1:
            raise ValueError("expected one of uniform, log, integer with [low, high]")
        low, high = given[0]
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise ValueError("expected [low, high] with low below high")
        if self.log is not None and low <= 0:
            raise ValueError("log: expected bounds above 0")
        if self.integer is not None and (low % 1 or high % 1):
            raise ValueError("integer: expected whole bounds")
        return self

    def __str__(self) -> str:
        (kind,) = self.model_dump(exclude_none=True)
        return "{} in {:g} to {:g}".format(kind, *self.bounds)

    @property
    def bounds(self) -> tuple[float, float]:
        """Smallest and largest value; whole numbers for an integer range."""
        ((low, high),) = self.model_dump(exclude_none=True).values()
        return (int(low), int(high)) if self.integer is not None else (low, high)


Values = Annotated[
    Annotated[list[Any], Field(min_length=1), Tag("list")] | Annotated[Range, Tag("range")],
    Discriminator(lambda values: "range" if isinstance(values, Mapping | Range) else "list"),
]
"""A list of values, or a range."""


class SearchSpec(BaseModel):
    """Settings that Optuna chooses. Each run of the sweep file has a search of its own."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    samples: Annotated[int, Field(gt=0, le=MOST_RUNS)]
    """Configurations a run, each with all seeds."""
    space: Annotated[dict[str, Values], Field(min_length=1)]
    """Dotted setting -> a list of values, or a range."""
    seed: int = 0
    """Seed of the sampler."""


class SweepSpec(BaseModel):
    """A sweep file: a grid of task x method x settings x seed over common settings."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    base: dict[str, Any] = {}
    """Settings of every run, as in a run's own file."""
    tasks: Annotated[list[str | dict[str, Any]], Field(min_length=1)] = [{}]
    """Each a `data.task`, or a mapping of settings of `data`; by default the base's task."""
    methods: Annotated[list[str | dict[str, Any]], Field(min_length=1)]
    """Each a method's name, or a mapping of settings of a run. The mapping may hold a `grid` of its own, and a `label`
    that names its row in the table."""
    seeds: Annotated[list[Seed], Field(min_length=1)] = [0]
    grid: dict[str, Annotated[list[Any], Field(min_length=1)]] = {}
    """Dotted setting -> its values; applied to the methods that have the setting."""
    search: SearchSpec | None = None
    """Settings that Optuna chooses, for each of the runs that the fields above make."""


@dataclass(frozen=True)
class SweepOverrides:
    """What the command line changes about a sweep file."""

    tasks: tuple[str, ...] = ()
    """Replace the file's tasks."""
    metric: str | None = None
    """`data.metric` of every run."""
    seeds: tuple[int, ...] = ()
    """Replace the file's seeds."""
    settings: tuple[str, ...] = ()
    """`a.b=value`, applied last to every run whose method has the setting."""


@dataclass(frozen=True)
class Asha:
    """Settings of asynchronous successive halving (Li et al. 2020, arXiv:1810.05934)."""

    grace: float = 0.1
    """Share of a run's steps after which it may be cut for the first time."""
    reduction: int = 3
    """At each rung one of so many runs continues, to so many times the steps: eta of the paper."""

    def __post_init__(self) -> None:
        if not 0 < self.grace < 1:
            raise UserError(f"--grace {self.grace:g}: must be a share of a run's steps, between 0 and 1")
        if self.reduction < 2:
            raise UserError(f"--reduction {self.reduction}: must be at least 2")

    def rungs(self, config: RunConfig) -> list[tuple[float, int]]:
        """The rungs of a run: share of the run, and the step at which it is judged.

        Rung k is at `grace * reduction**k` of the steps in which dev decides, rounded up to an evaluation. A
        pretraining stage before these steps and a last fine-tuning after them are never cut.
        """
        steps, every = config.train_steps, config.schedule.eval_every
        final = config.final_finetune.steps if config.final_finetune is not None else 0
        rungs: dict[int, float] = {}
        for level in itertools.count():
            share = self.grace * self.reduction**level  # as `ASHAScheduler` computes it
            if share >= 1:
                break
            step = math.ceil(round(share * steps / every, 9)) * every
            if step < steps:
                rungs.setdefault(config.total_steps - steps - final + step, share)
        return [(share, step) for step, share in rungs.items()]


def load_sweep(path: Path, overrides: SweepOverrides, *, is_preset: bool = False) -> SweepSpec:
    """Read and validate a sweep file, or the preset of that name, with the command line's tasks and seeds.

    Raises:
        UserError: The file cannot be read or is not a sweep.
    """
    mapping = preset(str(path)) if is_preset else read_yaml(path)
    if "base" not in mapping and "methods" not in mapping:
        raise UserError(f"{path}: not a sweep file (no `methods`); one run is started with `aang train {path}`")
    if overrides.tasks:
        mapping["tasks"] = list(overrides.tasks)
    if overrides.seeds:
        mapping["seeds"] = list(overrides.seeds)
    try:
        return SweepSpec.model_validate(mapping)
    except ValidationError as error:
        raise UserError(f"{path}: {describe_error(error, SweepSpec)}") from None


def parse_seeds(text: str) -> tuple[int, ...]:
    """Parse seeds such as `0,1,2` or `0-4`; repeated ones are dropped.

    Raises:
        UserError: The text has another form.
    """
    seeds: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if match is None:
            raise UserError(f"--seeds {text}: expected whole numbers such as 0,1,2 or a range such as 0-4")
        first, last = int(match[1]), int(match[2] or match[1])
        if last >= 2**32:
            raise UserError(f"--seeds {text}: a seed is below {2**32}")
        if last - first >= MOST_SEEDS:
            raise UserError(f"--seeds {text}: at most {MOST_SEEDS} seeds, or more runs than anybody waits for")
        seeds.extend(range(first, last + 1))
    if not seeds:
        raise UserError(f"--seeds {text}: the range is empty")
    return tuple(dict.fromkeys(seeds))


def expand(spec: SweepSpec, overrides: SweepOverrides, where: str) -> list[RunConfig]:
    """Make the runs of a sweep, without its seeds: each has seed 0. Tasks vary slowest, duplicates are dropped.

    A `method.` setting of `grid` or `--set` is applied to the methods that have it. Relative paths are made absolute,
    because trials may run in another directory.

    Args:
        spec: The sweep file.
        overrides: What the command line changes.
        where: Name of the sweep file, for messages.

    Raises:
        UserError: A run is not valid, or no method has a setting.
    """
    override({}, overrides.settings)  # so that one which no method here has is checked, too
    settings = {text.partition("=")[0].strip(): text for text in overrides.settings}
    _check_settings(spec, settings, where)
    if overrides.metric is not None:
        settings["data.metric"] = f"data.metric='{overrides.metric}'"
    runs: dict[RunConfig, None] = {}
    left = MOST_RUNS
    for task, (index, method) in itertools.product(spec.tasks, enumerate(spec.methods)):
        label = f"{where}: methods[{index}]"
        for mapping in _variants(spec, task, method, settings, label):
            left -= 1
            if left < 0:
                raise UserError(_too_many(where))
            runs[_with_absolute_paths(parse_config(mapping, label))] = None
    return list(runs)


def _variants(
    spec: SweepSpec, task: str | dict[str, Any], method: str | dict[str, Any], settings: Mapping[str, str], where: str
) -> Iterator[dict[str, Any]]:
    """Every combination of the grid's values for one task and one method."""
    changes = {"method": method} if isinstance(method, str) else dict(method)
    own_grid: Any = changes.pop("grid", {})
    if not isinstance(own_grid, dict) or not all(isinstance(values, list) and values for values in own_grid.values()):
        raise UserError(
            f"{where}.grid: expected settings with a list of values each, for example method.aux_lr: [1, 0.1]"
        )
    _check_reserved(f"{where}.grid", own_grid)
    base = _merge(spec.base, {"data": {"task": task} if isinstance(task, str) else task})
    base = _merge(base, changes)
    name = _method_name(base.get("method"))
    if base.get("method") is None:
        base["method"] = {"name": name}  # or a setting of the method would be taken for another method's
    grid = {key: values for key, values in spec.grid.items() if _applies(key, name)} | own_grid
    last = [text for key, text in settings.items() if _applies(key, name)]
    if math.prod(map(len, grid.values())) > MOST_RUNS:
        raise UserError(_too_many(where))
    for values in itertools.product(*grid.values()):
        variant = base
        for key, value in zip(grid, values, strict=True):
            variant = set_path(variant, key, value)
        yield {**override(variant, last), "seed": 0}


def _too_many(where: str) -> str:
    return f"{where}: more than {MOST_RUNS:,} configurations; give the grids fewer values"


def _merge(mapping: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Lay `changes` over `mapping`, section by section; a `method` is replaced as a whole."""
    result = dict(mapping)
    for key, value in changes.items():
        inner = result.get(key)
        if key != "method" and isinstance(inner, Mapping) and isinstance(value, Mapping):
            value = _merge(inner, value)
        elif key != "method" and isinstance(value, Mapping) and inner is not None:
            raise UserError(f"base: {key}: expected a section of settings, got {inner!r}")
        result[key] = value
    return result


def _method_name(method: object) -> str:
    """The name of the method that a run's `method` field means; the default method's where it names none."""
    if isinstance(method, str):
        return method
    default = RunConfig.model_fields["method"].default.name
    return str(method.get("name", default)) if isinstance(method, Mapping) else str(default)


def _applies(key: str, method: str) -> bool:
    """Whether a method has a setting; settings outside `method.` apply to every run.

    An unknown method counts as having it: the validation of the run then names the method.
    """
    section, _, field = key.partition(".")
    model = method_sections().get(method)
    return section != "method" or model is None or field in model.model_fields


def _check_settings(spec: SweepSpec, settings: Iterable[str], where: str) -> None:
    """Refuse settings that have a field of their own, that no method has, and that no method of this file has.

    `--set` may name a setting that no method of this file has: the same command line may be used with many files.
    """
    known = sorted({field for model in method_sections().values() for field in model.model_fields})
    entries = [entry if isinstance(entry, dict) else {"method": entry} for entry in spec.methods]
    methods = list(dict.fromkeys(_method_name(entry.get("method", spec.base.get("method"))) for entry in entries))
    space: Iterable[str] = spec.search.space if spec.search is not None else ()
    for source, keys in {f"{where}: grid": spec.grid, f"{where}: search.space": space, "--set": settings}.items():
        _check_reserved(source, keys)
        for key in keys:
            section, _, field = key.partition(".")
            if section == "method" and field not in known:
                close = nearest(field, known)
                hint = f"did you mean method.{close}?" if close else f"allowed: {', '.join(known)}"
                raise UserError(f"{source}: unknown key {key}; {hint}")
            if source != "--set" and not any(_applies(key, method) for method in methods):
                having = ", ".join(method for method in method_sections() if _applies(key, method))
                raise UserError(f"{source}: no method of the sweep ({', '.join(methods)}) has {key}; it is of {having}")


def _check_reserved(source: str, keys: Iterable[str]) -> None:
    for key in keys:
        if key in RESERVED:
            raise UserError(f"{source}: {key} is not set here, use {RESERVED[key]}")


def _with_absolute_paths(config: RunConfig) -> RunConfig:
    """Make every relative path of a run that exists absolute."""
    paths = {f"data.{name}": getattr(config.data, name) for name in ("task", "in_domain", "out_of_domain", "neural_lm")}
    paths |= {"encoder.name": config.encoder.name, "space": config.space}
    settings: dict[str, Any] = {key: _absolute(path) for key, path in paths.items()}
    return changed(config, settings | {"data.external": [_absolute(task) for task in config.data.external]})


def _absolute(name: str | None) -> str | None:
    """Names of cards, spaces and packages stay as they are; an existing path becomes absolute."""
    if name is None or not ("/" in name or name.startswith((".", "~")) or Path(name).suffix):
        return name
    path = Path(name).expanduser()
    return str(path.resolve()) if path.exists() else name


def space_of(spec: SearchSpec, run: RunConfig) -> dict[str, Values]:
    """The settings of a search space that a run's method has."""
    return {key: values for key, values in spec.space.items() if _applies(key, run.method.name)}


def check_space(spec: SearchSpec, runs: Iterable[RunConfig]) -> None:
    """Try every value of a list and both ends of a range.

    Raises:
        UserError: A value is not valid for a run.
    """
    for run in runs:
        for key, values in space_of(spec, run).items():
            for value in values.bounds if isinstance(values, Range) else values:
                changed(run, {key: value})


def changed(run: RunConfig, settings: Mapping[str, Any]) -> RunConfig:
    """A run with settings replaced, by dotted name."""
    mapping = run.model_dump(mode="json")
    for key, value in settings.items():
        mapping = set_path(mapping, key, value)
    return parse_config(mapping, "search.space")
