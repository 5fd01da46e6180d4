"""The rows that a finished cell leaves behind. This module is the schema in Python; `schema.py` is it in Arrow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Status = Literal["done", "failed", "cut"]
"""`cut`: a scheduler ended the run before its last step; it has a dev score so far and no test score."""


@dataclass(frozen=True)
class Scores:
    """One model on one view of one split."""

    accuracy: float
    macro_f1: float
    examples: int
    per_class: Mapping[str, int]
    """Examples of each class in the view."""
    loss: float


@dataclass(frozen=True)
class HistoryRow:
    """One evaluation on dev, or the last step's losses before one."""

    step: int
    """Steps of all stages."""
    dev: Scores | None
    """None in a stage that dev does not decide in: before the end-task head is trained."""
    losses: Mapping[str, float]
    """Mean training loss since the last evaluation, by segment: `end_task`, and objectives by name."""
    seconds: float
    examples: int
    """End-task examples seen so far."""
    tokens: int
    """Real tokens that went through the body so far."""
    stage: str | None = None
    """`tapt`, `dapt`, `train` or `finetune`; None in rows that are older than stages."""


@dataclass(frozen=True)
class WeightRow:
    """The method's weights at one logged step."""

    step: int
    """Steps done, as in the history."""
    end_task_weight: float
    """lambda."""
    weights: Mapping[str, float]
    """Weight of each objective sampled at this step; sums to 1."""
    factors: Mapping[str, Mapping[str, float]]
    """Factor tensors by stage and name: `A`, `D`, `T`, `R`, `O`."""
    health: Mapping[str, float]
    """Diagnostics since the last row, such as the mean, the standard deviation and every value of cos(v, g_E)."""


@dataclass(frozen=True)
class ResultRow:
    """One cell."""

    cell: str
    group: str
    row: str
    """Name of the method's row in a table."""
    task: str
    method: str
    space: str | None
    n: str | None
    seed: int
    config: Mapping[str, Any]
    metric: str
    status: Status
    error: str | None
    log_tail: str | None
    dev: Scores | None
    test: Scores | None
    test_clean: Scores | None
    """On the test texts that occur neither in train nor in dev."""
    majority: bool | None
    """Whether dev never left what the majority class scores."""
    best_step: int | None
    steps: int
    examples: int
    tokens: int
    seconds: float
    device: str
    precision: str
    versions: Mapping[str, str]
    finished_at: str
    """UTC, ISO 8601."""
    test_clean_low: float | None = None
    test_clean_high: float | None = None
    """95 % bootstrap interval of the metric on the de-duplicated test view, over its examples."""
    dev_before: Scores | None = None
    """This and the next two: of the model that a final fine-tuning started from; None without one."""
    test_before: Scores | None = None
    test_clean_before: Scores | None = None


@dataclass(frozen=True)
class CellRecord:
    """All that one cell leaves: one row of results, its history and its weights."""

    result: ResultRow
    history: tuple[HistoryRow, ...] = field(default=())
    weights: tuple[WeightRow, ...] = field(default=())
