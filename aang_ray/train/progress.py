"""What a run has done so far, and its plain form for a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from aang_ray.store.rows import HistoryRow, Scores, WeightRow


@dataclass
class Progress:
    """What a run has done so far."""

    steps: int = 0
    tokens: int = 0
    history: list[HistoryRow] = field(default_factory=list)
    weights: list[WeightRow] = field(default_factory=list)
    best_step: int = 0
    best_score: float = -1.0
    since_best: int = 0
    """Evaluations without improvement."""
    majority: bool = True
    """No evaluation so far was better than the majority class."""

    def state_dict(self) -> dict[str, Any]:
        """All of it as numbers, strings, lists and dicts."""
        return asdict(self)

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Progress:
        """What `state_dict` gave, as rows again."""
        rows = {
            "history": [HistoryRow(**{**row, "dev": Scores(**row["dev"])}) for row in state["history"]],
            "weights": [WeightRow(**row) for row in state["weights"]],
        }
        return cls(**{**state, **rows})
