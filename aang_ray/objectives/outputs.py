"""Stage O: what is predicted, and by which kind of head. (docs/semantics.md, section 2.6)

An output is a function from a `View` of the texts to `Labels`, of the text before the transform. Integer labels are
learned by cross-entropy, real ones by squared error. docs/taxonomy.md lists all outputs, and says how to add one.

Shape suffixes: T tokens before the transform, E texts, M labels, C numbers in a label.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_matrix
from sklearn.feature_extraction.text import TfidfTransformer

from aang_ray.config.sections import Semantics
from aang_ray.data.tasks import Ragged
from aang_ray.objectives.objective import EXTERNAL, Objective, Rule
from aang_ray.objectives.texts import Bool, Float64, Int32, Int64, Texts, Vocabulary


@dataclass(frozen=True)
class Head:
    """The head that predicts the labels."""

    kind: Literal["vocabulary", "token", "text"]
    """Logits over the vocabulary at labelled tokens, or a two-layer perceptron on a token or a whole text."""
    size: int | None = None
    """Outputs of a perceptron; None: the number of classes of the objective's data set."""


@dataclass(frozen=True)
class View:
    """What an output's function is given: the texts before and after the transform, and the objective."""

    objective: Objective
    original: Texts
    real_T: Bool
    """Original tokens that are not special."""
    selected_T: Bool
    """Original tokens that the transform was told to corrupt."""
    kept_T: Bool
    """Original tokens that the transform did not delete."""
    vocabulary: Vocabulary
    labels: Semantics
    """The setting `objectives.labels`."""
    classes_E: Int64 | None
    """Class of each text in its own data set, if that has classes."""
    fitted: Any
    """What the output's `fit` returned."""

    @cached_property
    def row_T(self) -> Int64:
        """Return each original token's index among those that are read; a deleted one has that of the last kept one."""
        return np.cumsum(self.kept_T) - 1


@dataclass(frozen=True)
class Labels:
    """What an output's function returns."""

    targets: npt.NDArray[Any]
    """[M] integers (classes or token ids), or [M, C] real numbers."""
    at_M: Int64 | None = None
    """Indices of the labelled tokens among those that are read (`View.row_T`), ascending; None: one label a text."""
    by_queries: bool = False
    """Predict at mask-token queries that are appended to the text, with the positions of `at_M`, instead of there."""
    drawn_T: Bool | None = None
    """Original tokens to be replaced by samples of the denoise head. The targets, whether the sample differs, are then
    made on the device."""


@dataclass(frozen=True)
class Output:
    """A primitive of stage O."""

    stage: ClassVar[str] = "output"

    name: str
    head: Head
    label: Callable[[View], Labels]
    rules: tuple[Rule, ...] = ()
    fit: Callable[[Ragged, Vocabulary], Any] | None = None
    """(train texts of the end task, vocabulary) -> what `View.fitted` holds, computed once."""
    needs: frozenset[str] = frozenset()
    """Other outputs that the space must contain."""


# Tokens: denoise and next-token. With `labels: published`, denoising no-op predicts the selected, unchanged tokens.

DENOISE_HEAD = "denoise"
"""The shared vocabulary head of denoising, which also draws the replacements of `real-synthetic`."""

ORDERED = frozenset({"left-to-right", "right-to-left", "random-factorized"})
"""Representations under which a token does not see the one that comes next."""


def _denoise(view: View) -> Labels:
    k = view.objective
    if k.transform == "no-op" and k.representation in ORDERED and view.labels == "sound":
        return _next_token(view)
    before_T = np.concatenate(([True], view.kept_T[:-1]))
    labelled = np.flatnonzero(view.selected_T & (view.kept_T | before_T))
    return Labels(view.original.ids_T[labelled], view.row_T[labelled])


def _next_token(view: View) -> Labels:
    ids_T, text_T = view.original.ids_T, view.original.text_T
    representation = view.objective.representation
    if representation == "random-factorized":
        selected = np.flatnonzero(view.selected_T)
        return Labels(ids_T[selected], view.row_T[selected], by_queries=True)
    shift = -1 if representation == "right-to-left" else 1
    target_of = np.arange(len(ids_T)) + shift
    inside = (target_of >= 0) & (target_of < len(ids_T))
    clipped = np.clip(target_of, 0, max(len(ids_T) - 1, 0))
    labelled = np.flatnonzero(inside & (text_T[clipped] == text_T) & view.real_T[clipped] & view.kept_T)
    return Labels(ids_T[labelled + shift], view.row_T[labelled])


DENOISE = Output(
    "denoise",
    Head("vocabulary"),
    _denoise,
    rules=(
        Rule(
            "denoising an uncorrupted input that every token sees is copying",
            lambda k: k.transform == "no-op" and k.representation not in ORDERED,
            published=False,
        ),
    ),
)
NEXT_TOKEN = Output(
    "next-token",
    Head("vocabulary"),
    _next_token,
    rules=(
        Rule(
            "the next token is visible under this representation: predicting it is copying",
            lambda k: k.representation not in ORDERED,
            published=False,
        ),
        Rule(
            "under a random order, predicting the next token of corrupted text is denoising",
            lambda k: k.representation == "random-factorized" and k.transform != "no-op",
        ),
    ),
)


# Properties of the tokens that are read: their capitalisation, and whether they are real.


def _capitalisation(view: View) -> Labels:
    """Label every token that is read with whether it began with an upper-case letter in the raw text."""
    if view.original.capitals_T is None:
        raise ValueError("the texts do not say which tokens are capitalised")
    labelled_T = view.real_T & view.kept_T
    return Labels(view.original.capitals_T[labelled_T].astype(np.int64), view.row_T[labelled_T])


def _real_synthetic(view: View) -> Labels:
    """Label every token that is read with whether it is a sample that differs from the original.

    Replaced-token detection (Clark et al. 2020): the selected tokens are masked, and samples of the denoise head's
    predictions, drawn without gradient, take their places.
    """
    labelled = np.flatnonzero(view.real_T & view.kept_T)
    return Labels(np.zeros(len(labelled), dtype=np.int64), view.row_T[labelled], drawn_T=view.selected_T)


CAPITALISATION = Output("capitalisation", Head("token", 2), _capitalisation)
REAL_SYNTHETIC = Output(
    "real-synthetic",
    Head("token", 2),
    _real_synthetic,
    rules=(
        Rule(
            "telling real from synthetic tokens needs the transform replace; masks, gaps and noise are easy to see",
            lambda k: k.transform != "replace",
        ),
    ),
    needs=frozenset({DENOISE_HEAD}),
)


# Classes of texts: the end task's, and those of another data set.

_READS_ALL = Rule(
    "the label of a text needs a representation that reads all of it",
    lambda k: k.representation in {"left-to-right", "right-to-left"},
)


def _class_of_text(view: View) -> Labels:
    assert view.classes_E is not None
    return Labels(view.classes_E)


END_TASK = Output(
    "end-task",
    Head("text"),
    _class_of_text,
    rules=(Rule("the output end-task needs the end task's data", lambda k: k.data != "end-task"), _READS_ALL),
)
SUPERVISED = Output(
    "supervised",
    Head("text"),
    _class_of_text,
    rules=(
        Rule(
            "supervised needs the data of another data set (external:NAME); for the end task's labels use end-task",
            lambda k: not k.data.startswith(EXTERNAL),
        ),
        _READS_ALL,
    ),
)


# Frequencies: TF and TF-IDF, scikit-learn's values.
#
# tf-idf(t, d) = count(t, d) * (1 + ln((1 + N) / (1 + n_t))), then each text's vector is divided by its Euclidean norm;
# TF is the same without the second factor. N and n_t are counted in the end task's train split. Special tokens are left
# out. Labels are standardised over the tokens of train, so that predicting the mean has a squared error of 1.

_ROUNDING = 1e-9
"""A deviation below this share of the mean is rounding noise: the values are positive and in double precision."""


@dataclass(frozen=True)
class Frequencies:
    """TF or TF-IDF, fitted on the train split: scikit-learn's transformer, and the scale of its values there."""

    transformer: Any
    size: int
    """Size of the vocabulary."""
    mean: float
    deviation: float

    @classmethod
    def fit(cls, train: Ragged, vocabulary: Vocabulary, use_idf: bool) -> Frequencies:
        """Fit on the end task's train texts."""
        ids_T, lengths_E = train.take(np.arange(len(train)))
        text_T = np.repeat(np.arange(len(train)), lengths_E)
        real_T, shape = vocabulary.real(ids_T), (len(train), vocabulary.size)
        transformer = TfidfTransformer(use_idf=use_idf).fit(_counts(ids_T, text_T, shape, real_T))
        plain = cls(transformer, vocabulary.size, mean=0.0, deviation=1.0)
        values = plain.values(ids_T, text_T, len(train), real_T)
        mean, deviation = float(values.mean()), float(values.std())
        # Where all values are equal up to rounding there is nothing to learn, and no deviation to divide by.
        return cls(transformer, vocabulary.size, mean, deviation if deviation > _ROUNDING * mean else 1.0)

    def values(self, ids_T: Int32, text_T: Int64, texts: int, real_T: Bool) -> Float64:
        """Return the standardised value of each real token in its text, given the index of each token's text."""
        weighted = self.transformer.transform(_counts(ids_T, text_T, (texts, self.size), real_T))
        raw_M = np.asarray(weighted[text_T[real_T], ids_T[real_T]], dtype=np.float64).reshape(-1)
        return (raw_M - self.mean) / self.deviation


def _counts(ids_T: Int32, text_T: Int64, shape: tuple[int, int], real_T: Bool) -> Any:
    """Return how often each text contains each token, [texts, vocabulary]."""
    ones = np.ones(int(real_T.sum()))
    return csr_matrix((ones, (text_T[real_T], ids_T[real_T])), shape=shape)  # adds up entries of the same place


def _frequency(view: View) -> Labels:
    texts = view.original
    values = view.fitted.values(texts.ids_T, texts.text_T, len(texts.lengths_E), view.real_T)
    read = view.kept_T[view.real_T]
    return Labels(values[read].astype(np.float32)[:, None], view.row_T[view.real_T & view.kept_T])


TF = Output("tf", Head("token", 1), _frequency, fit=partial(Frequencies.fit, use_idf=False))
TF_IDF = Output("tf-idf", Head("token", 1), _frequency, fit=partial(Frequencies.fit, use_idf=True))

OUTPUTS = (DENOISE, NEXT_TOKEN, TF_IDF, TF, CAPITALISATION, REAL_SYNTHETIC, END_TASK, SUPERVISED)
