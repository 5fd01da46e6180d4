"""Where two rows of a table, or two models, differ example by example, and what single classes make of it.

A row has several seeds: its prediction for an example is the class of the highest mean probability over the seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from aang_ray.errors import UserError
from aang_ray.report.formats import markdown_grid
from aang_ray.report.logged import Logged
from aang_ray.report.significance import mcnemar, p_text

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
    differing, tested = _difference((first, ours), (second, theirs))
    title = f"{first} and {second} on {len(ours)} examples of {split}: they differ on {int(differing.sum())}; {tested}"
    hashes = dict(zip(ours.index, ours["facts", "example"], strict=True))
    return "\n\n".join([title, *_differing((first, ours), (second, theirs), differing, texts or hashes, SHOWN)]) + "\n"


def classified(
    labels: Sequence[str] | None, predicted: Sequence[str], probabilities_EC: npt.NDArray[np.float32], classes: Any
) -> pd.DataFrame:
    """Return the predictions of one model in the form of `predictions_of`.

    Args:
        labels: The true labels; None: they are not known.
        predicted: The label that the model gives each text.
        probabilities_EC: Its probabilities.
        classes: Their names, [C].
    """
    facts: dict[str, Any] = {"predicted": list(predicted)} | ({} if labels is None else {"label": list(labels)})
    both: pd.DataFrame = pd.concat(
        {"facts": pd.DataFrame(facts), "p": pd.DataFrame(probabilities_EC, columns=list(classes))}, axis=1
    )
    return both


def describe_comparison(
    first: tuple[str, pd.DataFrame], second: tuple[str, pd.DataFrame], texts: Sequence[str], shown: int | None = SHOWN
) -> str:
    """Return a text: how far two models agree, McNemar's test, and the texts on which they differ.

    Args:
        first: Name and predictions of a model, as `classified` returns them.
        second: Those of the other, on the same texts.
        texts: The texts.
        shown: How many texts are listed at most; None: all.
    """
    count = len(texts)
    differing, tested = _difference(first, second)
    agreed = count - int(differing.sum())
    lines = [f"{first[0]} and {second[0]} agree on {agreed:,} of {count:,} texts ({100 * agreed / count:.2f} %)"]
    if tested is None:
        lines.append("the true labels are not known, so there is no test of which is better")
    else:
        scores = [
            f"{name} {100 * (frame['facts', 'predicted'] == frame['facts', 'label']).mean():.2f}"
            for name, frame in (first, second)
        ]
        lines.append(f"accuracy in %: {', '.join(scores)}; {tested}")
    parts = _differing(first, second, differing, dict(enumerate(texts)), shown) if agreed < count else []
    return "\n\n".join(["\n".join(lines), *parts]) + "\n"


def _difference(first: tuple[str, pd.DataFrame], second: tuple[str, pd.DataFrame]) -> tuple[pd.Series, str | None]:
    """Return on which examples two predict different classes, and McNemar's test in words; None without true labels."""
    (one, ours), (other, theirs) = first, second
    differing = ours["facts", "predicted"] != theirs["facts", "predicted"]
    if ("facts", "label") not in ours.columns:
        return differing, None
    right, also_right = (frame["facts", "predicted"] == ours["facts", "label"] for frame in (ours, theirs))
    only_first, only_second = int((right & ~also_right).sum()), int((also_right & ~right).sum())
    alone = f"only {one} is right on {only_first}, only {other} on {only_second}"
    return differing, f"{alone} (exact McNemar p {p_text(mcnemar(only_first, only_second))})"


def _differing(
    first: tuple[str, pd.DataFrame],
    second: tuple[str, pd.DataFrame],
    differing: pd.Series,
    texts: Mapping[int, str],
    shown: int | None,
) -> list[str]:
    """Return a table of the examples on which two differ, and how many more there are."""
    (one, ours), (other, theirs) = first, second
    # First what both are sure of and disagree on.
    sure = pd.Series(np.minimum(_probabilities(ours).max(axis=1), _probabilities(theirs).max(axis=1)), ours.index)
    positions = sure[differing].sort_values(ascending=False, kind="stable").index[:shown]
    label = {"label": ours["facts", "label"][positions].tolist()} if ("facts", "label") in ours.columns else {}
    guesses = {name: [_guess(frame, at) for at in positions] for name, frame in ((one, ours), (other, theirs))}
    columns = {
        "example": [str(at) for at in positions],
        **label,
        **guesses,
        "text": [_shorten(texts[at]) for at in positions],
    }
    more = int(differing.sum()) - len(positions)
    return [markdown_grid(pd.DataFrame(columns), left=len(columns)), *([f"and {more:,} more"] if more else [])]


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
