"""Score a model on a split, on the views that the store keeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from scipy.stats import bootstrap
from sklearn.metrics import accuracy_score, f1_score
from torch import Tensor, nn
from torch.nn import functional as F

from aang_ray.data.tasks import Labelled, Metric
from aang_ray.model.encoder import Encoder
from aang_ray.objectives.batch import BatchPiece, collate
from aang_ray.objectives.source import plain
from aang_ray.objectives.texts import Int64, Texts
from aang_ray.store.schema import Scores
from aang_ray.train.device import Compute

RESAMPLES = 1000
TEXTS_AT_ONCE = 128
"""Without gradients: less memory than any training step of the paper's sizes takes."""


@dataclass(frozen=True)
class Predictions:
    """What a model says of a split."""

    logits_EC: Tensor
    labels_E: Int64

    @property
    def classes_E(self) -> Int64:
        chosen: Int64 = self.logits_EC.argmax(dim=1).numpy()
        return chosen

    def take(self, indices: Int64) -> Predictions:
        """The same for some of the examples."""
        return Predictions(self.logits_EC[torch.from_numpy(indices)], self.labels_E[indices])

    def scores(self, label_names: Sequence[str]) -> Scores:
        """Accuracy, macro-F1 over the whole stated label set, mean cross-entropy, examples per class.

        A class of the label set that neither occurs nor is predicted counts with F1 = 0.
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


def bootstrap_interval(predictions: Predictions, metric: Metric, classes: int) -> tuple[float, float] | None:
    """95 % percentile interval of the metric over resampled examples; None below two examples.

    It says how far few test texts alone may move the score; the spread over seeds is another matter.
    """
    if len(predictions.labels_E) < 2:
        return None
    stated = np.arange(classes)

    def statistic(labels_E: Int64, predicted_E: Int64) -> float:
        if metric == "accuracy":
            return float(np.mean(labels_E == predicted_E))
        return float(f1_score(labels_E, predicted_E, labels=stated, average="macro", zero_division=0))

    found = bootstrap(
        (predictions.labels_E, predictions.classes_E),
        statistic,
        paired=True,
        vectorized=False,
        n_resamples=RESAMPLES,
        method="percentile",
        rng=np.random.default_rng(0),
    )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def score_of(scores: Scores, metric: Metric) -> float:
    """The number that the metric names."""
    return scores.accuracy if metric == "accuracy" else scores.macro_f1


class Reader(Protocol):
    """A split that a model can be scored on."""

    def predict(self, encoder: Any, head: nn.Module, compute: Compute) -> Predictions:
        """Logits of every example, in the split's order; eval mode for the time being."""
        ...


class SplitReader:
    """The texts of a split, sorted by length and laid out once, to be read many times."""

    def __init__(self, split: Labelled, examples: Int64, pad_id: int) -> None:
        order = np.argsort(-split.tokens.lengths[examples], kind="stable")
        self._labels = split.labels[examples]
        self._inverse = np.argsort(order)
        self._pieces: list[BatchPiece] = []
        for start in range(0, len(order), TEXTS_AT_ONCE):
            chosen = examples[order[start : start + TEXTS_AT_ONCE]]
            ids, lengths = split.tokens.take(chosen)
            texts = Texts(ids, lengths, np.zeros(len(chosen), dtype=np.uint64))
            self._pieces.append(collate([plain("split", "split", texts, split.labels[chosen])], pad_id))

    @torch.no_grad()
    def predict(self, encoder: Encoder, head: nn.Module, compute: Compute) -> Predictions:
        """Logits of every example, in the split's order; eval mode for the time being."""
        training = encoder.training
        encoder.eval()
        head.eval()
        parts = []
        with compute.autocast():
            for piece in self._pieces:
                inputs = piece.inputs.to(compute.device)
                parts.append(head(encoder.pool(encoder(inputs), inputs)).float())
        encoder.train(training)
        head.train(training)
        classes = parts[0].shape[1] if parts else 0
        logits_EC = torch.cat(parts).cpu()[torch.from_numpy(self._inverse)] if parts else torch.zeros(0, classes)
        return Predictions(logits_EC, self._labels)
