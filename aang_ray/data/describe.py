"""What an end task looks like: sizes, labels, lengths, duplicates, corpora."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from aang_ray.data.digits import ImageTask, LabelledImages, Pixels
from aang_ray.data.tasks import EndTask, Ragged

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


_PERCENTILES = (5, 25, 50, 75, 95)


def describe(task: EndTask) -> dict[str, Any]:
    """An end task in numbers, as JSON values.

    Lengths are in tokens, special tokens included. Duplicates are counted on the splits as given,
    before `train_size`, in normalised texts.
    """
    splits = {"train": task.train, "dev": task.dev, "test": task.test}
    manifest = task.manifest
    return {
        "name": task.name,
        "source": manifest["source"],
        "metric": task.metric,
        "labels": list(task.label_names),
        "split": manifest["split"],
        "sizes": {name: len(split) for name, split in splits.items()},
        "label_counts": {name: _label_counts(task, split.labels) for name, split in splits.items()},
        "test_clean": {
            "size": len(task.test_clean),
            "label_counts": _label_counts(task, task.test.labels[task.test_clean]),
        },
        "tokens": {
            **{name: _lengths(split.tokens) for name, split in splits.items()},
            **{str(kind): _lengths(tokens) for kind, tokens in task.corpora.items()},
        },
        "max_tokens": manifest["max_tokens"],
        "truncated": manifest["truncated"],
        "duplicates": manifest["duplicates"],
        "corpora": manifest["corpora"],
        "neural_lm": manifest.get("neural_lm"),
        "external": {
            name: {
                "train": len(other.train),
                "labels": list(other.label_names),
                "columns": manifest["external"][name]["columns"],
                "left_out": manifest["external"][name]["left_out"],
            }
            for name, other in task.external.items()
        },
    }


def render(description: dict[str, Any], console: Console) -> None:
    """Print a description as tables."""
    from rich.markup import escape

    d = description
    console.print(f"[bold]{escape(d['name'])}[/bold] from {escape(d['source'])}, decided by {d['metric']}")
    console.print(f"Splits: {d['split']['method']}")
    console.print(_label_table(d))
    console.print(_length_table(d))
    dup = d["duplicates"]
    within = ", ".join(f"{name} {count}" for name, count in dup["within"].items())
    console.print(
        f"Duplicates within: {within}. Across: {dup['dev_in_train']} of dev and {dup['test_in_train']} of test "
        f"also in train, {dup['test_in_dev']} of test also in dev; {dup['test_clean']} test texts are in neither."
    )
    for kind, counts in d["corpora"].items():
        console.print(
            f"Corpus {kind}: {counts['passages']} passages; {counts['left_out']} left out, they are in dev or test."
        )
    if (written := d["neural_lm"]) is not None:
        console.print(
            f"Neural-LM text by {escape(written['model'])}: perplexity {written['perplexity']:.1f} of a token, "
            f"on {written['held_out']} held-out passages."
        )
    for name, other in d["external"].items():
        columns = ", ".join(column for column in other["columns"].values() if column is not None)
        read = f" (columns {escape(columns)})" if columns else ""
        console.print(
            f"External task {escape(name)}: {other['train']} examples{read}, {len(other['labels'])} labels; "
            f"{other['left_out']} left out, they are in dev or test."
        )
    if not d["corpora"]:
        console.print("No unlabelled text.")


def _label_table(d: dict[str, Any]) -> Table:
    from rich.markup import escape
    from rich.table import Table

    table = Table("label", "train", "dev", "test", "test, clean", title="Examples")
    columns = [*d["label_counts"].values(), d["test_clean"]["label_counts"]]
    for label in d["labels"]:
        table.add_row(escape(label), *(str(counts[label]) for counts in columns))
    table.add_section()
    table.add_row("all", *(str(size) for size in (*d["sizes"].values(), d["test_clean"]["size"])))
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def _length_table(d: dict[str, Any]) -> Table:
    from rich.table import Table

    heads = [f"{p} %" for p in _PERCENTILES]
    table = Table("texts", *heads, "longest", "cut", title=f"Tokens a text (at most {d['max_tokens']})")
    for name, lengths in d["tokens"].items():
        values = [lengths[f"p{p}"] for p in _PERCENTILES] + [lengths["max"], d["truncated"][name]]
        table.add_row(name, *(f"{value:g}" for value in values))
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def _label_counts(task: EndTask, labels: npt.NDArray[np.int64]) -> dict[str, int]:
    counts = np.bincount(labels, minlength=len(task.label_names))
    return {name: int(count) for name, count in zip(task.label_names, counts, strict=True)}


def _lengths(tokens: Ragged) -> dict[str, float]:
    lengths = tokens.lengths if len(tokens) else np.zeros(1)
    percentiles = {
        f"p{p}": float(value) for p, value in zip(_PERCENTILES, np.percentile(lengths, _PERCENTILES), strict=True)
    }
    return percentiles | {"max": int(lengths.max()), "total": int(lengths.sum())}


# --- data.describe_images: What an end task of images looks like: sizes, labels, and a few of the images in letters.


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
