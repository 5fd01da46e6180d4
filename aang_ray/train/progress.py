"""What a run has done so far, and its plain form for a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from aang_ray.store.rows import HistoryRow, Scores, WeightRow


@dataclass(frozen=True)
class SplitScores:
    """One model on all views that the store keeps."""

    dev: Scores
    test: Scores
    test_clean: Scores


@dataclass
class Progress:
    """What a run has done so far."""

    steps: int = 0
    """Of all stages."""
    stage: int = 0
    """Number of the stage it is in."""
    stage_steps: int = 0
    """Steps of that stage."""
    examples: int = 0
    """End-task examples."""
    tokens: int = 0
    history: list[HistoryRow] = field(default_factory=list)
    weights: list[WeightRow] = field(default_factory=list)
    best_step: int = 0
    best_score: float = -1.0
    since_best: int = 0
    """Evaluations without improvement."""
    majority: bool = True
    """No evaluation so far was better than the majority class."""
    before: SplitScores | None = None
    """Of the model that the last fine-tuning started from, once it has begun."""

    def next_stage(self) -> None:
        """Begin the next stage: what dev has decided so far belongs to the last one."""
        self.stage += 1
        self.stage_steps = self.since_best = 0
        self.best_step, self.best_score = 0, -1.0

    def state_dict(self) -> dict[str, Any]:
        """All of it as numbers, strings, lists and dicts."""
        return asdict(self)

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Progress:
        """What `state_dict` gave, as rows again."""
        rows: dict[str, Any] = {
            "history": [HistoryRow(**{**row, "dev": _scores(row["dev"])}) for row in state["history"]],
            "weights": [WeightRow(**row) for row in state["weights"]],
        }
        before = state["before"]
        if before is not None:
            rows["before"] = SplitScores(**{view: Scores(**scores) for view, scores in before.items()})
        return cls(**{**state, **rows})


def _scores(state: Mapping[str, Any] | None) -> Scores | None:
    return None if state is None else Scores(**state)
