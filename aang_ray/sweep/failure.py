"""The row of a cell that ended in an error which the training loop did not foresee."""

from __future__ import annotations

from datetime import UTC, datetime

from aang_ray.config import RunConfig
from aang_ray.store import CellRecord, ResultRow
from aang_ray.train.run import versions

TAIL_LINES = 30


def failed_record(config: RunConfig, error: str, log: str = "") -> CellRecord:
    """A failed row with the error in one line and the last lines of the log; scores and counts are empty."""
    return CellRecord(
        ResultRow(
            cell=config.cell,
            group=config.group,
            row=config.row_name,
            task=config.task_name,
            method=config.method.name,
            space=config.space if config.method.auxiliary else None,
            n=str(config.n) if config.method.auxiliary else None,
            seed=config.seed,
            config=config.model_dump(mode="json"),
            metric=config.data.metric or "accuracy",
            status="failed",
            error=" ".join(error.split()),
            log_tail="\n".join(log.splitlines()[-TAIL_LINES:]) or None,
            dev=None,
            test=None,
            test_clean=None,
            majority=None,
            best_step=None,
            steps=0,
            examples=0,
            tokens=0,
            seconds=0.0,
            device=config.resources.device,
            precision=config.precision,
            versions=versions(),
            finished_at=datetime.now(UTC).isoformat(timespec="seconds"),
        )
    )
