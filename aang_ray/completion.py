"""What the shell offers after `aang VERB … <Tab>`: presets, settings with the names of the methods, runs, rows.

A shell waits for these functions at each press of the key. So they import little, and never ask a remote store.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import Any

import typer

from aang_ray.api import DEFAULT_STORE, STORE_VARIABLE
from aang_ray.errors import UserError

Item = tuple[str, str]
"""A word, and what zsh and fish show beside it."""


def presets(incomplete: str) -> list[str]:
    """Return the names of presets that begin with a word."""
    from aang_ray.sweep.presets import preset_names

    return _beginning(preset_names(), incomplete)


def settings(incomplete: str) -> list[str]:
    """Return `KEY=` of every setting that begins with a word; after `method=`, every method."""
    from aang_ray.config.methods import method_sections

    if incomplete.startswith("method="):
        return _beginning((f"method={name}" for name in method_sections()), incomplete)
    return _beginning(_keys(), incomplete)


def _keys() -> Iterator[str]:
    from aang_ray.config import RunConfig
    from aang_ray.config.methods import method_sections
    from aang_ray.config.sections import Section

    for name, field in RunConfig.model_fields.items():
        section = field.annotation
        if name == "method":
            fields = {key: None for method in method_sections().values() for key in method.model_fields}
            yield from ("method=", *(f"method.{key}=" for key in fields if key != "name"))
        elif isinstance(section, type) and issubclass(section, Section):
            yield from (f"{name}.{key}=" for key in section.model_fields if name != "fingerprints")
        else:
            yield f"{name}="


def cells(context: typer.Context, incomplete: str) -> list[Item]:
    """Return the runs of the store whose names begin with a word, each with its row, task and seed."""
    found = _runs(context, ["cell", "row", "task", "seed", "status"])
    return [
        (run["cell"], f"{run['row']} on {run['task']}, seed {run['seed']}, {run['status']}")
        for run in found
        if run["cell"].startswith(incomplete)
    ]


def rows(context: typer.Context, incomplete: str) -> list[str]:
    """Return the rows of the store's table that begin with a word."""
    found = _beginning(sorted({str(run["row"]) for run in _runs(context, ["row"])}), incomplete)
    # Other shells quote the spaces of a word by themselves.
    return [row.replace(" ", "\\ ") for row in found] if os.environ.get("_AANG_COMPLETE") == "complete_bash" else found


def tasks(context: typer.Context, incomplete: str) -> list[str]:
    """Return the tasks of the store that begin with a word."""
    return _beginning(sorted({str(run["task"]) for run in _runs(context, ["task"])}), incomplete)


def _runs(context: typer.Context, columns: list[str]) -> list[dict[str, Any]]:
    """Return the runs of the store that the command line names so far; none of a remote store."""
    uri = str(context.params.get("store") or os.environ.get(STORE_VARIABLE) or DEFAULT_STORE)
    if "://" in uri:
        return []
    from aang_ray.store import Store

    try:
        found: list[dict[str, Any]] = Store(uri).results(columns).to_pylist()
    except UserError:  # no store is there; the verb itself says so
        return []
    return found


def _beginning(words: Iterable[str], incomplete: str) -> list[str]:
    return [word for word in words if word.startswith(incomplete)]
