"""Rows to write: every part of a record follows from its cell's number, so that a whole row can be told from a part."""

from collections.abc import Callable

import pytest

from aang_ray.store import CellRecord, HistoryRow, ResultRow, Scores, WeightRow

MakeRecord = Callable[..., CellRecord]


def make(number: int, *, status: str = "done", evaluations: int = 3, task: str = "movie") -> CellRecord:
    scores = Scores(0.5 + number / 1000, 0.4, 7, {"neg": 3, "pos": 4}, 0.25)
    done = status == "done"
    return CellRecord(
        result=ResultRow(
            cell=f"{number:016x}",
            group="g",
            row="aang-td n=6",
            task=task,
            method="aang",
            space="td",
            n="6",
            seed=number,
            config={"seed": number, "optim": {"betas": [0.9, 0.98]}},
            metric="accuracy",
            status="done" if done else "failed",
            error=None if done else "loss is nan",
            log_tail=None if done else "step 3\nstep 4",
            dev=scores if done else None,
            test=scores if done else None,
            test_clean=scores if done else None,
            majority=False if done else None,
            best_step=30 if done else None,
            steps=60,
            examples=1920,
            tokens=50_000,
            seconds=12.5,
            device="cpu",
            precision="fp32",
            versions={"torch": "2.13.0"},
            finished_at="2026-01-02T03:04:05+00:00",
        ),
        history=tuple(
            HistoryRow(30 * i, scores, {"end_task": 0.1 * i, "movie · mask": 0.2}, 1.0 * i, 32 * i, 100 * i)
            for i in range(evaluations)
        ),
        weights=tuple(
            WeightRow(i, 0.5, {"a": 0.25, "b": 0.75}, {"A": {"a": 0.1, "b": 0.0}, "D": {}}, {"cosine": -0.1})
            for i in range(evaluations)
        ),
    )


@pytest.fixture
def make_record() -> MakeRecord:
    return make
