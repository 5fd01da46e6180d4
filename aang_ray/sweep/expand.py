"""From a sweep file to the list of its runs."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from aang_ray.config import RunConfig, parse_config
from aang_ray.config.load import nearest, set_path
from aang_ray.config.methods import method_sections
from aang_ray.errors import UserError
from aang_ray.sweep.spec import SweepOverrides, SweepSpec, parse_setting

RESERVED = {
    "seed": "seeds (or --seeds)",
    "data.task": "tasks (or --task)",
    "method": "methods",
    "method.name": "methods",
    "fingerprints": "nothing: they are measured",
}
"""Settings that a sweep varies by a field of their own."""


def expand(spec: SweepSpec, overrides: SweepOverrides, where: str) -> list[RunConfig]:
    """The runs of a sweep without their seeds (each holds seed 0), duplicates dropped, tasks varying slowest.

    A dotted `method.` setting of `grid` or `--set` is applied to the methods that have it. Relative
    paths are made absolute here, because trials may run in another directory.

    Raises:
        UserError: for a run that is not valid, or a setting that no method has.
    """
    settings = dict(parse_setting(text) for text in overrides.settings)
    if overrides.metric is not None:
        settings["data.metric"] = overrides.metric
    _check_settings(spec, settings, where)
    runs: dict[RunConfig, None] = {}
    for task, (index, method) in itertools.product(spec.tasks, enumerate(spec.methods)):
        label = f"{where}: methods[{index}]"
        for mapping in _variants(spec, task, method, settings, label):
            runs[_absolute_paths(parse_config(mapping, label))] = None
    return list(runs)


def _variants(
    spec: SweepSpec, task: str | dict[str, Any], method: str | dict[str, Any], settings: Mapping[str, Any], where: str
) -> Iterator[dict[str, Any]]:
    """Every combination of the grid's values for one task and one method."""
    changes = {"method": method} if isinstance(method, str) else dict(method)
    own_grid = _own_grid(changes.pop("grid", {}), where)
    mapping = _merge(spec.base, {"data": {"task": task} if isinstance(task, str) else task})
    mapping = _merge(mapping, changes)
    name = _method_name(mapping.get("method"))
    grid = {key: values for key, values in spec.grid.items() if _applies(key, name)} | own_grid
    last = {key: value for key, value in settings.items() if _applies(key, name)}
    for values in itertools.product(*grid.values()):
        variant = mapping
        for key, value in [*zip(grid, values, strict=True), *last.items()]:
            variant = _set(variant, key, value)
        yield {**variant, "seed": 0}


def _own_grid(grid: object, where: str) -> dict[str, list[Any]]:
    if not isinstance(grid, dict) or not all(isinstance(values, list) and values for values in grid.values()):
        raise UserError(
            f"{where}.grid: expected settings with a list of values each, for example method.aux_lr: [1, 0.1]"
        )
    for key in grid:
        _check_reserved(f"{where}.grid", key)
    return grid


def _merge(mapping: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`changes` laid over `mapping`, section by section; a `method` is replaced as a whole."""
    result = dict(mapping)
    for key, value in changes.items():
        inner = result.get(key)
        if key != "method" and isinstance(inner, Mapping) and isinstance(value, Mapping):
            value = _merge(inner, value)
        elif key != "method" and isinstance(value, Mapping) and inner is not None:
            raise UserError(f"base: {key}: expected a section of settings, got {inner!r}")
        result[key] = value
    return result


def _set(mapping: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """Set a dotted key; a method that is not named is, so that its settings are of no other."""
    if key.startswith("method.") and mapping.get("method") is None:
        mapping = {**mapping, "method": {"name": _method_name(None)}}
    return set_path(mapping, key, value)


def _method_name(method: object) -> str:
    """The name that a run's `method` stands for; the default method's where there is none."""
    if isinstance(method, str):
        return method
    default = RunConfig.model_fields["method"].default.name
    return str(method.get("name", default)) if isinstance(method, Mapping) else str(default)


def _applies(key: str, method: str) -> bool:
    """Whether a method has a setting; settings outside `method.` concern every run.

    An unknown method counts as having it: validation of the run names the method.
    """
    section, _, field = key.partition(".")
    model = method_sections().get(method)
    return section != "method" or model is None or field in model.model_fields


def _check_settings(spec: SweepSpec, settings: Mapping[str, Any], where: str) -> None:
    """Refuse settings that a sweep varies otherwise, settings of no method at all, and of none of a file's methods.

    `--set` is not held to the last: the same command line may go with many files.
    """
    known = sorted({field for model in method_sections().values() for field in model.model_fields})
    methods = list(dict.fromkeys(_method_of(spec, method) for method in spec.methods))
    searched = spec.search.space if spec.search is not None else {}
    sources: dict[str, Iterable[str]] = {
        f"{where}: grid": spec.grid,
        f"{where}: search.space": searched,
        "--set": settings,
    }
    for source, key in ((source, key) for source, keys in sources.items() for key in keys):
        _check_reserved(source, key)
        section, _, field = key.partition(".")
        if section == "method" and field not in known:
            close = nearest(field, known)
            hint = f"did you mean method.{close}?" if close else f"allowed: {', '.join(known)}"
            raise UserError(f"{source}: unknown key {key}; {hint}")
        if source != "--set" and not any(_applies(key, method) for method in methods):
            having = ", ".join(method for method in method_sections() if _applies(key, method))
            raise UserError(f"{source}: no method of the sweep ({', '.join(methods)}) has {key}; it is of {having}")


def _method_of(spec: SweepSpec, method: str | dict[str, Any]) -> str:
    """The name of the method that an entry of `methods` stands for over the base."""
    changes = {"method": method} if isinstance(method, str) else method
    return _method_name(changes.get("method", spec.base.get("method")))


def _check_reserved(source: str, key: str) -> None:
    if key in RESERVED:
        raise UserError(f"{source}: {key} is not set here, use {RESERVED[key]}")


def _absolute_paths(config: RunConfig) -> RunConfig:
    """The same run with every relative path that exists made absolute."""
    data, encoder = config.data, config.encoder
    names = ("task", "in_domain", "out_of_domain", "neural_lm")
    changes: dict[str, Any] = {name: _absolute(getattr(data, name)) for name in names}
    changes["external"] = tuple(str(_absolute(task)) for task in data.external)
    return config.model_copy(
        update={
            "data": data.model_copy(update=changes),
            "encoder": encoder.model_copy(update={"name": _absolute(encoder.name)}),
            "space": _absolute(config.space),
        }
    )


def _absolute(name: str | None) -> str | None:
    """Names of cards, spaces and packages stay; what is written as a path and exists becomes absolute."""
    if name is None or not ("/" in name or name.startswith((".", "~")) or Path(name).suffix):
        return name
    path = Path(name).expanduser()
    return str(path.resolve()) if path.exists() else name
