"""A small end task made of random texts, and a step of it."""

from __future__ import annotations

import numpy as np

from aang_ray.data.tasks import EndTask, Labelled, Ragged
from aang_ray.objectives.sampling import SourceSettings
from aang_ray.objectives.source import BatchSource, OutputSettings, StepBatch
from aang_ray.objectives.space import Space
from aang_ray.objectives.texts import Texts, Vocabulary
from tests.objectives.conftest import make_texts

SPLITS = {
    "train": make_texts([9, 12, 7, 20] * 3, seed=1),
    "dev": make_texts([9, 12, 7, 20] * 3, seed=2),
    "test": make_texts([8, 15] * 6, seed=3),
}


def ragged(texts: Texts) -> Ragged:
    return Ragged(texts.ids_T, np.concatenate(([0], np.cumsum(texts.lengths_E))))


def step_of(space: Space, vocabulary: Vocabulary, step: int = 0) -> StepBatch:
    """Return a step with four texts for each objective."""
    train, dev, test = (Labelled(ragged(texts), np.arange(12) % 2) for texts in SPLITS.values())
    task = EndTask("t", ("a", "b"), "accuracy", train, dev, test, np.arange(12), None, {})
    settings = SourceSettings(end_task=4, auxiliary=4 * len(space), dev=4, dev_head=4, seed=0)
    source = BatchSource(task, space, len(space), vocabulary, OutputSettings(0.15, "sound", "mean"), settings)
    return source.step(step, with_dev=True)
