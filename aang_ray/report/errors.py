"""Where two rows of a table differ, example by example, and what single classes make of it.

A row has several seeds: its prediction for an example is the class of the highest mean probability over the seeds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from aang_ray.errors import UserError
from aang_ray.report.formats import markdown_grid
from aang_ray.report.logged import Logged
from aang_ray.report.significance import p_text

SHOWN, BINS = 20, 10
"""Examples that are listed at most, and bins of the calibration error."""


def predictions_of(logged: Logged, row: str, split: str = "test") -> pd.DataFrame:
    """Return the mean probabilities of a row over its seeds, one line an example.

    Args:
        logged: The chosen runs of one column.
        row: The row.
        split: `dev` or `test`.

    Returns:
        `label`, `predicted`, and a column of probability for each class under `p`; the index is the position in the
        split.

    Raises:
        UserError: if the row's runs stored no predictions.
    """
    cells = set(logged.runs["cell"][logged.runs["row"] == row])
    table: pd.DataFrame = logged.store.predictions(cells).to_pandas(maps_as_pydicts="strict")
    table = table[table["split"] == split]
    if table.empty:
        raise UserError(f"row {row} has no stored predictions on {split}: it was run by an earlier version")
    # Apart from the other columns: a class may have any name.
    probabilities = pd.DataFrame(table["probabilities"].tolist(), index=table["position"])
    means = probabilities.groupby(level=0).mean()
    facts = table.groupby("position")[["label", "example"]].first()
    both: pd.DataFrame = pd.concat({"facts": facts.assign(predicted=means.idxmax(axis=1)), "p": means}, axis=1)
    return both


def describe_errors(
    logged: Logged, first: str, second: str | None = None, texts: Mapping[int, str] | None = None, split: str = "test"
) -> str:
    """Return a text: the classes of one row, or the examples on which two rows differ.

    Args:
        logged: The chosen runs of one column.
        first: A row.
        second: Another row; None: only the scores of the classes, the confusion and the calibration of the first.
        texts: The text of each position of the split, to be shown.
        split: `dev` or `test`.
    """
    ours = predictions_of(logged, first, split)
    if second is None:
        return _classes(first, ours) + "\n"
    theirs = predictions_of(logged, second, split)
    if list(ours["facts", "example"]) != list(theirs["facts", "example"]):
        raise UserError(f"{first} and {second} read other tokens: compare rows of the same data.max_tokens and encoder")
    label = ours["facts", "label"]
    right = {name: frame["facts", "predicted"] == label for name, frame in ((first, ours), (second, theirs))}
    only_first, only_second = right[first] & ~right[second], right[second] & ~right[first]
    differing = ours["facts", "predicted"] != theirs["facts", "predicted"]
    # First what both rows are sure of and disagree on.
    sure = pd.Series(np.minimum(_probabilities(ours).max(axis=1), _probabilities(theirs).max(axis=1)), ours.index)
    shown = sure[differing].sort_values(ascending=False, kind="stable").index[:SHOWN]
    from scipy import stats

    pairs = int(only_first.sum() + only_second.sum())
    p = stats.binomtest(int(only_first.sum()), pairs).pvalue if pairs else 1.0
    right_alone = f"only {first} is right on {int(only_first.sum())}, only {second} on {int(only_second.sum())}"
    title = (
        f"{first} and {second} on {len(label)} examples of {split}: they differ on {int(differing.sum())}; "
        f"{right_alone} (exact McNemar p {p_text(p)})"
    )
    grid = pd.DataFrame(
        {
            "example": [str(position) for position in shown],
            "label": label[shown].tolist(),
            first: [_guess(ours, position) for position in shown],
            second: [_guess(theirs, position) for position in shown],
            "text": [_shorten(texts[at]) if texts else ours.loc[at, ("facts", "example")] for at in shown],
        }
    )
    more = int(differing.sum()) - len(shown)
    return "\n\n".join([title, markdown_grid(grid), *([f"and {more} more"] if more else [])]) + "\n"


def class_scores(frame: pd.DataFrame) -> pd.DataFrame:
    """Return precision, recall, F1 and the number of examples of each class, as fractions."""
    label, predicted = frame["facts", "label"], frame["facts", "predicted"]
    lines = {}
    for name in _probabilities(frame).columns:
        given, said = (label == name).sum(), (predicted == name).sum()
        hits = ((label == name) & (predicted == name)).sum()
        lines[name] = {
            "precision": hits / said if said else 0.0,
            "recall": hits / given if given else 0.0,
            "f1": 2 * hits / (given + said) if given + said else 0.0,
            "examples": int(given),
        }
    return pd.DataFrame.from_dict(lines, orient="index")


def confusion(frame: pd.DataFrame) -> pd.DataFrame:
    """Return how many examples of each label (rows) were predicted as each class (columns)."""
    classes = list(_probabilities(frame).columns)
    counts = pd.crosstab(frame["facts", "label"], frame["facts", "predicted"])
    return counts.reindex(index=classes, columns=classes, fill_value=0)


def calibration_error(frame: pd.DataFrame) -> float:
    """Return the expected calibration error: mean |accuracy - confidence| of ten bins of confidence, by their size."""
    confidence = _probabilities(frame).max(axis=1).to_numpy()
    right = (frame["facts", "label"] == frame["facts", "predicted"]).to_numpy()
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    gaps = [abs(right[bins == b].mean() - confidence[bins == b].mean()) * (bins == b).mean() for b in np.unique(bins)]
    return float(sum(gaps))


def _probabilities(frame: pd.DataFrame) -> pd.DataFrame:
    found: Any = frame["p"]  # a frame, because the columns have two levels
    return pd.DataFrame(found)


def _classes(row: str, frame: pd.DataFrame) -> str:
    scores, counts = class_scores(frame), confusion(frame)
    header = ["class", "precision", "recall", "F1", "examples"]
    lines = [
        [str(name), *(f"{100 * line[part]:.2f}" for part in ("precision", "recall", "f1")), f"{line['examples']:,.0f}"]
        for name, line in scores.iterrows()
    ]
    table = counts.rename_axis(index="label \\ predicted", columns=None).reset_index().astype(str)
    return "\n\n".join(
        [
            f"{row}: classes in %, by the mean probability over the seeds; expected calibration error "
            f"{100 * calibration_error(frame):.2f}",
            markdown_grid(pd.DataFrame(lines, columns=header)),
            markdown_grid(table),
        ]
    )


def _guess(frame: Any, position: int) -> str:
    predicted = frame.loc[position, ("facts", "predicted")]
    return f"{predicted} {frame.loc[position, ('p', predicted)]:.2f}"


def _shorten(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 90 else f"{line[:89]}…"
