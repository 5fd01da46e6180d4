"""The sweep file: what varies, and what the command line changes about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from aang_ray.config.load import describe_error, override, read_yaml
from aang_ray.errors import UserError
from aang_ray.sweep.presets import preset
from aang_ray.sweep.search_space import SearchSpec

Seed = Annotated[int, Field(ge=0, lt=2**32)]


class SweepSpec(BaseModel):
    """A grid task x method x settings x seed of runs over a common base."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    base: dict[str, Any] = {}
    """Settings of every run, as in a run's own file."""
    tasks: Annotated[list[str | dict[str, Any]], Field(min_length=1)] = [{}]
    """Each a `data.task`, or a mapping of settings of `data`; by default the base's task."""
    methods: Annotated[list[str | dict[str, Any]], Field(min_length=1)]
    """Each a method's name, or a mapping of settings of a run that may hold a `grid` of its own."""
    seeds: Annotated[list[Seed], Field(min_length=1)] = [0]
    grid: dict[str, Annotated[list[Any], Field(min_length=1)]] = {}
    """Dotted setting -> its values; applied to the methods that have the setting."""
    search: SearchSpec | None = None
    """Settings that Optuna chooses, for each of the runs that the fields above make."""


@dataclass(frozen=True)
class SweepOverrides:
    """What the command line changes about a sweep file."""

    tasks: tuple[str, ...] = ()
    """Take the place of the file's tasks."""
    metric: str | None = None
    """`data.metric` of every run."""
    seeds: tuple[int, ...] = ()
    """Take the place of the file's seeds."""
    settings: tuple[str, ...] = ()
    """`a.b=value`, applied last to every run whose method has the setting."""


def load_sweep(path: Path, overrides: SweepOverrides, *, is_preset: bool = False) -> SweepSpec:
    """Read and validate a sweep file, or the preset of that name, with the command line's tasks and seeds.

    Raises:
        UserError: for a file that cannot be read or is not a sweep.
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
    """Seeds from text such as `0,1,2` or `0-4`.

    Raises:
        UserError: for anything else.
    """
    seeds: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise UserError(f"--seeds {text}: expected whole numbers such as 0,1,2 or a range such as 0-4")
        seeds.extend(range(int(first), int(last) + 1) if dash else [int(first)])
    if not seeds:
        raise UserError(f"--seeds {text}: the range is empty")
    return tuple(dict.fromkeys(seeds))


def parse_setting(text: str) -> tuple[str, Any]:
    """The dotted key and the value of `a.b=value`."""
    mapping: Mapping[str, Any] = override({}, [text])
    key = text.partition("=")[0].strip()
    value: Any = mapping
    for part in key.split("."):
        value = value[part]
    return key, value
