"""Outputs about the tokens that are there: how they were written, and whether they are real."""

from __future__ import annotations

import numpy as np

from aang_ray.objectives.legality import Rule
from aang_ray.objectives.outputs import DENOISE_HEAD, Head, Labels, Output, View


def _capitalisation(view: View) -> Labels:
    """Of every token that is read: whether it began with an upper-case letter in the raw text.

    For an uncased vocabulary the ids do not hold it; for a cased one it is easy, which is no reason to forbid it.
    """
    capitals_T = view.original.capitals_T
    if capitals_T is None:
        raise ValueError("the texts do not say which tokens are capitalised")
    asked_T = view.real_T & view.kept_T
    return Labels(capitals_T[asked_T].astype(np.int64), view.row_T[asked_T])


def _real_synthetic(view: View) -> Labels:
    """Of every token that is read: whether a sample of the denoise head that differs stands in its place.

    Replaced-token detection (Clark et al. 2020): the selected tokens are masked, the denoise head's predictions under
    full visibility are sampled without gradient, and a sample that hits the original counts as real.
    """
    asked = np.flatnonzero(view.real_T & view.kept_T)
    return Labels(np.zeros(len(asked), dtype=np.int64), view.row_T[asked], drawn_T=view.selected_T)


CAPITALISATION = Output("capitalisation", Head("token", 2), _capitalisation)
REAL_SYNTHETIC = Output(
    "real-synthetic",
    Head("token", 2),
    _real_synthetic,
    rules=(
        Rule(
            "telling real from synthetic tokens needs replaced ones; masks, gaps and noise show themselves",
            lambda k: k.transform != "replace",
        ),
    ),
    needs=frozenset({DENOISE_HEAD}),
)
