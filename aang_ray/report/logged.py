"""What the chosen runs of a table logged, as tidy frames: weights, factors, losses, distances.

Every frame has the columns `row`, `column`, `seed` and `step`, and a share `part` of the run's steps in (0, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from aang_ray.errors import UserError
from aang_ray.report.select import read_runs
from aang_ray.report.table import build_table
from aang_ray.store import Store
from aang_ray.store.schema import softmax, space_weights

STAGES = {"λ": "end task (λ)", "D": "data", "T": "transform", "R": "representation", "O": "output"}
"""What the factors are of, by the letters of the store."""
EARLY, LATE = 0.1, 0.5
"""Early is the first tenth of the steps, late the last half, as in Figure 5 of the AANG paper."""
TOP, SHOWN = 5, 12
"""An objective is at the top if it is among the first 5 of a run; at most 12 are shown."""
_DISTANCE = "distance2/"


class Logged:
    """The chosen configuration of every row and column of a table, with the logs of its runs.

    Args:
        store: The store.
        rows: Only these rows; none: all.
        columns: Only these columns, by their label or their task; none: all.
        metric: `accuracy` or `macro_f1`, for every task; None: the metric of each task.

    Raises:
        UserError: for a row or column that the table does not have.
    """

    def __init__(
        self, store: Store, rows: Sequence[str] = (), columns: Sequence[str] = (), metric: str | None = None
    ) -> None:
        table = build_table(store, metric=metric)
        for name, wanted in (("row", rows), ("column", columns)):
            there = set(table[name].astype(str)) | (set(table["task"]) if name == "column" else set())
            for one in set(wanted) - there:
                raise UserError(f"the table has no {name} {one!r}; choose one of {', '.join(sorted(there))}")
        self.store = store
        self.table = table[
            (table["row"].isin(rows) | (not rows))
            & (table["column"].isin(columns) | table["task"].isin(columns) | (not columns))
        ]
        """The lines of the table."""
        runs = read_runs(store, metric)
        places = self.table[["group", "row", "column"]].astype(str)
        self.runs = runs[runs["status"] == "done"].drop(columns=["row", "column"]).merge(places, on="group")
        """The runs of the chosen configurations."""

    def factors(self) -> pd.DataFrame:
        """Return `stage` (λ, D, T, R, O), `name` and `value`: λ, and the softmax of the factors within each stage."""

        def lines(log: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
            yield {"stage": "λ", "name": "end task", "value": log["end_task_weight"]}
            for stage, factors in log["factors"].items():
                for name, value in softmax(factors).items() if stage in STAGES else ():
                    yield {"stage": stage, "name": name, "value": value}

        return self._frame(self.store.weights, lines, ["stage", "name", "value"])

    def weights(self) -> pd.DataFrame:
        """Return `objective` and `weight`: w over the whole space where it follows from factors, else of the step."""
        published = {
            run["cell"]: run["choices"].get("objectives.allocation") == "published"
            for run in self.runs.to_dict("records")
        }

        def lines(log: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
            weights = space_weights(log["weights"], log["factors"], published=published[log["cell"]])
            for name, weight in weights.items():
                yield {"objective": name, "weight": weight}

        return self._frame(self.store.weights, lines, ["objective", "weight"])

    def distances(self) -> pd.DataFrame:
        """Return `objective` and `distance`: estimates of the squared distance to the gradient of the end task."""
        frame = self._map(self.store.weights, "health", "distance")
        frame = frame[frame["objective"].str.startswith(_DISTANCE)]
        return frame.assign(objective=frame["objective"].str.removeprefix(_DISTANCE))

    def losses(self) -> pd.DataFrame:
        """Return `objective` and `loss`: each objective's own mean training loss since the last evaluation."""
        frame = self._map(self.store.history, "losses", "loss")
        return frame[frame["objective"] != "dev"]

    def _map(self, read: Callable[[set[str]], pa.Table], column: str, value: str) -> pd.DataFrame:
        """Return the entries of a column of maps, name by name, without a Python object for each."""
        places = self.runs.set_index("cell")[["row", "column", "task", "seed", "steps"]]
        log = read(set(places.index)).select(["cell", "step", column])
        maps = log.column(column).combine_chunks()
        ends = maps.offsets.to_numpy()
        inside = slice(int(ends[0]), int(ends[-1])) if len(ends) else slice(0)
        frame = log.select(["cell", "step"]).to_pandas()
        frame = frame.iloc[np.repeat(np.arange(len(frame)), np.diff(ends))].join(places, on="cell")
        frame = frame.reset_index(drop=True)
        names, values = (
            pd.Series(maps.keys[inside].to_pylist(), dtype=str),
            maps.items[inside].to_numpy(zero_copy_only=False),
        )
        frame = frame.assign(part=frame["step"] / frame["steps"], objective=names, **{value: values})
        tidy: pd.DataFrame = frame[["row", "column", "task", "seed", "step", "part", "objective", value]]
        return tidy

    def _frame(
        self,
        read: Callable[[set[str]], Any],
        lines: Callable[[Mapping[str, Any]], Iterator[dict[str, Any]]],
        columns: Sequence[str],
    ) -> pd.DataFrame:
        runs = {run["cell"]: run for run in self.runs.to_dict("records")}
        found = []
        for log in read(set(runs)).to_pylist(maps_as_pydicts="strict"):
            run = runs[log["cell"]]
            place = {name: run[name] for name in ("row", "column", "task", "seed")}
            place |= {"step": log["step"], "part": log["step"] / run["steps"]}
            found += [place | line for line in lines(log)]
        return pd.DataFrame(found, columns=["row", "column", "task", "seed", "step", "part", *columns])


def best_run(store: Store, task: str) -> tuple[str, str]:
    """Return the best run of a task by dev: of the row with the best mean, the seed with the best score.

    Args:
        store: The store.
        task: A task, or a column of the table.

    Returns:
        A sentence that says which run that is and how it was chosen, and its cell.

    Raises:
        UserError: if the table has no such task, or several columns of it.
    """
    logged = Logged(store, columns=[task])
    columns = [str(column) for column in logged.table["column"].unique()]
    if len(columns) > 1:
        raise UserError(f"--best {task}: choose one of the columns of the table: {', '.join(columns)}")
    row = max(logged.table.to_dict("records"), key=lambda line: line["dev_mean"])
    runs = [run for run in logged.runs.to_dict("records") if run["group"] == row["group"]]
    run = max(runs, key=lambda one: one["dev"])
    sentence = (
        f"best on {columns[0]} by dev {row['metric']}: {row['label']}, mean {100 * row['dev_mean']:.2f} over "
        f"{len(runs)} seed{'s' * (len(runs) > 1)}; of these, seed {run['seed']} with {100 * run['dev']:.2f} "
        f"(run {run['cell']})"
    )
    return sentence, str(run["cell"])


def best_cells(store: Store) -> list[tuple[str, list[str]]]:
    """Return of each row in each column of the table the best cell, as `best_run` chooses it, and all its cells."""
    logged = Logged(store)
    runs = read_runs(store, None)
    runs = runs[runs["status"] == "done"]
    places = logged.table[["group", "row", "column"]].astype(str)
    found = []
    for chosen in places.to_dict("records"):
        of_row = runs[(runs["row"].astype(str) == chosen["row"]) & (runs["column"].astype(str) == chosen["column"])]
        best = max(of_row[of_row["group"] == chosen["group"]].to_dict("records"), key=lambda run: run["dev"])
        found.append((str(best["cell"]), [str(cell) for cell in of_row["cell"]]))
    return found


def early_and_late(weights: pd.DataFrame) -> pd.DataFrame:
    """Return the mean weight of each objective in each run, `early` and `late`.

    A run that logged nothing in its first tenth has its first logged weights as early ones, and likewise for late ones.
    """
    run = ["row", "column", "task", "seed"]
    parts_of_run = weights.groupby(run)["part"]
    early = weights[(weights["part"] <= EARLY) | (weights["part"] == parts_of_run.transform("min"))]
    late = weights[(weights["part"] > 1 - LATE) | (weights["part"] == parts_of_run.transform("max"))]
    parts = {"early": early, "late": late}
    means = {name: part.groupby([*run, "objective"])["weight"].mean() for name, part in parts.items()}
    return pd.DataFrame(means).reset_index()


def often_on_top(means: pd.DataFrame, when: str) -> pd.DataFrame:
    """Return in which fraction of the runs an objective is among the first `TOP` by weight (the paper's Figure 5).

    Args:
        means: The lines of `early_and_late`.
        when: `early` or `late`.

    Returns:
        A line for each of the `SHOWN` objectives that are most often there, a column for each column of the table.
    """
    run = ["row", "column", "seed"]
    rank = means.groupby(run)[when].rank(ascending=False, method="first")
    counts = means[rank <= TOP].groupby(["objective", "column"]).size().unstack(fill_value=0)
    counts /= means.groupby(run).ngroups
    return counts.loc[counts.sum(axis=1).sort_values(ascending=False, kind="stable").index[:SHOWN]]


def readable(objective: str) -> str:
    """Return the name of an objective for people: the end task's own text is not named."""
    data, _, rest = objective.partition("/")
    parts = rest.split("/")
    return " · ".join(parts if data == "end-task" else [data, *parts]) if rest else objective
