"""Discriminative importance weighting, the baseline of alphaVIL. (semantics section 7)"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from aang_ray.config.methods import DiwConfig
from aang_ray.methods.base import Sampled
from aang_ray.methods.rounds import RoundMethod
from aang_ray.store.rows import WeightRow


class Diw(RoundMethod):
    """w_i <- max(w_i + rate (score of task i alone - score of all together), 1e-6), scores on dev.

    A round's training of all tasks together is tried again with the moved weights until its score exceeds the last
    round's, or `tries` are made; then the last try stands.
    """

    def __init__(self, names: Sequence[str], device: torch.device, config: DiwConfig) -> None:
        super().__init__(names, device)
        self.config = config
        self.tries = 0
        """Made in this round."""
        self.last_score = -1.0
        """Of the last round; before the first, less than any score."""
        self._objectives: tuple[int, ...] = ()
        self._health: dict[str, float] = {}

    def judge(self, objectives: Sequence[int], alone: Sequence[float], together: float) -> bool:
        """Move the weights after a try; whether the round is over."""
        self.move(objectives, [self.config.weight_lr * (score - together) for score in alone])
        self.tries += 1
        names = ["end-task", *(self._names[k] for k in objectives)]
        self._objectives = tuple(objectives)
        self._health = {f"alone/{name}": score for name, score in zip(names, alone, strict=True)}
        self._health |= {"together": together, "tries": float(self.tries)}
        return together > self.last_score or self.tries >= self.config.tries

    def end_round(self, together: float) -> None:
        """The next round is compared with this score."""
        self.last_score, self.tries = together, 0

    def describe(self, sampled: Sampled) -> WeightRow:
        return self.row(sampled.step + 1, self._objectives or sampled.objectives, self._health)

    def state_dict(self) -> dict[str, Any]:
        own = {"tries": self.tries, "last_score": self.last_score}
        return {**super().state_dict(), **own, "objectives": list(self._objectives), "health": dict(self._health)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.tries, self.last_score = int(state["tries"]), float(state["last_score"])
        self._objectives, self._health = tuple(state["objectives"]), dict(state["health"])
