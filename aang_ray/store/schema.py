"""What the store holds of a run: as Python values, as Arrow tables, and the way from one to the other.

`task` and `method` are hive partitions of the path. Scores are flat columns, `<view>_<score>`, so that they can be
queried by name. The configuration is JSON.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from types import UnionType
from typing import Any, ClassVar, Literal, TypeVar, get_args, get_type_hints

import numpy as np
import numpy.typing as npt
import pyarrow as pa

SCHEMA_VERSION = 3
"""Version 3 added the table `predictions`. Version 2 added `stage` to `history`, a null dev there, and more views."""
VERSION_KEY = b"aang_ray.schema"

TableName = Literal["results", "history", "weights", "predictions"]
PARTITIONS = ("task", "method")
VIEWS = ("dev", "test", "test_clean", "dev_before", "test_before", "test_clean_before")

Status = Literal["done", "failed", "cut"]
"""`cut`: a scheduler ended the run before its last step; it has its best dev score so far, and no test score."""
_CLASSES = 20
"""How many classes are told by name."""


@dataclass(frozen=True)
class Scores:
    """The scores of one model on one view of one split."""

    accuracy: float
    macro_f1: float
    examples: int
    per_class: Mapping[str, int]
    """Number of examples of each class."""
    loss: float

    @property
    def classes(self) -> str:
        """The number of examples of each class in words; of the first 20, where there are more."""
        counts = [f"{label} {count}" for label, count in self.per_class.items()]
        more = f" and {len(counts) - _CLASSES:,} more classes" if len(counts) > _CLASSES else ""
        return ", ".join(counts[:_CLASSES]) + more


@dataclass(frozen=True)
class HistoryRow:
    """One evaluation during training."""

    step: int
    """Optimiser steps so far, over all stages."""
    dev: Scores | None
    """None in a stage that dev is not scored in: a stage before the end-task head is trained."""
    losses: Mapping[str, float]
    """Mean training loss since the last evaluation, of the `end-task` and of each objective by name."""
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


def space_weights(
    weights: Mapping[str, float], factors: Mapping[str, Mapping[str, float]], *, published: bool
) -> dict[str, float]:
    """Return the weight of each objective of the space where that follows from the factors, else of the sampled ones.

    Args:
        weights: The weights of the objectives that the step sampled.
        factors: The factors by tensor and name.
        published: Whether the run has `objectives.allocation: published`, where data, transform and representation
            divide the batch, and only the output's factor enters the weight.
    """
    if not factors.get("A"):
        return dict(weights)
    letters = "O" if published else "DTRO"
    return softmax(
        {
            name: own
            + sum(
                factors[letter][part] for letter, part in zip("DTRO", name.split("/"), strict=True) if letter in letters
            )
            for name, own in factors["A"].items()
        }
    )


def softmax(logits: Mapping[str, float]) -> dict[str, float]:
    """Return the softmax of named logits."""
    largest = max(logits.values(), default=0.0)
    powers = {name: math.exp(value - largest) for name, value in logits.items()}
    return {name: power / sum(powers.values()) for name, power in powers.items()}


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


RowT = TypeVar("RowT", ResultRow, HistoryRow, WeightRow)

_NUMBERS = pa.map_(pa.string(), pa.float64())
_TYPES: dict[Any, pa.DataType] = {
    bool: pa.bool_(),
    int: pa.int64(),
    float: pa.float64(),
    str: pa.string(),
    Status: pa.string(),
    Mapping[str, int]: pa.map_(pa.string(), pa.int64()),
    Mapping[str, float]: _NUMBERS,
    Mapping[str, str]: pa.map_(pa.string(), pa.string()),
    Mapping[str, Mapping[str, float]]: pa.map_(pa.string(), _NUMBERS),
    Mapping[str, Any]: pa.string(),  # as JSON
}


def _fields(kind: type, view: str = "") -> list[pa.Field]:
    """Return the columns of a row's fields. Those of a view are null in the row of a run that was not scored on it."""
    columns = []
    for name, hint in get_type_hints(kind).items():
        optional = isinstance(hint, UnionType)
        of = get_args(hint)[0] if optional else hint
        if of is Scores:
            columns += _fields(Scores, f"{name}_")
        elif name not in PARTITIONS:
            columns.append(pa.field(view + name, _TYPES[of], nullable=optional or bool(view)))
    return columns


_CELL = pa.field("cell", pa.string(), nullable=False)
# `<view>_score` repeats the score that `metric` names, for queries over tasks of different metrics.
_CHOSEN = [pa.field(f"{view}_score", pa.float64()) for view in VIEWS]
_VERSION = {VERSION_KEY: str(SCHEMA_VERSION).encode()}

SCHEMAS: dict[TableName, pa.Schema] = {
    "results": pa.schema([*_fields(ResultRow), *_CHOSEN], metadata=_VERSION),
    "history": pa.schema([_CELL, *_fields(HistoryRow)], metadata=_VERSION),
    "weights": pa.schema([_CELL, *_fields(WeightRow)], metadata=_VERSION),
    "predictions": pa.schema(
        [
            _CELL,
            pa.field("split", pa.string(), nullable=False),
            # Where the example stands in the split, and a hash of its content as the model read it.
            pa.field("position", pa.int32(), nullable=False),
            pa.field("example", pa.string(), nullable=False),
            pa.field("label", pa.string(), nullable=False),
            pa.field("probabilities", pa.map_(pa.string(), pa.float32()), nullable=False),
        ],
        metadata=_VERSION,
    ),
}
"""Columns of the files."""


def with_partitions(name: TableName) -> pa.Schema:
    """Return the columns of a table as they are read: those of the files, then the partitions of the path."""
    return pa.schema([*SCHEMAS[name], *(pa.field(partition, pa.string(), False) for partition in PARTITIONS)], _VERSION)


def to_tables(record: CellRecord) -> dict[TableName, pa.Table]:
    """Return the tables of a run: `results` has one row, `predictions` one an example, the others one a logging."""
    result, cell = record.result, {"cell": record.result.cell}
    scores = {view: getattr(result, view) for view in VIEWS}
    chosen = {f"{view}_score": found and getattr(found, result.metric) for view, found in scores.items()}
    rows: dict[TableName, list[dict[str, Any]]] = {
        "history": [cell | _columns(row) for row in record.history],
        "weights": [cell | _columns(row) for row in record.weights],
        "results": [_columns(result) | chosen | {"config": json.dumps(result.config, allow_nan=False)}],
    }
    tables = {name: pa.Table.from_pylist(values, schema=SCHEMAS[name]) for name, values in rows.items()}
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
    offsets, names = pa.array(np.arange(count + 1) * classes, pa.int32()), pa.array([*label_names] * count, pa.string())
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
        result=_row(ResultRow, {**result, "config": json.loads(result["config"])}),
        history=tuple(_row(HistoryRow, row) for row in rows["history"]),
        weights=tuple(_row(WeightRow, row) for row in rows["weights"]),
    )


def _columns(row: ResultRow | HistoryRow | WeightRow | Scores, prefix: str = "") -> dict[str, Any]:
    """Return a row's columns: scores flat, and mappings as the pairs that Arrow takes for maps."""
    columns: dict[str, Any] = {}
    for name in (one.name for one in fields(row)):
        value = getattr(row, name)
        if isinstance(value, Scores):
            columns |= _columns(value, f"{name}_")
        elif value is not None:  # what is missing is null
            columns[prefix + name] = _pairs(value)
    return columns


def _pairs(value: Any) -> Any:
    return [(key, _pairs(inner)) for key, inner in value.items()] if isinstance(value, Mapping) else value


def _row(kind: type[RowT], columns: Mapping[str, Any]) -> RowT:
    """Return the row whose columns these are."""

    def scores(view: str) -> Scores | None:
        missing = columns[f"{view}_examples"] is None
        return None if missing else Scores(**{one.name: columns[f"{view}_{one.name}"] for one in fields(Scores)})

    names = (one.name for one in fields(kind))
    values: dict[str, Any] = {name: scores(name) if name in VIEWS else columns[name] for name in names}
    return kind(**values)
