"""A run's progress, its record (done, cut short or failed), and how a done one is never lost. No torch, no Ray."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa

import aang_ray
from aang_ray.config.run import RunConfig
from aang_ray.data.cache import cache_folder, content_key
from aang_ray.store import CellIsDone, NotWritten, Store
from aang_ray.store.schema import CellRecord, HistoryRow, ResultRow, Scores, Status, WeightRow

BEAT_SECONDS = 10.0
LOG_LINES = 30
"""Number of log lines in a failed row."""
PACKAGES = ("torch", "transformers", "tokenizers", "datasets", "numpy", "scikit-learn", "ray", "torchjd")
"""Packages whose versions a result may depend on."""


OnEvaluation = Callable[[HistoryRow, WeightRow | None], None]
"""What is called after an evaluation, with its rows of history and weights; None: the method has no weights."""


@dataclass(frozen=True)
class Heartbeat:
    """A sign of life between two evaluations, every `BEAT_SECONDS`."""

    step: int
    seconds: float
    loss: float | None
    """The last loss of the end task, or of the objective that is trained alone, that was read from the device."""


@dataclass(frozen=True)
class SplitScores:
    """Scores of one model on dev, test and the de-duplicated test view."""

    dev: Scores
    test: Scores
    test_clean: Scores


@dataclass
class Progress:
    """Counters and history of a run. The field names are part of the checkpoint format."""

    steps: int = 0
    """Optimiser steps of all stages."""
    stage: int = 0
    """Index of the current stage."""
    stage_steps: int = 0
    """Optimiser steps of the current stage."""
    examples: int = 0
    """End-task examples seen."""
    tokens: int = 0
    """Tokens without padding that went through the body."""
    history: list[HistoryRow] = field(default_factory=list)
    weights: list[WeightRow] = field(default_factory=list)
    best_step: int = 0
    """The step with the best dev score of the current stage, or of the one before if its model competes."""
    best_score: float = -1.0
    since_best: int = 0
    """Evaluations since the best one."""
    majority: bool = True
    """Whether no evaluation so far was better than predicting the majority class."""
    before: SplitScores | None = None
    """Scores of the model from which the final fine-tuning started; None before that stage."""
    search: dict[str, Any] | None = None
    """State of the search for objectives that help; None for a run without one."""

    @property
    def best_dev(self) -> Scores | None:
        """Dev scores at the best step; None before the first evaluation."""
        return next((row.dev for row in self.history if row.step == self.best_step), None)

    def next_stage(self, keeps_best: bool = False) -> None:
        """Begin the next stage: reset its step counter and, unless the best model so far competes, the best score."""
        self.stage += 1
        self.stage_steps = self.since_best = 0
        if not keeps_best:
            self.best_step, self.best_score = 0, -1.0

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Progress:

        def scores(values: Mapping[str, Any] | None) -> Scores | None:
            return None if values is None else Scores(**values)

        rows: dict[str, Any] = {
            "history": [HistoryRow(**{**row, "dev": scores(row["dev"])}) for row in state["history"]],
            "weights": [WeightRow(**row) for row in state["weights"]],
        }
        if state["before"] is not None:
            rows["before"] = SplitScores(**{view: Scores(**values) for view, values in state["before"].items()})
        return cls(**{**state, **rows})


def cell_record(
    config: RunConfig,
    progress: Progress,
    status: Status,
    *,
    device: str,
    precision: str,
    seconds: float,
    error: str | None = None,
    log: str = "",
    scores: SplitScores | None = None,
    clean_interval: tuple[float, float] | None = None,
    predictions: pa.Table | None = None,
) -> CellRecord:
    """Return the record of a cell, however it ended.

    Args:
        config: The cell's configuration.
        progress: The run's progress; its history and weights become part of the record.
        status: A `cut` run has the best dev scores so far and no test scores; a `failed` run has no scores.
        device, precision: Device and precision that were used, as the store names them.
        seconds: Duration of the run.
        error, log: Message of a failed run, stored on one line, and its log, of which the last `LOG_LINES` lines are
            kept.
        scores, clean_interval, predictions: Those of a run that is done: scores of the best model, the 95 % bootstrap
            interval of the metric on the de-duplicated test view, and the rows of the table `predictions`.
    """
    auxiliary, before = config.method.auxiliary, progress.before
    low, high = clean_interval or (None, None)
    result = ResultRow(
        cell=config.cell,
        group=config.group,
        row=config.row_name,
        task=config.task_name,
        method=config.method.name,
        space=config.space if auxiliary else None,
        n=str(config.n) if auxiliary else None,
        seed=config.seed,
        config=config.model_dump(mode="json"),
        metric=config.data.metric or "accuracy",
        status=status,
        error=None if error is None else " ".join(error.split()),
        log_tail="\n".join(log.splitlines()[-LOG_LINES:]) or None,
        dev=scores.dev if scores else progress.best_dev if status == "cut" else None,
        test=scores.test if scores else None,
        test_clean=scores.test_clean if scores else None,
        dev_before=before.dev if before and scores else None,
        test_before=before.test if before and scores else None,
        test_clean_before=before.test_clean if before and scores else None,
        test_clean_low=low,
        test_clean_high=high,
        majority=None if status == "failed" else progress.majority,
        best_step=None if status == "failed" else progress.best_step,
        steps=progress.steps,
        examples=progress.examples,
        tokens=progress.tokens,
        seconds=seconds,
        device=device,
        precision=precision,
        versions=versions(),
        finished_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    return CellRecord(result, tuple(progress.history), tuple(progress.weights)).with_predictions(predictions)


def failed_record(config: RunConfig, error: str, log: str = "") -> CellRecord:
    """Return the record of a cell whose run ended in an error that the training loop did not handle."""
    device, precision = config.resources.device, config.precision
    return cell_record(
        config, Progress(), "failed", device=device, precision=precision, seconds=0.0, error=error, log=log
    )


def versions() -> dict[str, str]:
    """Return the versions of Python, of this package and of `PACKAGES`."""
    found = {name: version(name) for name in PACKAGES}
    return {"python": platform.python_version(), "aang-ray": aang_ray.__version__, **found}


def write_row(store: Store, record: CellRecord) -> bool:
    """Write a run into the store. Where that fails, a done run goes into the cache, and `take_rows` moves it later.

    Returns:
        Whether it was written; false if another process has done the run meanwhile.

    Raises:
        NotWritten: It could not be written; the message says where the row is now.
    """
    try:
        store.write(record)
    except CellIsDone:
        return False
    except OSError as error:
        if record.result.status != "done":
            raise
        kept = Store(_kept_for(store))
        try:
            with suppress(CellIsDone):  # `take_rows` has read it from there
                kept.write(record)
        except OSError:  # the same disk: what is left is the checkpoint
            raise error from None
        raise NotWritten(
            f"{error}; the finished run is kept in {kept.uri}, and the same command writes it as soon as it can"
        ) from error
    return True


def take_rows(store: Store) -> None:
    """Move into the store what `write_row` could not write there earlier.

    Raises:
        NotWritten: The store still cannot be written.
    """
    folder = _kept_for(store)
    if not folder.is_dir():
        return
    kept = Store(folder)
    for cell in kept.done():
        write_row(store, kept.record(cell))
    shutil.rmtree(folder, ignore_errors=True)  # another process may move the same rows


def _kept_for(store: Store) -> Path:
    return cache_folder() / "unwritten" / content_key({"store": store.uri})
