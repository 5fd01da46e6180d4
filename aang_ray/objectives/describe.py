"""What a person sees of a space: its grid, and what was ruled out and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from aang_ray.config.section import Semantics
from aang_ray.objectives.objective import Objective
from aang_ray.objectives.space import Space, enumerate_space, read_space


def render_space(name: str, legality: Semantics, console: Console) -> None:
    """Print a space: for its kinds of data a grid, outputs and transforms down, representations across.

    Kinds of data with the same grid share it.
    """
    space = enumerate_space(name, read_space(name), legality)
    everything = (*space.objectives, *space.ruled_out)
    console.print(f"{escape(name)}: {len(space)} objectives ({legality} semantics)", highlight=False)
    representations = _distinct(k.representation for k in everything)
    grids: dict[Grid, list[str]] = {}
    for data in _distinct(k.data for k in everything):
        grids.setdefault(_grid(space, data, representations), []).append(data)
    for grid, data_names in grids.items():
        table = Table(title=escape(", ".join(data_names)), title_justify="left")
        for column in ("output, transform", *representations):
            # Broken in two, so that the table fits into a terminal of 80 columns.
            table.add_column(escape(column.replace("-", "-\n", 1)))
        for output, rows in grid:
            table.add_section()
            table.add_row(f"[bold]{escape(output)}[/bold]")
            for transform, marks in rows:
                table.add_row(f"  {escape(transform)}", *marks)
        console.print(table)
    if space.ruled_out:
        console.print("Ruled out:")
        for reason, count in Counter(space.ruled_out.values()).items():
            console.print(f"  {count:3d}  {reason}", highlight=False)


Rows = tuple[tuple[str, tuple[str, ...]], ...]
Grid = tuple[tuple[str, Rows], ...]
"""By output and transform a mark for each representation."""


def _grid(space: Space, data: str, representations: tuple[str, ...]) -> Grid:
    legal = frozenset(space.objectives)
    named = [k for k in (*space.objectives, *space.ruled_out) if k.data == data]

    def mark(objective: Objective) -> str:
        return "yes" if objective in legal else "–" if objective in space.ruled_out else ""

    def rows(output: str) -> Rows:
        transforms = sorted({k.transform for k in named if k.output == output})
        return tuple((t, tuple(mark(Objective(data, t, r, output)) for r in representations)) for t in transforms)

    return tuple((output, rows(output)) for output in sorted({k.output for k in named}))


def _distinct(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(names))
