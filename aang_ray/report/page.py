"""A store as one self-contained page: what was found in words, the table, figures, every run, and what it cost."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from aang_ray.config import RunConfig
from aang_ray.errors import UserError
from aang_ray.report.logged import STAGES, TOP, Logged, early_and_late, often_on_top, readable
from aang_ray.report.select import flatten
from aang_ray.report.significance import LEVEL, p_text
from aang_ray.report.table import build_table
from aang_ray.report.weights import agreement
from aang_ray.store import Store

_POINTS = 60  # evaluations of a run that the page keeps
_RUN = ("cell", "row", "task", "seed", "status", "metric", "steps", "examples", "tokens", "seconds", "best_step")
_TOLD = ("device", "precision", "finished_at", "error", "log_tail", "dev_score", "test_score", "test_clean_score")


def build_page(store: Store, metric: str | None = None) -> str:
    """Return the page as HTML. It loads nothing from elsewhere.

    Args:
        store: The store.
        metric: `accuracy` or `macro_f1`, for every task; None: the metric of each task.

    Raises:
        UserError: where the store has nothing to report, or if Vega-Lite is missing.
    """
    try:
        import vl_convert
    except ImportError as error:
        raise UserError("the page needs Vega-Lite: pip install 'aang-ray[page]'") from error
    table = build_table(store, metric=metric, tests=True)
    logged = Logged(store, metric=metric)
    runs, (learned, top) = _runs(store), _learned(logged)
    found = summary(table)
    data = {
        "entries": [_entry(line) for line in table.to_dict("records")],
        "runs": runs,
        "learned": learned,
        "top": top,
        "curves": _curves(logged),
        "stages": STAGES,
    }
    parts = {
        "TITLE": escape(f"Results of {store.uri.rstrip('/').rpartition('/')[2]}"),
        "SUMMARY": _items([sentences[0] for sentences in found]),
        "REST": _items([sentence for sentences in found for sentence in sentences[1:]]),
        "NOTES": _items(table.attrs["notes"]),
        "COST": _cost(runs),
        # `<` never occurs in the data, so that no text of a data set or an error can end the element.
        "DATA": json.dumps(_finite(data), separators=(",", ":")).replace("<", "\\u003c"),
        "VEGA": vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;").replace("</script", "<\\/script"),
    }
    page = resources.files("aang_ray.report").joinpath("page.html").read_text(encoding="utf-8")
    pieces = page.split("@@")  # text and names in turns: what is put in is not looked through for names
    return "".join(parts[piece] if at % 2 else piece for at, piece in enumerate(pieces))


def summary(table: pd.DataFrame) -> list[list[str]]:
    """Return the result in sentences: for each column each comparison, first that of the row with the best dev score.

    Args:
        table: What `build_table` returns with `tests`.
    """
    found = []
    for column, part in table[table["chosen_by"] == "dev"].groupby("column", observed=True):
        lines = sorted(part.to_dict("records"), key=lambda line: -float(line["dev_mean"]))
        base = next((line for line in lines if pd.isna(line["pairs"])), None)
        compared = [line for line in lines if not pd.isna(line["pairs"])]
        if base is None or not compared:
            found.append(
                [f"On {column} there is nothing to compare: rows with and without auxiliary objectives are needed."]
            )
        else:
            found.append([_comparison(line, base, str(column)) for line in compared])
    return found


def _items(sentences: Sequence[str]) -> str:
    return "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences)


def _comparison(line: Mapping[Any, Any], base: Mapping[Any, Any], column: str) -> str:
    pairs = int(line["pairs"])
    seeds = f"{pairs} seed{'s' * (pairs != 1)}"
    if not pairs:
        return f"{line['row']} and {base['row']} on {column} have no seed in common: nothing can be said."
    points = 100 * line["difference"]
    text = f"{line['row']} is {abs(points):.2f} points {'above' if points >= 0 else 'below'} {base['row']} on {column}"
    if isinstance(line["no_test"], str):
        text += f", with {seeds}: not decided ({line['no_test']})."
    else:
        low, high = 100 * line["difference_low"], 100 * line["difference_high"]
        text += f" (95 % interval {low:+.2f} to {high:+.2f}), p {_equals(line['p_value'])} with {seeds}"
        if line["p_holm"] < LEVEL:
            text += f": this holds after Holm's correction for all rows (p {_equals(line['p_holm'])})."
        else:
            needed = line["seeds_needed"]
            more = "more than 10,000" if pd.isna(needed) else f"{max(1, int(needed) - pairs):,}"
            but = " after Holm's correction" if line["p_value"] < LEVEL else ""
            text += f": not decided{but}; {more} more seeds would find a difference of this size with 80 % power."
    times = line["seconds"] / base["seconds"] if base["seconds"] else math.nan
    return text + (f" It took {times:.1f} × the time." if math.isfinite(times) else "")


def _equals(p: float) -> str:
    return p_text(p) if p < 0.001 else f"= {p_text(p)}"


def _entry(line: Mapping[Any, Any]) -> dict[str, Any]:
    names = ("column", "row", "label", "metric", "chosen_by", "test_mean", "test_sd", "test_clean_mean", "dev_mean")
    more = ("pairs", "p_value", "p_holm", "difference", "seconds", "tokens", "steps", "group")
    labels, curve = _labels(str(line["column"]))
    entry = {name: line[name] for name in (*names, *more)}
    return entry | {"seeds": len(line["seeds"]), "labels": labels, "curve": curve}


def _labels(column: str) -> tuple[int | None, str]:
    """Return the number of labelled texts that the label of a column tells, and the label without it."""
    found = re.search(r"(?<= \()(.*, )?train_size=(\d+)(, .*)?(?=\)$)", column)
    return (int(found[2]), column.replace(f"train_size={found[2]}", "train_size")) if found else (None, column)


def _runs(store: Store) -> list[dict[str, Any]]:
    """All runs, each with its configuration as a difference to the defaults, its history and its last weights."""
    rows = store.results([*_RUN, *_TOLD, "config", "versions"]).to_pylist(maps_as_pydicts="strict")
    history: dict[str, list[list[Any]]] = {}
    metric = {row["cell"]: row["metric"] for row in rows}
    log = store.history().select(["cell", "step", "dev_accuracy", "dev_macro_f1", "dev_loss", "losses"])
    end_task = pc.map_lookup(log.column("losses"), "end-task", "first")
    for cell, step, accuracy, f1, loss, train in zip(
        *(log.column(at).to_pylist() for at in range(5)), end_task.to_pylist(), strict=True
    ):
        score = f1 if metric.get(cell) == "macro_f1" else accuracy
        history.setdefault(cell, []).append([step, _short(score), _short(loss), _short(train)])
    weights = store.weights().select(["cell", "step", "end_task_weight", "weights"]).sort_by("step")
    cells = weights.column("cell").to_pylist()
    last = weights.take(pa.array({cell: at for at, cell in enumerate(cells)}.values(), pa.int64()))
    final = {one["cell"]: one for one in last.to_pylist(maps_as_pydicts="strict")}
    defaults: dict[str, dict[str, str]] = {}
    found = []
    for row in sorted(rows, key=lambda row: (row["task"], row["row"], row["seed"], row["cell"])):
        settings = dict(flatten(json.loads(row["config"])))
        method = settings["method.name"]
        if method not in defaults:
            made = RunConfig.model_validate({"method": {"name": method}}).model_dump(mode="json")
            defaults[method] = {**dict(flatten(made)), "method.name": ""}
        points = sorted(history.get(row["cell"], []))
        every = math.ceil(len(points) / _POINTS) or 1
        run = {name: row[name] for name in (*_RUN, *_TOLD)}
        run["settings"] = {k: v for k, v in settings.items() if k != "seed" and defaults[method].get(k) != v}
        run["history"] = points[::-1][::every][::-1]
        if row["cell"] in final:
            one = final[row["cell"]]
            top = sorted(one["weights"].items(), key=lambda item: -item[1])[:10]
            run["weights"] = [[readable(name), _short(weight)] for name, weight in top]
            run["end_task_weight"] = _short(one["end_task_weight"])
        run["versions"] = ", ".join(f"{name} {version}" for name, version in row["versions"].items())
        found.append(run)
    return found


def _learned(logged: Logged) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """What the figures of the objectives show of the rows whose weights move: means and deviations over the seeds.

    Returns:
        λ, factors, weights, losses and distances of each place; and what is often at the top in all of them.
    """
    factors, means = logged.factors(), early_and_late(logged.weights())
    losses, distances = logged.losses(), logged.distances()
    found, several = [], []
    for (row, column), part in means.groupby(["row", "column"]):
        if part["objective"].nunique() < 2 or not part["late"].max() - part["late"].min() > 1e-6:
            continue
        own, loss, distance = (
            frame[(frame["row"] == row) & (frame["column"] == column)] for frame in (factors, losses, distances)
        )
        if part["objective"].nunique() > TOP:
            several.append(part)
        steps = own.groupby(["stage", "name", "step"])["value"].agg(["mean", "std"]).fillna(0.0).reset_index()
        late = part.groupby("objective")[["early", "late"]].mean().sort_values("late", ascending=False)
        found.append(
            {
                "row": row,
                "column": column,
                "agreement": agreement(part)["sentence"],
                "factors": [[*line[:3], _short(line[3]), _short(line[4])] for line in steps.itertuples(index=False)],
                "objectives": [
                    [readable(str(k)), _short(v[0]), _short(v[1])]
                    for k, v in zip(late.index, late.to_numpy(), strict=True)
                ],
                "space": [
                    [*stages, _short(weight * len(late))]
                    for stages, weight in zip(_stages(late.index.tolist()), late["late"], strict=True)
                    if stages
                ],
                "losses": _losses(loss),
                "distances": [
                    [readable(str(name)), _short(line["mean"]), _short(line["std"])]
                    for name, line in _over_seeds(distance).iterrows()
                ],
            }
        )
    top = {
        when: [
            [readable(str(name)), column, _short(value)]
            for name, line in often_on_top(pd.concat(several), when).iterrows()
            for column, value in line.items()
            if value
        ]
        for when in (("early", "late") if several else ())
    }
    return found, top


def _stages(objectives: Sequence[str]) -> list[list[str]]:
    """Return output, transform and representation of objectives; the output names the data where there are several."""
    split = [name.split("/") for name in objectives]
    several = len({parts[0] for parts in split if len(parts) == len(STAGES) - 1}) > 1
    return [
        [f"{parts[0]}: {parts[3]}" if several else parts[3], parts[1], parts[2]] if len(parts) == 4 else []
        for parts in split
    ]


def _losses(losses: pd.DataFrame) -> list[list[Any]]:
    """Output, transform, representation, step and mean loss over the seeds of the auxiliary objectives."""
    losses = losses[losses["objective"].str.count("/") == 3]
    steps = sorted(losses["step"].unique())
    kept = losses[losses["step"].isin(steps[:: -(math.ceil(len(steps) / _POINTS) or 1)])]
    means = kept.groupby(["objective", "step"])["loss"].mean().reset_index()
    stages = _stages(means["objective"].tolist())
    return [
        [*names, int(step), _short(loss)]
        for names, step, loss in zip(stages, means["step"], means["loss"], strict=True)
    ]


def _over_seeds(distances: pd.DataFrame) -> pd.DataFrame:
    """Mean over the steps, then mean and deviation over the seeds, of each objective; the closest first."""
    runs = distances.groupby(["objective", "seed"])["distance"].mean()
    return runs.groupby("objective").agg(["mean", "std"]).sort_values("mean")


def _curves(logged: Logged) -> list[list[Any]]:
    """Mean dev score of every row and column over steps."""
    places: dict[Any, Any] = {run["cell"]: run for run in logged.runs.to_dict("records")}
    names = ["cell", "step", "dev_accuracy", "dev_macro_f1"]
    log = logged.store.history(set(places)).select(names).to_pandas()
    log["score"] = log["dev_macro_f1"].where(
        log["cell"].map(lambda cell: places[cell]["metric"]) == "macro_f1", log["dev_accuracy"]
    )
    for name in ("row", "column"):
        log[name] = [places[cell][name] for cell in log["cell"]]
    means = log.dropna(subset=["score"]).groupby(["row", "column", "step"])["score"].mean().reset_index()
    return [[*line[:3], _short(line[3])] for line in means.itertuples(index=False)]


def _cost(runs: list[dict[str, Any]]) -> str:
    """What was spent, as rows of an HTML table."""
    frame = pd.DataFrame([{name: run[name] for name in ("row", "status", "seconds", "tokens")} for run in runs])
    parts = []
    for row, part in [*frame.groupby("row"), ("all", frame)]:
        statuses = ", ".join(f"{count} {status}" for status, count in part["status"].value_counts().items())
        hours, tokens = part["seconds"].sum() / 3600, part["tokens"].sum() / 1e6
        cells = f"<td>{escape(statuses)}</td><td>{hours:,.2f}</td><td>{tokens:,.1f}</td>"
        parts.append(f"<tr><th scope=row>{escape(str(row))}</th>{cells}</tr>")
    return "".join(parts)


def _short(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else float(f"{value:.5g}")


def _finite(value: Any) -> Any:
    """Return a value for JSON, which knows no NaN."""
    if isinstance(value, Mapping):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value.item() if hasattr(value, "item") else value
