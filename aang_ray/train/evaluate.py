"""Score a model on a split. Shape suffixes: E examples, C classes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from sklearn.metrics import accuracy_score, f1_score
from torch import Tensor, nn
from torch.nn import functional as F

from aang_ray.data.tasks import Labelled, Metric
from aang_ray.model.encoder import Encoder
from aang_ray.objectives.batch import BatchPiece, collate
from aang_ray.objectives.source import plain, unkeyed
from aang_ray.objectives.texts import Int64
from aang_ray.store.schema import Scores
from aang_ray.train.device import Compute

RESAMPLES = 1000
"""Resamples of a bootstrap interval."""
RESAMPLED_AT_ONCE = 4_000_000
"""Examples that are resampled at once; limits the memory."""
TEXTS_AT_ONCE = 128
"""Texts in a forward pass without gradients. It needs less memory than a training step of the paper's sizes."""


@dataclass(frozen=True)
class Predictions:
    """A model's output on labelled examples."""

    logits_EC: Tensor
    """Logits in host memory."""
    labels_E: Int64

    @property
    def classes_E(self) -> Int64:
        chosen: Int64 = self.logits_EC.argmax(dim=1).numpy()
        return chosen

    def take(self, indices: Int64) -> Predictions:
        """Return the predictions on some of the examples."""
        return Predictions(self.logits_EC[torch.from_numpy(indices)], self.labels_E[indices])

    def scores(self, label_names: Sequence[str]) -> Scores:
        """Return accuracy, macro-F1 over all stated labels, mean cross-entropy, and examples per class.

        Scores without examples are NaN. A label that neither occurs nor is predicted counts with F1 = 0.
        """
        stated = np.arange(len(label_names))
        counts = np.bincount(self.labels_E, minlength=len(label_names))
        if not len(self.labels_E):
            return Scores(float("nan"), float("nan"), 0, dict.fromkeys(label_names, 0), float("nan"))
        return Scores(
            accuracy=float(accuracy_score(self.labels_E, self.classes_E)),
            macro_f1=float(f1_score(self.labels_E, self.classes_E, labels=stated, average="macro", zero_division=0)),
            examples=len(self.labels_E),
            per_class={name: int(count) for name, count in zip(label_names, counts, strict=True)},
            loss=float(F.cross_entropy(self.logits_EC, torch.from_numpy(self.labels_E))),
        )


def score_of(scores: Scores, metric: Metric) -> float:
    """Return accuracy or macro-F1, whichever the metric is."""
    return scores.accuracy if metric == "accuracy" else scores.macro_f1


def bootstrap_interval(predictions: Predictions, metric: Metric, classes: int) -> tuple[float, float] | None:
    """Return the 95 % percentile interval of the metric over resampled examples; None below two examples."""
    if len(predictions.labels_E) < 2:
        return None
    from scipy.stats import bootstrap  # late: takes seconds to import

    def statistic(labels_RE: Int64, predicted_RE: Int64, axis: int) -> Any:
        if metric == "accuracy":
            return np.mean(labels_RE == predicted_RE, axis=axis)
        return _macro_f1(np.atleast_2d(labels_RE), np.atleast_2d(predicted_RE), classes)

    found = bootstrap(
        (predictions.labels_E, predictions.classes_E),
        statistic,
        paired=True,
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=max(1, RESAMPLED_AT_ONCE // len(predictions.labels_E)),
        method="percentile",
        rng=np.random.default_rng(0),
    )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def _macro_f1(labels_RE: Int64, predicted_RE: Int64, classes: int) -> npt.NDArray[np.float64]:
    """Return scikit-learn's macro-F1 over all `classes` of every row; one call for a row takes a millisecond there."""
    shape = (len(labels_RE), classes)
    first_R1 = np.arange(shape[0])[:, None] * classes
    labels_RE, predicted_RE = labels_RE + first_R1, predicted_RE + first_R1

    def counts_RC(places: Int64) -> Int64:
        return np.bincount(places.ravel(), minlength=shape[0] * classes).reshape(shape)

    hits_RC = counts_RC(labels_RE[labels_RE == predicted_RE])
    stated_and_predicted_RC = counts_RC(labels_RE) + counts_RC(predicted_RE)
    f1_RC: npt.NDArray[np.float64] = 2 * hits_RC / np.maximum(stated_and_predicted_RC, 1)  # 0 for classes in neither
    return np.asarray(f1_RC.mean(axis=1))


class Reader(Protocol):
    """A split on which models are scored."""

    def predict(self, encoder: Any, head: nn.Module, compute: Compute) -> Predictions:
        """Return the logits of every example in the split's order, computed in eval mode."""
        ...


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Switch dropout off inside the block."""
    training = [module.training for module in modules]
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for module, was_training in zip(modules, training, strict=True):
            module.train(was_training)


@contextmanager
def predicting(encoder: nn.Module, head: nn.Module, compute: Compute) -> Iterator[None]:
    """Use eval mode, inference mode and the run's precision inside the block."""
    with evaluating(encoder, head), torch.inference_mode(), compute.autocast():
        yield


class SplitReader:
    """The texts of a split with the indices `examples`, sorted by length and collated once, for repeated evaluation."""

    def __init__(self, split: Labelled, examples: Int64, pad_id: int) -> None:
        order = np.argsort(-split.tokens.lengths[examples], kind="stable")
        self._labels = split.labels[examples]
        self._inverse = np.argsort(order)
        self._pieces: list[BatchPiece] = []
        for start in range(0, len(order), TEXTS_AT_ONCE):
            chosen = examples[order[start : start + TEXTS_AT_ONCE]]
            segment = plain("split", "split", unkeyed(split.tokens, chosen), split.labels[chosen])
            self._pieces.append(collate([segment], pad_id))

    def predict(self, encoder: Encoder, head: nn.Module, compute: Compute) -> Predictions:
        parts = []
        with predicting(encoder, head, compute):
            for piece in self._pieces:
                inputs = piece.inputs.to(compute.device)
                parts.append(head(encoder.pool(encoder(inputs), inputs)).float())
        logits_EC = torch.cat(parts).cpu()[torch.from_numpy(self._inverse)] if parts else torch.zeros(0, 0)
        return Predictions(logits_EC, self._labels)
