"""A cell's record as Arrow tables, and back, without loss."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import pyarrow as pa

from aang_ray.store.rows import CellRecord, HistoryRow, ResultRow, Scores, WeightRow
from aang_ray.store.schema import PARTITIONS, SCHEMAS, VIEWS, TableName

_SCORE_FIELDS = tuple(field.name for field in fields(Scores))
_RESULT_FIELDS = tuple(field.name for field in fields(ResultRow))


def to_tables(record: CellRecord) -> dict[TableName, pa.Table]:
    """The three tables of one cell; `results` has one row, the others as many as were logged."""
    cell = record.result.cell
    rows: dict[TableName, list[dict[str, Any]]] = {
        "history": [{"cell": cell, **_history_columns(row)} for row in record.history],
        "weights": [{"cell": cell, **_weight_columns(row)} for row in record.weights],
        "results": [_result_columns(record.result)],
    }
    return {name: pa.Table.from_pylist(values, schema=SCHEMAS[name]) for name, values in rows.items()}


def from_tables(tables: Mapping[TableName, pa.Table]) -> CellRecord:
    """The record whose tables, partitions included, these are."""
    rows = {name: table.to_pylist(maps_as_pydicts="strict") for name, table in tables.items()}
    (result,) = rows["results"]
    return CellRecord(
        result=_result(result),
        history=tuple(_history(row) for row in rows["history"]),
        weights=tuple(_weights(row) for row in rows["weights"]),
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


def _result(columns: Mapping[str, Any]) -> ResultRow:
    values: dict[str, Any] = {
        name: _scores(name, columns) if name in VIEWS else columns[name] for name in _RESULT_FIELDS
    }
    values["config"] = json.loads(columns["config"])
    return ResultRow(**values)


def _score_columns(view: str, scores: Scores | None) -> dict[str, Any]:
    if scores is None:
        return {f"{view}_{name}": None for name in _SCORE_FIELDS}
    columns = {f"{view}_{name}": getattr(scores, name) for name in _SCORE_FIELDS}
    columns[f"{view}_per_class"] = list(scores.per_class.items())
    return columns


def _scores(view: str, columns: Mapping[str, Any]) -> Scores | None:
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


def _history(columns: Mapping[str, Any]) -> HistoryRow:
    return HistoryRow(
        step=columns["step"],
        dev=_scores("dev", columns),
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


def _weights(columns: Mapping[str, Any]) -> WeightRow:
    return WeightRow(**{field.name: columns[field.name] for field in fields(WeightRow)})
