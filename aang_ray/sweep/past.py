"""What the store knows of a sweep's cells before it starts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from aang_ray.store import Store
from aang_ray.sweep.rungs import Past


def dev_scores(store: Store) -> dict[str, float]:
    """Dev score of every done cell, by its task's metric."""
    rows = store.results().select(["cell", "status", "dev_score"]).to_pylist()
    return {row["cell"]: row["dev_score"] for row in rows if row["status"] == "done" and row["dev_score"] is not None}


def read_past(store: Store, cells: Iterable[str]) -> dict[str, Past]:
    """Of the cells that are done or were cut, how far they came and how they scored on the way."""
    names = set(cells)
    rows = [row for row in store.results().to_pylist() if row["cell"] in names and row["status"] in ("done", "cut")]
    metric = {row["cell"]: row["metric"] for row in rows}
    history: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for row in store.history(metric).to_pylist():
        score = row[f"dev_{metric[row['cell']]}"]
        if score is not None:  # a stage that dev does not decide has none
            history[row["cell"]].append((row["step"], score))
    return {
        row["cell"]: Past(row["status"] == "done", row["steps"], row["dev_score"], history[row["cell"]]) for row in rows
    }
