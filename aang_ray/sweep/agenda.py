"""What a sweep set out to do, kept in the store for those who ask how far it is: `<store>/.progress/sweeps/*.json`."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from aang_ray.errors import UserError
from aang_ray.store.files import open_location
from aang_ray.sweep.plan import PlannedCell
from aang_ray.sweep.progress_files import FOLDER, as_fields, read_folder, write_json

SWEEPS = "sweeps"


@dataclass(frozen=True)
class AgendaCell:
    """One cell of a sweep."""

    cell: str
    title: str
    steps: int
    """Optimiser steps at most."""
    work: int
    """Texts that go through the body, see `PlannedCell.work`."""


@dataclass(frozen=True)
class Agenda:
    """The cells of a sweep in the order of its plan."""

    name: str
    """Of the sweep file, without its folder and suffix."""
    started_at: str
    """When the sweep was last started: UTC, ISO 8601."""
    cells: tuple[AgendaCell, ...]


def write_agenda(uri: str, sweep: Path, cells: Sequence[PlannedCell]) -> None:
    """Say what is to be done; the same sweep started again takes the place of its own earlier word.

    `uri` is the store's, `sweep` the sweep file. The file's name holds a hash of the cells, so that two sweeps whose
    files have one name do not overwrite each other.
    """
    location = open_location(uri)
    name = sweep.stem
    entries = [AgendaCell(cell.cell, cell.title, cell.steps, cell.work) for cell in cells]
    digest = hashlib.sha256("\n".join(sorted(entry.cell for entry in entries)).encode()).hexdigest()[:8]
    agenda = Agenda(name, datetime.now(UTC).isoformat(timespec="milliseconds"), tuple(entries))
    write_json(location, location.path(FOLDER, SWEEPS, f"{name}-{digest}.json"), asdict(agenda))


def read_agenda(uri: str, sweep: Path | None = None) -> Agenda:
    """The sweep that was last started on a store, among those of a sweep file's name if one is given.

    Raises:
        UserError: where there is none.
    """
    location = open_location(uri)
    found = [_parse(path, mapping) for path, mapping in read_folder(location, FOLDER, SWEEPS)]
    names = sorted({agenda.name for agenda in found})
    wanted = [agenda for agenda in found if sweep is None or agenda.name == sweep.stem]
    if not wanted and found:
        raise UserError(f"store {location.uri} knows no sweep {sweep}; it knows {', '.join(names)}")
    if not wanted:
        raise UserError(f"no sweep was started on store {location.uri}; start one with `aang sweep FILE --store URI`")
    return max(wanted, key=lambda agenda: agenda.started_at)


def _parse(path: str, mapping: dict[str, Any]) -> Agenda:
    cells = tuple(as_fields(path, cell, AgendaCell) for cell in mapping.get("cells", []))
    return as_fields(path, {**mapping, "cells": cells}, Agenda)
