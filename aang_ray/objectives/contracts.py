"""What primitives must return: those of a user's file are not of this program, and a device names nobody's mistake."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from aang_ray.errors import UserError
from aang_ray.objectives.outputs import Head, Labels, Output, View
from aang_ray.objectives.texts import Int64
from aang_ray.objectives.transforms import Corrupted, Transform


def check_selected(transform: Transform, selected_T: npt.NDArray[Any], tokens: int) -> None:
    """A truth value for each token.

    Raises:
        UserError: naming the transform.
    """
    if not _are_truth_values(selected_T, tokens):
        raise UserError(f"transform {transform.name}: select returns no truth value for each of the texts' tokens")


def check_corrupted(transform: Transform, corrupted: Corrupted, real_T: npt.NDArray[np.bool_], size: int) -> None:
    """An id of the vocabulary for each token, truth values where there are any, and all special tokens kept.

    Raises:
        UserError: naming the transform.
    """
    name, tokens = f"transform {transform.name}", len(real_T)
    if not isinstance(corrupted, Corrupted) or np.shape(corrupted.ids_T) != (tokens,):
        raise UserError(f"{name}: returns no Corrupted with an id for each of the texts' tokens")
    if not _are_below(corrupted.ids_T, size):
        raise UserError(f"{name}: returns an id that is none of the vocabulary, 0 to {size - 1}")
    for field, value_T in (("kept_T", corrupted.kept_T), ("noised_T", corrupted.noised_T)):
        if value_T is not None and not _are_truth_values(value_T, tokens):
            raise UserError(f"{name}: {field} has no truth value for each of the texts' tokens")
    if corrupted.kept_T is not None and not (corrupted.kept_T | real_T).all():
        raise UserError(f"{name}: deletes special tokens")


def check_order(name: str, order_T: npt.NDArray[Any], tokens: int, highest: int) -> None:
    """A rank from 1 for each token.

    Raises:
        UserError: naming the representation.
    """
    if order_T.shape != (tokens,) or order_T.dtype.kind not in "iu":
        raise UserError(f"representation {name}: order returns no integer for each of the texts' tokens")
    if tokens and not 1 <= order_T.min() <= order_T.max() <= highest:
        lowest, found = order_T.min(), order_T.max()
        raise UserError(f"representation {name}: order returns ranks {lowest} to {found}; allowed: 1 to {highest}")


def check_labels(output: Output, labels: Labels, view: View) -> None:
    """One target for each text, or for each of ascending rows of the texts as they are read.

    Raises:
        UserError: naming the output.
    """
    name, texts = f"output {output.name}", len(view.original.lengths_E)
    if output.head.kind == "text":
        if not isinstance(labels, Labels) or labels.at_M is not None or len(labels.targets) != texts:
            raise UserError(f"{name}: returns no Labels with one target for each text, and no at_M")
        return
    if not isinstance(labels, Labels) or labels.at_M is None or len(labels.targets) != len(labels.at_M):
        raise UserError(f"{name}: returns no Labels with one target for each row of at_M")
    if not _are_rows(labels.at_M, int(view.kept_T.sum())):
        raise UserError(f"{name}: at_M does not name rows of the texts as they are read, in ascending order")


def check_targets(output: str, targets: npt.NDArray[Any], head: Head, vocabulary: int) -> None:
    """Classes that the head has, or as many numbers as it has outputs.

    Raises:
        UserError: naming the output.
    """
    size = vocabulary if head.size is None else head.size
    targets = np.asarray(targets)
    if np.issubdtype(targets.dtype, np.floating):
        if targets.shape[1:] != (size,):
            raise UserError(f"output {output}: its head has {size} numbers, and targets are of shape {targets.shape}")
    elif targets.ndim != 1 or not _are_below(targets, size):
        raise UserError(f"output {output}: returns a label that is none of its head's classes, 0 to {size - 1}")


def _are_truth_values(values: npt.NDArray[Any], count: int) -> bool:
    return np.shape(values) == (count,) and np.asarray(values).dtype == np.bool_


def _are_below(values: npt.NDArray[Any], size: int) -> bool:
    values = np.asarray(values)
    return values.dtype.kind in "biu" and (len(values) == 0 or bool(values.min() >= 0 and values.max() < size))


def _are_rows(values: Int64, rows: int) -> bool:
    return _are_below(values, rows) and bool((np.diff(values) >= 0).all())
