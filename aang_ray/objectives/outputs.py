"""O: what is asked of a text after T and R, and which head answers.

An output is a head, a function from a `View` to `Labels`, and the rules about what it goes with. Integer labels are
learned by cross-entropy, real ones by squared error; either is a mean over the step's labels. (semantics section 2.6)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
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

DENOISE_HEAD = "denoise"
"""The shared vocabulary head of denoising, which also makes the replacements of `real-synthetic`."""


@dataclass(frozen=True)
class Head:
    """What answers."""

    kind: Literal["vocabulary", "token", "text"]
    """Logits over the vocabulary at labelled positions; or a two-layer perceptron on a position, or on a text."""
    size: int | None = None
    """Outputs of a perceptron; None: the classes of the objective's data set."""


@dataclass(frozen=True)
class View:
    """Texts after T and R, as an output sees them. Suffixes: T original tokens, N tokens that are read, E texts."""

    objective: Objective
    original: Texts
    """Before T."""
    real_T: Bool
    """Original tokens that are text, not special."""
    selected_T: Bool
    """Original tokens that T was to corrupt."""
    kept_T: Bool
    """Original tokens that T left where they are or put something in their place; the others are gone."""
    vocabulary: Vocabulary
    labels: Semantics
    classes_E: Int64 | None
    """Class of each text in its own data set, where that has classes."""
    fitted: Any
    """What the output's `fit` returned."""

    @cached_property
    def row_T(self) -> Int64:
        """Where each original token is read, or, if it is gone, the last one before it that is read."""
        return np.cumsum(self.kept_T) - 1


@dataclass(frozen=True)
class Labels:
    """What is asked. Suffix: M labels."""

    targets: npt.NDArray[Any]
    """[M] integers: classes or token ids; or [M, C] real numbers: values."""
    at_M: Int64 | None = None
    """Rows of the texts as they are read, ascending; None: one label a text, M = E."""
    by_queries: bool = False
    """Ask at mask-token queries appended to the text, one with the place of each row, instead of at the rows."""
    drawn_T: Bool | None = None
    """Original tokens in whose place the denoise head's own samples stand; the targets then are made on the device:
    1 where the sample differs from the original, else 0."""


@dataclass(frozen=True)
class Output:
    """A primitive of the stage O."""

    stage: ClassVar[str] = "output"

    name: str
    head: Head
    label: Callable[[View], Labels]
    rules: tuple[Rule, ...] = ()
    fit: Callable[[Ragged, Vocabulary], Any] | None = None
    """What the labels need to know of the end task's train texts, computed once."""
    needs: frozenset[str] = field(default_factory=frozenset)
    """Other outputs that a space must have, too."""


# --- objectives.token_labels: Outputs that ask for tokens. (semantics section 2.6)
#
# | transform · representation | denoise | next-token |
# |---|---|---|
# | mask, replace, bert-op, noised-embeddings, span-mask · any | the selected positions' own tokens | the next tokens |
# | deletion · any | before each gap, the first token that is gone | the next tokens |
# | no-op · left-to-right | as next-token | at every position the next token |
# | no-op · right-to-left | as next-token | at every position the previous token |
# | no-op · random-factorized | as next-token | at each selected target's query the target |
# | no-op · bidirectional (`published` legality only) | the selected positions' own, visible tokens | the next tokens |
#
# Tokens are always those before T. `labels: published`: denoising no-op always labels the selected positions with their
# own, unchanged tokens. Denoising what was only noised has a floor below ln V: as much as the noise leaves to be seen.


ORDERED = frozenset({"left-to-right", "right-to-left", "random-factorized"})
"""Representations under which a row does not see the token that comes next."""


def _denoise(view: View) -> Labels:
    k = view.objective
    if k.transform == "no-op" and k.representation in ORDERED and view.labels == "sound":
        return _next_token(view)
    before_T = np.concatenate(([True], view.kept_T[:-1]))
    asked = np.flatnonzero(view.selected_T & (view.kept_T | before_T))
    return Labels(view.original.ids_T[asked], view.row_T[asked])


def _next_token(view: View) -> Labels:
    ids_T, text_T = view.original.ids_T, view.original.text_T
    representation = view.objective.representation
    if representation == "random-factorized":
        asked = np.flatnonzero(view.selected_T)
        return Labels(ids_T[asked], view.row_T[asked], by_queries=True)
    shift = -1 if representation == "right-to-left" else 1
    target_of = np.arange(len(ids_T)) + shift
    inside = (target_of >= 0) & (target_of < len(ids_T))
    clipped = np.clip(target_of, 0, max(len(ids_T) - 1, 0))
    asked = np.flatnonzero(inside & (text_T[clipped] == text_T) & view.real_T[clipped] & view.kept_T)
    return Labels(ids_T[asked + shift], view.row_T[asked])


DENOISE = Output(
    "denoise",
    Head("vocabulary"),
    _denoise,
    rules=(
        Rule(
            "denoising an input that nothing corrupted and every position sees is copying",
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
            "under this representation the next token is seen: predicting it is copying",
            lambda k: k.representation not in ORDERED,
            published=False,
        ),
        Rule(
            "under a random order the next token is asked of intact text; of corrupted text that is denoising",
            lambda k: k.representation == "random-factorized" and k.transform != "no-op",
        ),
    ),
)


# --- objectives.surface: Outputs about the tokens that are there: how they were written, and whether they are real.


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


# --- objectives.text_labels: Outputs that ask for the class of a text: the end task's, and that of another data set.


READS_ALL = Rule(
    "the label of a text needs a representation that reads all of it",
    lambda k: k.representation in {"left-to-right", "right-to-left"},
)


def _class_of_text(view: View) -> Labels:
    if view.classes_E is None:
        raise ValueError(f"{view.objective.data} has no classes")
    return Labels(view.classes_E)


END_TASK = Output(
    "end-task",
    Head("text"),
    _class_of_text,
    rules=(
        Rule("an end-task label needs the end task's data", lambda k: k.data != "end-task"),
        READS_ALL,
    ),
)
SUPERVISED = Output(
    "supervised",
    Head("text"),
    _class_of_text,
    rules=(
        Rule(
            "labels of another data set need its data (external:NAME); the end task's are the output end-task",
            lambda k: not k.data.startswith(EXTERNAL),
        ),
        READS_ALL,
    ),
)


# --- objectives.frequencies: Outputs that ask how a token weighs in its text: TF and TF-IDF.
#
# tf-idf(t, d) = count(t, d) * (1 + ln((1 + N) / (1 + n_t))), then each text's vector is divided by its Euclidean norm:
# scikit-learn's values, with the N texts of the end task's train split alone behind the document counts n_t, whatever
# data the objective reads. TF is the same without the second factor. The terms are token ids, special tokens left out;
# the counts are those of the text before T. Labels are standardised by their mean and deviation over the tokens of
# train, so that predicting the mean has a squared error of 1.


ROUNDING = 1e-9
"""A deviation that is no more of the mean than this is none: the values are positive numbers of double precision."""


@dataclass(frozen=True)
class Frequencies:
    """scikit-learn's transformer fitted on train, and how its values lie there."""

    transformer: Any
    size: int
    mean: float
    deviation: float

    def values(self, ids_T: Int32, text_T: Int64, texts: int, real_T: Bool) -> Float64:
        """Standardised value of each real token in its text, [number of real tokens]."""
        raw_M = _values(self.transformer, ids_T, text_T, (texts, self.size), real_T)
        return (raw_M - self.mean) / self.deviation


def _counts(ids_T: Int32, text_T: Int64, shape: tuple[int, int], real_T: Bool) -> Any:
    ones = np.ones(int(real_T.sum()))
    return csr_matrix((ones, (text_T[real_T], ids_T[real_T])), shape=shape)  # entries that meet are added


def _values(transformer: Any, ids_T: Int32, text_T: Int64, shape: tuple[int, int], real_T: Bool) -> Float64:
    weighted = transformer.transform(_counts(ids_T, text_T, shape, real_T))
    return np.asarray(weighted[text_T[real_T], ids_T[real_T]], dtype=np.float64).reshape(-1)


def _fit(train: Ragged, vocabulary: Vocabulary, use_idf: bool) -> Frequencies:
    ids_T, lengths_E = train.take(np.arange(len(train)))
    text_T = np.repeat(np.arange(len(train)), lengths_E)
    real_T, shape = vocabulary.real(ids_T), (len(train), vocabulary.size)
    transformer = TfidfTransformer(use_idf=use_idf).fit(_counts(ids_T, text_T, shape, real_T))
    values = _values(transformer, ids_T, text_T, shape, real_T)
    mean, deviation = float(values.mean()), float(values.std())
    # Where all values are the same but for rounding there is nothing to learn, and nothing to divide by.
    return Frequencies(transformer, vocabulary.size, mean, deviation if deviation > ROUNDING * mean else 1.0)


def _label(view: View) -> Labels:
    texts, frequencies = view.original, view.fitted
    values = frequencies.values(texts.ids_T, texts.text_T, len(texts.lengths_E), view.real_T)
    read = view.kept_T[view.real_T]
    return Labels(values[read].astype(np.float32)[:, None], view.row_T[view.real_T & view.kept_T])


TF = Output("tf", Head("token", 1), _label, fit=partial(_fit, use_idf=False))
TF_IDF = Output("tf-idf", Head("token", 1), _label, fit=partial(_fit, use_idf=True))
