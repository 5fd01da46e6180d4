"""What an end task of images looks like: sizes, labels, and a few of the images in letters."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from aang_ray.data.images import ImageTask, LabelledImages, Pixels

if TYPE_CHECKING:
    from rich.console import Console

_SHADES = " .:-=+*#%@"
_SHOWN = 4


def render_images(task: ImageTask, console: Console) -> None:
    """Print sizes and labels as a table, and the first train images side by side."""
    from rich.markup import escape
    from rich.table import Table

    manifest = task.manifest
    console.print(f"[bold]{escape(task.name)}[/bold] from {escape(manifest['source'])}, decided by {task.metric}")
    console.print(f"Splits: {manifest['split']['method']}")
    splits = {"train": task.train, "dev": task.dev, "test": task.test}
    table = Table("label", *splits, title=f"Images of {task.height} x {task.width} pixels")
    counts = [np.bincount(split.labels, minlength=len(task.label_names)) for split in splits.values()]
    for index, label in enumerate(task.label_names):
        table.add_row(escape(label), *(str(count[index]) for count in counts))
    table.add_section()
    table.add_row("all", *(str(len(split)) for split in splits.values()))
    for column in table.columns[1:]:
        column.justify = "right"
    console.print(table)
    console.print(_side_by_side(task, task.train), markup=False, highlight=False)


def _side_by_side(task: ImageTask, split: LabelledImages) -> str:
    shown = range(min(_SHOWN, len(split)))
    drawn = [_drawn(split.pixels_NHW[index]) for index in shown]
    names = task.label_names
    titles = [f"{names[split.labels[i]]} (other: {names[split.others[i]]})".ljust(task.width) for i in shown]
    rows = [titles, *zip(*drawn, strict=True)]
    return "\n".join("   ".join(part.ljust(len(titles[0])) for part in row).rstrip() for row in rows)


def _drawn(pixels_HW: Pixels) -> list[str]:
    shades = (pixels_HW * (len(_SHADES) - 1)).round().astype(int)
    return ["".join(_SHADES[shade] for shade in row) for row in shades]
