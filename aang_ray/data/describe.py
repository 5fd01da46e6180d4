"""What `aang data show` prints of an end task of texts: sizes, labels, lengths, duplicates, corpora."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from aang_ray.data.tasks import EndTask, Ragged

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_PERCENTILES = (5, 25, 50, 75, 95)
_SHOWN = 100
"""Characters of a text that is shown as an example."""


def describe(task: EndTask) -> dict[str, Any]:
    """Return an end task in numbers, as JSON values; duplicates are those before `data.train_size` cuts train."""
    splits = {"train": task.train, "dev": task.dev, "test": task.test}
    manifest = task.manifest
    copied = ("source", "split", "max_tokens", "truncated", "duplicates", "corpora", "neural_lm", "retrieved")
    return {
        "name": task.name,
        "metric": task.metric,
        "labels": list(task.label_names),
        **{name: manifest.get(name) for name in copied},
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
        "external": {
            name: {
                "train": len(other.train),
                "labels": list(other.label_names),
                **{key: manifest["external"][name][key] for key in ("columns", "left_out")},
            }
            for name, other in task.external.items()
        },
    }


def _label_counts(task: EndTask, labels: npt.NDArray[np.int64]) -> dict[str, int]:
    return dict(zip(task.label_names, np.bincount(labels, minlength=len(task.label_names)).tolist(), strict=True))


def _lengths(tokens: Ragged) -> dict[str, float]:
    lengths = tokens.lengths if len(tokens) else np.zeros(1)
    values = np.percentile(lengths, _PERCENTILES).tolist()
    percentiles: dict[str, float] = dict(zip((f"p{p}" for p in _PERCENTILES), values, strict=True))
    return percentiles | {"max": int(lengths.max()), "total": int(lengths.sum())}


def print_text_task(task: EndTask, console: Console) -> None:
    """Print the description of an end task: two tables, and a line for each corpus."""
    from rich.markup import escape
    from rich.table import Table

    d = describe(task)
    console.print(f"[bold]{escape(d['name'])}[/bold] from {escape(d['source'])}, decided by {d['metric']}")
    console.print(f"Splits: {d['split']['method']}")
    counts = d["label_counts"] | {"test, clean": d["test_clean"]["label_counts"]}
    console.print(count_table("Examples", counts))
    lengths = Table("texts", title=f"Tokens a text (at most {d['max_tokens']})")
    for heading in (*(f"{p} %" for p in _PERCENTILES), "longest", "cut"):
        lengths.add_column(heading, justify="right")
    for name, of_split in d["tokens"].items():
        values = [of_split[f"p{p}"] for p in _PERCENTILES] + [of_split["max"], d["truncated"][name]]
        lengths.add_row(name, *(f"{value:g}" for value in values))
    console.print(lengths)
    dup = d["duplicates"]
    within = ", ".join(f"{name} {count}" for name, count in dup["within"].items())
    console.print(
        f"Duplicates within: {within}. Across: {dup['dev_in_train']} of dev and {dup['test_in_train']} of test "
        f"also in train, {dup['test_in_dev']} of test also in dev; {dup['test_clean']} test texts are in neither."
    )
    for kind, count in d["corpora"].items():
        console.print(
            f"Corpus {kind}: {count['passages']} passages; {count['left_out']} left out, they are in dev or test."
        )
    if (written := d["neural_lm"]) is not None:
        console.print(
            f"Neural-LM text by {escape(written['model'])}: perplexity {written['perplexity']:.1f} of a token, "
            f"on {written['held_out']} held-out passages."
        )
    if (found := d["retrieved"]) is not None:
        console.print(
            f"Retrieved text: the {found['k']} nearest by BM25 to each of {found['queries']} train texts, from a pool "
            f"of {found['pool']} passages ({found['left_out']} of them repeated, or texts of train, dev or test)."
        )
        for text, nearest in found["examples"]:
            console.print(f"  {_cut(text)}\n    nearest: {_cut(nearest)}", markup=False, highlight=False)
    for name, other in d["external"].items():
        columns = ", ".join(column for column in other["columns"].values() if column is not None)
        read = f" (columns {escape(columns)})" if columns else ""
        console.print(
            f"External task {escape(name)}: {other['train']} examples{read}, {len(other['labels'])} labels; "
            f"{other['left_out']} left out, they are in dev or test."
        )
    if not d["corpora"]:
        console.print("No unlabelled text.")


def _cut(text: str) -> str:
    """Return the beginning of a text, on one line."""
    line = " ".join(text.split())
    return line if len(line) <= _SHOWN else f"{line[: _SHOWN - 1]}…"


def count_table(title: str, counts: dict[str, dict[str, int]]) -> Table:
    """Return a table of the number of examples by label (rows) and split (columns), with a row of sums."""
    from rich.markup import escape
    from rich.table import Table

    table = Table("label", title=title)
    for split in counts:
        table.add_column(split, justify="right")
    for label in next(iter(counts.values())):
        table.add_row(escape(label), *(str(of_label[label]) for of_label in counts.values()))
    table.add_section()
    table.add_row("all", *(str(sum(of_label.values())) for of_label in counts.values()))
    return table
