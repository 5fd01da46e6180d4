"""A split is scored by all workers together: worker r predicts the examples r, r + W, r + 2 W, ..."""

from __future__ import annotations

import torch

from aang_ray.train.evaluate import Predictions
from aang_ray.train.parallel.workers import Workers


def gathered(workers: Workers, own: Predictions, classes: int) -> Predictions:
    """The whole split's predictions in the split's order, from each worker's own; the same on all to the last bit."""
    if workers.size == 1:
        return own
    examples = round(workers.sum_host([len(own.labels_E)])[0])
    logits_EC = torch.zeros(examples, classes)
    labels_E = torch.zeros(examples, dtype=torch.int64)
    if len(own.labels_E):
        logits_EC[workers.rank :: workers.size] = own.logits_EC
        labels_E[workers.rank :: workers.size] = torch.from_numpy(own.labels_E)
    workers.sum_in_host_(logits_EC)
    workers.sum_in_host_(labels_E)
    return Predictions(logits_EC, labels_E.numpy())
