"""Makes the segment of any (transform, representation, output), for tests."""

from __future__ import annotations

from typing import Any

import numpy as np

from aang_ray.config.sections import Semantics
from aang_ray.objectives.objective import Objective
from aang_ray.objectives.packing import Segment
from aang_ray.objectives.primitives import BUILT_IN, Primitives
from aang_ray.objectives.source import OutputSettings, build
from aang_ray.objectives.texts import Texts, Vocabulary
from aang_ray.objectives.transforms import Noise

WIDTH = 32


def cell(
    transform: str,
    representation: str,
    output: str,
    texts: Texts,
    vocabulary: Vocabulary,
    *,
    labels: Semantics = "sound",
    rate: float = 0.15,
    data: str = "end-task",
    fitted: Any = None,
    primitives: Primitives = BUILT_IN,
    deviation: float = 1.0,
    width: int = WIDTH,
) -> Segment:
    settings = OutputSettings(rate, labels, "mean", Noise(width, deviation))
    classes = np.arange(len(texts.lengths_E)) % 2
    objective = Objective(data, transform, representation, output)
    return build(objective, output, texts, classes, vocabulary, settings, primitives, fitted)


def sees(segment: Segment) -> np.ndarray:
    """Who sees whom among all tokens of a segment, by the rule of docs/semantics.md, section 2.5."""
    text = np.repeat(np.arange(segment.examples), segment.lengths_E)
    allowed = segment.key_ranks_T[None, :] <= segment.ranks_T[:, None]
    visible: np.ndarray = (text[None, :] == text[:, None]) & (allowed | np.eye(len(text), dtype=bool))
    return visible
