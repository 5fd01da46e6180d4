"""What the store holds of a run: as Python values, as Arrow tables, and the way from one to the other.

`task` and `method` are not columns of the files. They are the hive partitions of the path, and every reader of hive
layouts (pyarrow, pandas, DuckDB, Spark) adds them. Scores are flat columns, `<view>_<score>`, so that they can be
queried by name. The configuration is JSON.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

SCHEMA_VERSION = 3
"""Version 3 added the table `predictions`.

Version 2 added `stage` to `history`, made dev nullable there, and added the views before a last stage to `results`.

One rule reads older files: a nullable column that an older file lacks is null.
"""
VERSION_KEY = b"aang_ray.schema"

TableName = Literal["results", "history", "weights", "predictions"]
PARTITIONS = ("task", "method")
VIEWS = ("dev", "test", "test_clean", "dev_before", "test_before", "test_clean_before")

_NUMBERS = pa.map_(pa.string(), pa.float64())
_COUNTS = pa.map_(pa.string(), pa.int64())
_STRINGS = pa.map_(pa.string(), pa.string())


def _field(name: str, kind: pa.DataType) -> pa.Field:
    return pa.field(name, kind, nullable=False)


def _scores(view: str, *, nullable: bool) -> list[pa.Field]:
    """Return the columns of one view. All of them are null in the row of a run that was not scored on the view."""
    columns = {
        "accuracy": pa.float64(),
        "macro_f1": pa.float64(),
        "loss": pa.float64(),
        "examples": pa.int64(),
        "per_class": _COUNTS,
    }
    return [pa.field(f"{view}_{name}", kind, nullable=nullable) for name, kind in columns.items()]


_RESULTS = [
    _field("cell", pa.string()),
    _field("group", pa.string()),
    _field("row", pa.string()),
    pa.field("space", pa.string()),
    pa.field("n", pa.string()),
    _field("seed", pa.int64()),
    _field("status", pa.string()),
    pa.field("error", pa.string()),
    pa.field("log_tail", pa.string()),
    _field("metric", pa.string()),
    # `<view>_score` repeats the score that `metric` names, for queries over tasks of different metrics.
    *(pa.field(f"{view}_score", pa.float64()) for view in VIEWS),
    *(column for view in VIEWS for column in _scores(view, nullable=True)),
    pa.field("test_clean_low", pa.float64()),
    pa.field("test_clean_high", pa.float64()),
    pa.field("majority", pa.bool_()),
    pa.field("best_step", pa.int64()),
    _field("steps", pa.int64()),
    _field("examples", pa.int64()),
    _field("tokens", pa.int64()),
    _field("seconds", pa.float64()),
    _field("device", pa.string()),
    _field("precision", pa.string()),
    _field("versions", _STRINGS),
    _field("finished_at", pa.string()),
    _field("config", pa.string()),
]

_HISTORY = [
    _field("cell", pa.string()),
    _field("step", pa.int64()),
    *_scores("dev", nullable=True),
    _field("losses", _NUMBERS),
    _field("seconds", pa.float64()),
    _field("examples", pa.int64()),
    _field("tokens", pa.int64()),
    pa.field("stage", pa.string()),
]

_WEIGHTS = [
    _field("cell", pa.string()),
    _field("step", pa.int64()),
    _field("end_task_weight", pa.float64()),
    _field("weights", _NUMBERS),
    _field("factors", pa.map_(pa.string(), _NUMBERS)),
    _field("health", _NUMBERS),
]

_PREDICTIONS = [
    _field("cell", pa.string()),
    _field("split", pa.string()),
    # Where the example stands in the split, and a hash of its content as the model read it.
    _field("position", pa.int32()),
    _field("example", pa.string()),
    _field("label", pa.string()),
    _field("probabilities", pa.map_(pa.string(), pa.float32())),
]

_VERSION = {VERSION_KEY: str(SCHEMA_VERSION).encode()}

SCHEMAS: dict[TableName, pa.Schema] = {
    "results": pa.schema(_RESULTS, metadata=_VERSION),
    "history": pa.schema(_HISTORY, metadata=_VERSION),
    "weights": pa.schema(_WEIGHTS, metadata=_VERSION),
    "predictions": pa.schema(_PREDICTIONS, metadata=_VERSION),
}
"""Columns of the files."""


def with_partitions(name: TableName) -> pa.Schema:
    """Return the columns of a table as they are read: those of the files, then the partitions of the path."""
    schema = SCHEMAS[name]
    for partition in PARTITIONS:
        schema = schema.append(_field(partition, pa.string()))
    return schema


Status = Literal["done", "failed", "cut"]
"""`cut`: a scheduler ended the run before its last step.

Such a run has its best dev score so far, and no test score.
"""


@dataclass(frozen=True)
class Scores:
    """The scores of one model on one view of one split."""

    accuracy: float
    macro_f1: float
    examples: int
    per_class: Mapping[str, int]
    """Number of examples of each class."""
    loss: float


@dataclass(frozen=True)
class HistoryRow:
    """One evaluation during training."""

    step: int
    """Optimiser steps so far, over all stages."""
    dev: Scores | None
    """None in a stage that dev is not scored in: a stage before the end-task head is trained."""
    losses: Mapping[str, float]
    """Mean training loss since the last evaluation, of the `end_task` and of each objective by name."""
    seconds: float
    examples: int
    """End-task examples so far."""
    tokens: int
    """Tokens, without padding, that went through the body so far."""
    stage: str | None = None
    """`tapt`, `dapt`, `train` or `finetune`. None in rows of schema version 1."""


@dataclass(frozen=True)
class WeightRow:
    """The weights of a method at one logged step."""

    step: int
    """Optimiser steps so far, over all stages."""
    end_task_weight: float
    """The weight of the end task, lambda."""
    weights: Mapping[str, float]
    """The weight of each objective that this step sampled. The weights sum to 1."""
    factors: Mapping[str, Mapping[str, float]]
    """The factors by tensor (`A`, `D`, `T`, `R`, `O`) and name."""
    health: Mapping[str, float]
    """Diagnostics since the last row, such as mean, standard deviation and all values of cos(v, g_E)."""


@dataclass(frozen=True)
class ResultRow:
    """One run. Its name is `cell`; runs that differ in their seed alone share `group`."""

    cell: str
    group: str
    row: str
    """Name of the row in a table that the run belongs to."""
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
    """The scores on the test texts that occur neither in train nor in dev."""
    majority: bool | None
    """Whether dev never scored above the majority class."""
    best_step: int | None
    steps: int
    examples: int
    tokens: int
    seconds: float
    device: str
    precision: str
    versions: Mapping[str, str]
    finished_at: str
    """Time in UTC, ISO 8601."""
    test_clean_low: float | None = None
    test_clean_high: float | None = None
    """With `test_clean_low`: 95 % bootstrap interval of the metric on `test_clean`, over its examples."""
    dev_before: Scores | None = None
    """With the next two: scores of the model that the last stage started from. None without a last stage."""
    test_before: Scores | None = None
    test_clean_before: Scores | None = None


@dataclass(frozen=True)
class CellRecord:
    """Everything that one run leaves: a row of results, its history, and its weights."""

    result: ResultRow
    history: tuple[HistoryRow, ...] = field(default=())
    weights: tuple[WeightRow, ...] = field(default=())
    predictions: ClassVar[pa.Table | None] = None
    """Rows of the table `predictions`, which `with_predictions` sets. It is no field, so that records are compared and
    shown without the thousands of examples; `Store.record` does not read it."""

    def with_predictions(self, predictions: pa.Table | None) -> CellRecord:
        """Return this record with the predictions that `prediction_table` made."""
        record = replace(self)
        object.__setattr__(record, "predictions", predictions)
        return record


_SCORE_FIELDS = tuple(field.name for field in fields(Scores))
_RESULT_FIELDS = tuple(field.name for field in fields(ResultRow))


def to_tables(record: CellRecord) -> dict[TableName, pa.Table]:
    """Return the tables of one run.

    `results` has one row, `predictions` one for each example, the others one for each time of logging.
    """
    cell = record.result.cell
    rows: dict[TableName, list[dict[str, Any]]] = {
        "history": [{"cell": cell, **_history_columns(row)} for row in record.history],
        "weights": [{"cell": cell, **_weight_columns(row)} for row in record.weights],
        "results": [_result_columns(record.result)],
    }
    tables: dict[TableName, pa.Table] = {
        name: pa.Table.from_pylist(values, schema=SCHEMAS[name]) for name, values in rows.items()
    }
    return tables if record.predictions is None else {**tables, "predictions": record.predictions}


def prediction_table(
    cell: str,
    split: str,
    label_names: Sequence[str],
    positions_E: npt.NDArray[np.int64],
    examples: Sequence[str],
    labels_E: npt.NDArray[np.int64],
    probabilities_EC: npt.NDArray[np.float32],
) -> pa.Table:
    """Return the rows of `predictions` of one split.

    Args:
        cell: Name of the run.
        split: `dev` or `test`.
        label_names: Name of each class, [C].
        positions_E: Where the examples stand in the split.
        examples: Hash of each example's content.
        labels_E: Class of each example.
        probabilities_EC: Probability of each class.
    """
    count, classes = probabilities_EC.shape
    names = pa.array([*label_names] * count, pa.string())
    offsets = pa.array(np.arange(count + 1) * classes, pa.int32())
    columns = {
        "cell": pa.array([cell] * count, pa.string()),
        "split": pa.array([split] * count, pa.string()),
        "position": pa.array(positions_E, pa.int32()),
        "example": pa.array(list(examples), pa.string()),
        "label": pa.array([label_names[label] for label in labels_E], pa.string()),
        "probabilities": pa.MapArray.from_arrays(offsets, names, pa.array(probabilities_EC.ravel(), pa.float32())),
    }
    return pa.table(columns, schema=SCHEMAS["predictions"])


def from_tables(tables: Mapping[TableName, pa.Table]) -> CellRecord:
    """Return the run whose tables these are, as the store reads them: with `task` and `method`."""
    rows = {name: table.to_pylist(maps_as_pydicts="strict") for name, table in tables.items()}
    (result,) = rows["results"]
    return CellRecord(
        result=_read_result(result),
        history=tuple(_read_history(row) for row in rows["history"]),
        weights=tuple(_read_weights(row) for row in rows["weights"]),
    )


def _result_columns(row: ResultRow) -> dict[str, Any]:
    columns = {name: getattr(row, name) for name in _RESULT_FIELDS if name not in (*VIEWS, *PARTITIONS)}
    columns["config"] = json.dumps(row.config, allow_nan=False)
    columns["versions"] = list(row.versions.items())
    for view in VIEWS:
        scores: Scores | None = getattr(row, view)
        columns[f"{view}_score"] = None if scores is None else getattr(scores, row.metric)
        columns.update(_score_columns(view, scores))
    return columns


def _read_result(columns: Mapping[str, Any]) -> ResultRow:
    values: dict[str, Any] = {
        name: _read_scores(name, columns) if name in VIEWS else columns[name] for name in _RESULT_FIELDS
    }
    values["config"] = json.loads(columns["config"])
    return ResultRow(**values)


def _score_columns(view: str, scores: Scores | None) -> dict[str, Any]:
    if scores is None:
        return {f"{view}_{name}": None for name in _SCORE_FIELDS}
    columns = {f"{view}_{name}": getattr(scores, name) for name in _SCORE_FIELDS}
    columns[f"{view}_per_class"] = list(scores.per_class.items())
    return columns


def _read_scores(view: str, columns: Mapping[str, Any]) -> Scores | None:
    if columns[f"{view}_examples"] is None:
        return None
    return Scores(**{name: columns[f"{view}_{name}"] for name in _SCORE_FIELDS})


def _history_columns(row: HistoryRow) -> dict[str, Any]:
    return {
        "step": row.step,
        **_score_columns("dev", row.dev),
        "losses": list(row.losses.items()),
        "seconds": row.seconds,
        "examples": row.examples,
        "tokens": row.tokens,
        "stage": row.stage,
    }


def _read_history(columns: Mapping[str, Any]) -> HistoryRow:
    return HistoryRow(
        step=columns["step"],
        dev=_read_scores("dev", columns),
        losses=columns["losses"],
        seconds=columns["seconds"],
        examples=columns["examples"],
        tokens=columns["tokens"],
        stage=columns["stage"],
    )


def _weight_columns(row: WeightRow) -> dict[str, Any]:
    return {
        "step": row.step,
        "end_task_weight": row.end_task_weight,
        "weights": list(row.weights.items()),
        "factors": [(stage, list(factor.items())) for stage, factor in row.factors.items()],
        "health": list(row.health.items()),
    }


def _read_weights(columns: Mapping[str, Any]) -> WeightRow:
    return WeightRow(**{field.name: columns[field.name] for field in fields(WeightRow)})
