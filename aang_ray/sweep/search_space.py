"""The `search` of a sweep file: settings and the values that they may take."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Discriminator, Field, PositiveInt, Tag, model_validator

from aang_ray.config import RunConfig, parse_config
from aang_ray.config.load import set_path

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

Bounds = Annotated[list[float], Field(min_length=2, max_length=2)]


class Range(BaseModel):
    """An interval, ends included; exactly one of the three kinds is given."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    uniform: Bounds | None = None
    log: Bounds | None = None
    """Uniform in the logarithm, for example of a learning rate."""
    integer: Bounds | None = None

    @model_validator(mode="after")
    def _valid(self) -> Self:
        if sum(bounds is not None for bounds in (self.uniform, self.log, self.integer)) != 1:
            raise ValueError("expected one of uniform, log, integer with [low, high]")
        low, high = self._bounds
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise ValueError("expected [low, high] with low below high")
        if self.log is not None and low <= 0:
            raise ValueError("log: expected bounds above 0")
        if self.integer is not None and (low % 1 or high % 1):
            raise ValueError("integer: expected whole bounds")
        return self

    def __str__(self) -> str:
        kind = "integer" if self.integer is not None else "log" if self.log is not None else "uniform"
        low, high = self._bounds
        return f"{kind} in {low:g} to {high:g}"

    @property
    def ends(self) -> tuple[float, float]:
        """Smallest and largest value."""
        low, high = self._bounds
        return (int(low), int(high)) if self.integer is not None else (low, high)

    @property
    def _bounds(self) -> tuple[float, float]:
        low, high = next(bounds for bounds in (self.uniform, self.log, self.integer) if bounds is not None)
        return low, high

    @property
    def distribution(self) -> BaseDistribution:
        """As Optuna has it."""
        from optuna.distributions import FloatDistribution, IntDistribution

        low, high = self._bounds
        if self.integer is not None:
            return IntDistribution(int(low), int(high))
        return FloatDistribution(low, high, log=self.log is not None)


def _kind(values: object) -> str:
    return "range" if isinstance(values, Mapping | Range) else "list"


Values = Annotated[
    Annotated[list[Any], Field(min_length=1), Tag("list")] | Annotated[Range, Tag("range")], Discriminator(_kind)
]
"""Each of a list, or all of a range."""


class SearchSpec(BaseModel):
    """Configurations that Optuna chooses, for each of the file's runs on its own."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    samples: PositiveInt
    """Configurations a run, each with all seeds."""
    space: Annotated[dict[str, Values], Field(min_length=1)]
    """Dotted setting -> a list of values, or a range."""
    seed: int = 0
    """Of the sampler."""


def space_of(spec: SearchSpec, run: RunConfig) -> dict[str, Values]:
    """The settings of the space that a run's method has."""
    fields = type(run.method).model_fields
    return {
        key: values
        for key, values in spec.space.items()
        if not key.startswith("method.") or key.partition(".")[2] in fields
    }


def check_space(spec: SearchSpec, runs: Iterable[RunConfig]) -> None:
    """Try every value of a list and both ends of a range.

    Raises:
        UserError: for one that does not go with a run.
    """
    for run in runs:
        for key, values in space_of(spec, run).items():
            for value in values.ends if isinstance(values, Range) else values:
                changed(run, {key: value})


def changed(run: RunConfig, settings: Mapping[str, Any]) -> RunConfig:
    """A run with settings replaced, by dotted name."""
    mapping = run.model_dump(mode="json")
    for key, value in settings.items():
        mapping = set_path(mapping, key, value)
    return parse_config(mapping, "search.space")


def distributions(space: Mapping[str, Values]) -> dict[str, BaseDistribution]:
    """As Optuna has them. Values of a list travel as JSON, because Optuna admits only plain ones."""
    from optuna.distributions import CategoricalDistribution

    return {
        key: values.distribution if isinstance(values, Range) else CategoricalDistribution(list(map(_encode, values)))
        for key, values in space.items()
    }


def decode(space: Mapping[str, Values], parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that Optuna's parameters stand for."""
    return {key: value if isinstance(space[key], Range) else json.loads(value) for key, value in parameters.items()}


def _encode(value: Any) -> str:
    return json.dumps(value, sort_keys=True)
