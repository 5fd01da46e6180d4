"""Predictions: classes, confusion, calibration and differences against values worked out by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from statsmodels.stats import contingency_tables

from aang_ray.errors import UserError
from aang_ray.report.errors import (
    calibration_error,
    class_scores,
    classified,
    confusion,
    describe_comparison,
    describe_errors,
    predictions_of,
)
from aang_ray.report.logged import Logged
from aang_ray.report.significance import mcnemar
from aang_ray.store import Store
from aang_ray.store.schema import prediction_table

Write = Callable[..., None]
LABELS = ("label", "<script>")
"""Names that could be taken for a column, and for HTML."""


def predict(store: Store, folder: Path, of: dict[str, list[list[float]]], shift: int = 0) -> Store:
    """A copy of a store whose runs predicted the second class with the given probabilities, one list a seed."""
    copy = Store(folder)
    truth = np.array([0, 0, 1, 1])
    for cell in store.done():
        record = store.record(cell)
        second = np.array(of[record.result.method][record.result.seed], dtype=np.float32)
        examples = [f"{i + shift:016x}" for i in range(4)]
        both = np.stack([1 - second, second], axis=1)
        table = prediction_table(cell, "test", LABELS, np.arange(4), examples, truth, both)
        copy.write(record.with_predictions(table))
    return copy


@pytest.fixture
def predicted(store: Store, write: Write, tmp_path: Path) -> Store:
    """Means over seeds: finetune 0.25 0.64 0.75 0.9 (one wrong), static 0.3 0.3 0.4 0.9 (another)."""
    for seed in (0, 1):
        write(store, seed=seed)
        write(store, method="static", seed=seed)
    return predict(
        store,
        tmp_path / "predicted",
        {
            "finetune": [[0.2, 0.44, 0.65, 0.85], [0.3, 0.84, 0.85, 0.95]],
            "static": [[0.3, 0.3, 0.4, 0.9], [0.3, 0.3, 0.4, 0.9]],
        },
    )


def test_the_mean_probability_over_seeds_decides(predicted: Store) -> None:
    frame = predictions_of(Logged(predicted), "finetune")
    assert list(frame["facts", "predicted"]) == ["label", "<script>", "<script>", "<script>"]
    assert list(frame["p", "<script>"]) == pytest.approx([0.25, 0.64, 0.75, 0.9])


def test_classes_confusion_and_calibration(predicted: Store) -> None:
    """finetune says 0 1 1 1 for 0 0 1 1. Confidences: 0.75 and 0.75 (right) in one bin, 0.64 (wrong) and 0.9 (right) in
    bins of their own: 2/4 * |1 - 0.75| + 1/4 * 0.64 + 1/4 * |1 - 0.9| = 0.125 + 0.16 + 0.025 = 0.31.
    """
    frame = predictions_of(Logged(predicted), "finetune")
    scores = class_scores(frame)
    assert list(scores.loc["label"]) == pytest.approx([1.0, 0.5, 2 / 3, 2])
    assert list(scores.loc["<script>"]) == pytest.approx([2 / 3, 1.0, 0.8, 2])
    assert confusion(frame).to_numpy().tolist() == [[1, 1], [0, 2]]
    assert calibration_error(frame) == pytest.approx(0.31)
    text = describe_errors(Logged(predicted), "finetune")
    assert "expected calibration error 31.00" in text
    assert "| \\<script> |" in text


def test_where_two_rows_differ(predicted: Store) -> None:
    """Example 1: static alone is right; example 2: finetune alone. McNemar with 1 against 1: p = 1."""
    texts = {i: f"text {i} | <b>" for i in range(4)}
    text = describe_errors(Logged(predicted), "finetune", "static-td", texts)
    assert text.startswith(
        "finetune and static-td on 4 examples of test: they differ on 2; only finetune is right on 1, "
        "only static-td on 1 (exact McNemar p 1.000)"
    )
    lines = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines()[4:6]]
    assert [line[:4] for line in lines] == [
        ["1", "label", "\\<script> 0.64", "label 0.70"],
        ["2", "\\<script>", "\\<script> 0.75", "label 0.60"],
    ]
    assert "text 1 \\| \\<b>" in text


def test_rows_that_read_other_examples_are_not_compared(predicted: Store, store: Store, tmp_path: Path) -> None:
    other = predict(store, tmp_path / "o", {"finetune": [[0.1] * 4] * 2, "static": [[0.1] * 4] * 2}, shift=1)
    mixed = Store(tmp_path / "mixed")
    for cell in store.done():
        of = other if store.record(cell).result.method == "static" else predicted
        table = of.predictions({cell}).select(["cell", "split", "position", "example", "label", "probabilities"])
        mixed.write(store.record(cell).with_predictions(table))
    with pytest.raises(UserError, match="finetune and static-td read other tokens"):
        describe_errors(Logged(mixed), "finetune", "static-td")


def test_older_rows_have_no_predictions(store: Store, write: Write) -> None:
    write(store)
    assert store.predictions().num_rows == 0
    with pytest.raises(UserError, match="row finetune has no stored predictions on test"):
        describe_errors(Logged(store), "finetune")


def frame_of(predicted: list[str], labels: list[str] | None, sure: float = 0.9) -> pd.DataFrame:
    p = np.array([[sure, 1 - sure] if one == "a" else [1 - sure, sure] for one in predicted], dtype=np.float32)
    return classified(labels, predicted, p, ["a", "b"])


def test_two_models_on_labelled_texts() -> None:
    """Of 8 texts of class a, the first is right on 7, the second on 2: 5 of them alone; the second alone on none."""
    labels = ["a"] * 8
    ours, theirs = frame_of(["a"] * 7 + ["b"], labels), frame_of(["a"] * 2 + ["b"] * 6, labels, 0.8)
    text = describe_comparison(("one", ours), ("two", theirs), [f"text {i}" for i in range(8)], shown=3)
    assert text.startswith(
        "one and two agree on 3 of 8 texts (37.50 %)\n"
        "accuracy in %: one 87.50, two 25.00; only one is right on 5, only two on 0 (exact McNemar p 0.062)"
    )
    assert "| 2       | a     | a 0.90 | b 0.80 | text 2 |" in text
    assert text.endswith("and 2 more\n")


def test_without_labels_there_is_no_test() -> None:
    same = frame_of(["a", "b"], None)
    text = describe_comparison(("one", same), ("two", same), ["x", "y"])
    assert text == (
        "one and two agree on 2 of 2 texts (100.00 %)\n"
        "the true labels are not known, so there is no test of which is better\n"
    )
    other = describe_comparison(("one", same), ("two", frame_of(["a", "a"], None)), ["x", "y"])
    assert "| example | one    | two    | text |" in other


@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_is_that_of_statsmodels(only_first: int, only_second: int) -> None:
    table = [[7, only_first], [only_second, 3]]
    assert mcnemar(only_first, only_second) == pytest.approx(
        contingency_tables.mcnemar(table, exact=True).pvalue, abs=1e-12
    )
