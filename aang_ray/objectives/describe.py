"""What a person sees of a space: its grid, and what was ruled out and why."""

from __future__ import annotations

from collections import Counter

from rich.console import Console
from rich.table import Table

from aang_ray.config.section import Semantics
from aang_ray.objectives.objective import Objective
from aang_ray.objectives.space import enumerate_space, read_space


def render_space(name: str, legality: Semantics, console: Console) -> None:
    """Print the grid of a space: data and output down, transform by representation across."""
    space = enumerate_space(name, read_space(name), legality)
    legal = set(space.objectives)
    everything = list(legal) + list(space.ruled_out)
    representations = list(dict.fromkeys(k.representation for k in (*space.objectives, *space.ruled_out)))
    grid: dict[tuple[str, str, tuple[str, ...]], list[str]] = {}
    for data, output, transform in sorted({(k.data, k.output, k.transform) for k in everything}):
        objectives = [Objective(data, transform, representation, output) for representation in representations]
        marks = tuple("yes" if k in legal else "–" if k in space.ruled_out else "" for k in objectives)
        grid.setdefault((output, transform, marks), []).append(data)  # kinds of data that are alike share a row
    table = Table(title=f"{name}: {len(space)} objectives ({legality} semantics)", title_justify="left")
    for column in ("data", "output", "transform", *representations):
        table.add_column(column, overflow="fold")
    for (output, transform, marks), data_names in grid.items():
        table.add_row(", ".join(data_names), output, transform, *marks)
    console.print(table)
    if space.ruled_out:
        console.print("Ruled out:")
        for reason, count in Counter(space.ruled_out.values()).items():
            console.print(f"  {count:3d}  {reason}")
