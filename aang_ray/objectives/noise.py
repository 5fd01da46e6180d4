"""The Gaussian noise of noised embeddings, drawn on the host: the same on every device."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from aang_ray.objectives import randomness
from aang_ray.objectives.texts import Bool, Float32, Texts


@dataclass(frozen=True)
class Noise:
    """What is added to the input embedding of a token."""

    width: int
    """Of the embeddings."""
    deviation: float
    """Standard deviation of every component."""

    def draw(self, texts: Texts, noised_T: Bool) -> Float32:
        """Independent normal numbers for every noised token, [number of noised tokens, width]: from each text's key."""
        counts_E = np.bincount(texts.text_T[noised_T], minlength=len(texts.lengths_E))
        drawn = [
            randomness.generator(int(key.view(np.int64)), randomness.NOISE).standard_normal(
                (count, self.width), dtype=np.float32
            )
            for key, count in zip(texts.keys_E, counts_E, strict=True)
            if count
        ]
        everything = np.concatenate(drawn) if drawn else np.zeros((0, self.width), dtype=np.float32)
        return everything * np.float32(self.deviation)
