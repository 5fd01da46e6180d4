"""Outputs that ask how a token weighs in its text: TF and TF-IDF.

tf-idf(t, d) = count(t, d) * (1 + ln((1 + N) / (1 + n_t))), then each text's vector is divided by its Euclidean norm:
scikit-learn's values, with the N texts of the end task's train split alone behind the document counts n_t, whatever
data the objective reads. TF is the same without the second factor. The terms are token ids, special tokens left out;
the counts are those of the text before T. Labels are standardised by their mean and deviation over the tokens of
train, so that predicting the mean has a squared error of 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix
from sklearn.feature_extraction.text import TfidfTransformer

from aang_ray.data.task import Ragged
from aang_ray.objectives.outputs import Head, Labels, Output, View
from aang_ray.objectives.texts import Bool, Float64, Int32, Int64, Vocabulary

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
