"""Figures of a store, in one style: colours of Okabe and Ito, which colour-blind readers tell apart."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from aang_ray.errors import UserError
from aang_ray.report.logged import STAGES, TOP, Logged, early_and_late, often_on_top, readable
from aang_ray.report.significance import p_text
from aang_ray.report.table import build_table
from aang_ray.store import Store

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C8C00")
_DASHES = ("-", "--", ":", "-.")
_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.4,
    "svg.fonttype": "none",
    "svg.hashsalt": "aang",
    "pdf.fonttype": 42,
}


def plot(
    name: str,
    store: Store,
    path: Path,
    *,
    rows: Sequence[str] = (),
    tasks: Sequence[str] = (),
    metric: str | None = None,
    cost: str = "seconds",
) -> None:
    """Draw one figure into a file.

    Args:
        name: A key of `FIGURES`.
        store: The store.
        path: The file; its ending (.png, .svg, .pdf) gives the format.
        rows: Only these rows of the table; none: all.
        tasks: Only these tasks, or labels of columns; none: all.
        metric: `accuracy` or `macro_f1`, for every task; None: the metric of each task.
        cost: `seconds` or `tokens`, for the figure `cost`.

    Raises:
        UserError: for an unknown figure, a store without what it needs, a file that cannot be written, or if
            matplotlib is missing.
    """
    if name not in FIGURES:
        raise UserError(f"figure {name!r} is unknown; choose one of {', '.join(FIGURES)}")
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise UserError(f"{path}: give it one of the endings .png, .svg and .pdf")
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("figures need matplotlib: pip install 'aang-ray[figures]'") from error
    with matplotlib.rc_context(_STYLE):
        figure = Figure(layout="constrained")
        if name == "curve":
            _curve(build_table(store, metric=metric, cols=("data.train_size",)), rows, tasks, figure)
        else:
            FIGURES[name](Logged(store, rows, tasks, metric), figure, **({"cost": cost} if name == "cost" else {}))
        try:
            date = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(path.suffix)
            figure.savefig(path, dpi=150, metadata=date, bbox_inches="tight")  # legends may stand outside
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror or error})") from error


def interval(mean: float, deviation: float, seeds: int) -> tuple[float, float] | None:
    """Return the 95 % t-interval of a mean over seeds; None for one seed."""
    from scipy import special

    if seeds < 2 or math.isnan(deviation):
        return None
    half = float(special.stdtrit(seeds - 1, 0.975)) * deviation / math.sqrt(seeds)
    return mean - half, mean + half


def _bars(logged: Logged, figure: Figure) -> None:
    """Mean test score of each row with its interval, and the p-value, one panel a column (the paper's Figure 3)."""
    table = logged.table
    columns = list(table["column"].unique())
    rows = [row for row in table["row"].cat.categories if row in set(table["row"])]
    panels = _panels(figure, len(columns), 3, (3.1, 0.6 + 0.27 * len(rows)), sharey=True)
    for axes, column in zip(panels, columns, strict=True):
        lines = table[table["column"] == column].to_dict("records")
        for line in lines:
            at, mean = rows.index(line["row"]), 100 * line["test_mean"]
            colour = COLOURS[0] if pd.isna(line["pairs"]) else COLOURS[1]
            found = interval(line["test_mean"], line["test_sd"], len(line["seeds"]))
            if found:
                axes.plot([100 * end for end in found], [at, at], color=colour, linewidth=2.2, alpha=0.45)
            axes.plot(mean, at, "o", color=colour, markersize=5)
            p = "" if pd.isna(line["p_value"]) else f"p {p_text(line['p_value'])} ({line['pairs']:.0f})"
            axes.annotate(p, (1.0, at), xycoords=("axes fraction", "data"), ha="left", va="center", fontsize=7)
        axes.set_title(_short(column), loc="left")
        axes.set_xlabel(f"test {lines[0]['metric'].replace('_', '-')} (%)")
        axes.set_yticks(range(len(rows)), rows)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.grid(axis="x")
    figure.supxlabel("mean and 95 % t-interval over the seeds; p: paired t-test (pairs)", fontsize=8)


def _weights(logged: Logged, figure: Figure) -> None:
    """λ and the factors of each stage over steps, mean and standard deviation over seeds (the paper's Figure 4)."""
    frame = logged.factors()
    spread = frame.groupby(["row", "column", "stage"])["value"].transform(lambda values: values.max() - values.min())
    frame = _needs(frame[spread > 1e-6], "learned weights: run a method such as aang")
    stages = [stage for stage in STAGES if stage in set(frame["stage"])]
    places: list[Any] = list(frame.groupby(["row", "column"]).groups)
    grid = figure.subplots(len(places), len(stages), squeeze=False, sharex="row")
    figure.set_size_inches(2.5 * len(stages), 1.3 + 1.7 * len(places))
    for line, (row, column) in zip(grid, places, strict=True):
        part = frame[(frame["row"] == row) & (frame["column"] == column)]
        best = logged.runs[(logged.runs["row"] == row) & (logged.runs["column"] == column)]["best_step"]
        for axes, stage in zip(line, stages, strict=True):
            names = list(frame[frame["stage"] == stage]["name"].unique())
            _lines(axes, part[part["stage"] == stage], names)
            if stage not in set(part["stage"]):  # nothing of this stage moved in this row
                axes.set_axis_off()
                continue
            for step in best:
                axes.axvline(step, color="#444444", linewidth=0.8, alpha=0.7)
        line[0].set_ylabel(f"{row} on\n{_short(column)}")
    for above, axes, stage in zip(grid[0], grid[-1], stages, strict=True):
        above.set_title(STAGES[stage], loc="left")
        axes.set_xlabel("step")
        axes.legend(*axes.get_legend_handles_labels(), loc="upper left", bbox_to_anchor=(-0.1, -0.4), fontsize=7)
    about = (
        "λ, and the softmax of each stage's factors: mean ± standard deviation over the seeds; vertical: best dev steps"
    )
    figure.suptitle(about, fontsize=8)


def _objectives(logged: Logged, figure: Figure) -> None:
    """How often each objective is at the top early and late, stacked by task (the paper's Figure 5)."""
    means = early_and_late(_learned(logged, TOP))
    runs = means.groupby(["row", "column", "seed"]).ngroups
    columns = list(means["column"].unique())
    panels = _panels(figure, 2, 2, (4.4, 3.6))
    for axes, (when, title) in zip(
        panels, {"early": "first 10 % of the steps", "late": "last 50 % of the steps"}.items(), strict=True
    ):
        counts = often_on_top(means, when)
        left = pd.Series(0.0, counts.index)
        for column, colour in zip(columns, COLOURS, strict=False):
            if column in counts:
                axes.barh([*map(readable, counts.index)], counts[column], left=left, color=colour, label=_short(column))
                left += counts[column]
        axes.invert_yaxis()
        axes.set_title(title, loc="left")
        axes.grid(axis="x")
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", labelsize=7)
    panels[-1].legend(loc="lower right")
    figure.supxlabel(f"fraction of {runs} runs with the objective among the {TOP} of highest mean weight", fontsize=9)


def _curve(table: pd.DataFrame, rows: Sequence[str], tasks: Sequence[str], figure: Figure) -> None:
    """Score against the number of labels, mean and standard deviation over seeds."""
    sizes = table["column"].astype(str).str.extract(r"train_size=(\d+)")[0]
    table = table.assign(size=pd.to_numeric(sizes))[sizes.notna()]
    table = table[(table["row"].isin(rows) | (not rows)) & (table["task"].isin(tasks) | (not tasks))]
    if table["size"].nunique() < 2:
        raise UserError("the figure needs runs with several data.train_size; see `grid:` of a sweep file")
    blocks = list(table["block"].unique())
    panels = _panels(figure, len(blocks), 3, (3.4, 2.8))
    for axes, block in zip(panels, blocks, strict=True):
        part = table[table["block"] == block]
        for number, (row, lines) in enumerate(part.groupby("row", observed=True)):
            lines = lines.sort_values("size")
            style: dict[str, Any] = {
                "color": COLOURS[number % len(COLOURS)],
                "marker": "osD^v"[number % 5],
                "markersize": 4,
            }
            errors = 100 * lines["test_sd"].fillna(0.0)
            axes.errorbar(lines["size"], 100 * lines["test_mean"], errors, label=row, capsize=2, **style)
        axes.set_xscale("log")
        ticks = sorted(part["size"].unique())
        axes.set_xticks(ticks, [f"{size:,.0f}" for size in ticks], minor=False)
        axes.minorticks_off()
        axes.set_title(_short(block), loc="left")
        axes.set_xlabel("labelled training texts")
        axes.set_ylabel(f"test {part['metric'].iloc[0].replace('_', '-')} (%)")
    panels[0].legend()
    figure.supxlabel("mean ± standard deviation over the seeds", fontsize=8)


def _cost(logged: Logged, figure: Figure, cost: str = "seconds") -> None:
    """Score against seconds or tokens of a run."""
    from matplotlib.ticker import LogLocator, StrMethodFormatter

    if cost not in ("seconds", "tokens"):
        raise UserError(f"cost {cost!r} is unknown; choose seconds or tokens")
    columns = list(logged.table["column"].unique())
    rows = [row for row in logged.table["row"].cat.categories if row in set(logged.table["row"])]
    panels = _panels(figure, len(columns), 3, (3.4, 2.9))
    for axes, column in zip(panels, columns, strict=True):
        part = logged.table[logged.table["column"] == column]
        for line in part.to_dict("records"):
            at = rows.index(line["row"])
            style: dict[str, Any] = {
                "color": COLOURS[at % len(COLOURS)],
                "marker": "osD^v"[at // len(COLOURS) % 5],
                "markersize": 5,
            }
            error = None if pd.isna(line["test_sd"]) else 100 * line["test_sd"]
            axes.errorbar(line[cost], 100 * line["test_mean"], error, capsize=2, linestyle="", **style)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.minorticks_off()
        axes.set_title(_short(column), loc="left")
        axes.set_xlabel(f"{cost} of a run")
        axes.set_ylabel(f"test {part['metric'].iloc[0].replace('_', '-')} (%)")
    handles = [
        panels[0].plot([], [], linestyle="", color=COLOURS[at % len(COLOURS)], marker="osD^v"[at // len(COLOURS) % 5])[
            0
        ]
        for at in range(len(rows))
    ]
    figure.legend(handles, rows, loc="outside right upper")
    figure.supxlabel("mean ± standard deviation over the seeds", fontsize=8)


def _space(logged: Logged, figure: Figure) -> None:
    """Heat map of the late weights over transform and representation, one panel an output."""
    from matplotlib.colors import TwoSlopeNorm

    means = early_and_late(_learned(logged))
    place = means[["row", "column"]].drop_duplicates().iloc[0]
    means = means[(means["row"] == place["row"]) & (means["column"] == place["column"])]
    late = means.groupby("objective")["late"].mean()
    late *= len(late)
    names = pd.DataFrame([name.split("/") for name in late.index], late.index, columns=[*"DTRO"])
    if names["D"].nunique() > 1:
        names["O"] = names["D"] + ": " + names["O"]
    outputs = list(names["O"].unique())
    transforms, representations = list(names["T"].unique()), list(names["R"].unique())
    size = (1.4 + 0.75 * len(representations), 1.5 + 0.42 * len(transforms))
    panels = _panels(figure, len(outputs), 2, size)
    norm = TwoSlopeNorm(1.0, min(late.min(), 0.99), max(late.max(), 1.01))
    for axes, output in zip(panels, outputs, strict=True):
        chosen = names[names["O"] == output]
        grid = pd.DataFrame(math.nan, transforms, representations)
        for objective, line in chosen.iterrows():
            grid.loc[line["T"], line["R"]] = late[objective]
        values = grid.to_numpy(dtype=float)
        image = axes.imshow(values, cmap="PuOr_r", norm=norm, aspect="auto")
        for y, x in ((y, x) for y in range(len(transforms)) for x in range(len(representations))):
            value = float(values[y, x])
            text = "" if math.isnan(value) else f"{value:.2f}"
            dark = not math.isnan(value) and abs(norm(value) - 0.5) > 0.35
            axes.text(x, y, text, ha="center", va="center", fontsize=8, color="white" if dark else "black")
        axes.set_title(f"output: {output}", loc="left")
        axes.set_xticks(range(len(representations)), [name.replace("-", "-\n", 1) for name in representations])
        axes.set_yticks(range(len(transforms)), transforms)
        axes.grid(visible=False)
    figure.colorbar(image, ax=panels, label="late weight / uniform weight", shrink=0.9)
    figure.suptitle(f"{place['row']} on {place['column']}, mean over the seeds", fontsize=9)


def _distances(logged: Logged, figure: Figure) -> None:
    """Mean local distance of each objective to the end task, over steps; deviation over seeds."""
    frame = _needs(logged.distances(), "local distances: run with gradients.local_distances=true")
    places: list[Any] = list(frame.groupby(["row", "column"]).groups)
    objectives = frame["objective"].nunique()
    panels = _panels(figure, len(places), 2, (4.6, 0.8 + 0.22 * objectives))
    for axes, (row, column) in zip(panels, places, strict=True):
        part = frame[(frame["row"] == row) & (frame["column"] == column)]
        runs = part.groupby(["objective", "seed"])["distance"].mean().groupby("objective")
        mean = runs.mean().sort_values()
        axes.errorbar(
            mean,
            [*map(readable, mean.index)],
            xerr=runs.std()[mean.index].fillna(0.0),
            fmt="o",
            color=COLOURS[0],
            markersize=4,
            capsize=2,
        )
        axes.set_title(f"{row} on {_short(column)}", loc="left")
        axes.invert_yaxis()  # the closest first
        axes.set_xlabel(r"$\|g_k - g_E\|^2$, mean over steps ± deviation over seeds")
        axes.grid(axis="x")
        axes.tick_params(axis="y", labelsize=7)


def _losses(logged: Logged, figure: Figure) -> None:
    """Each objective's own training loss over steps, one panel an output (of each data) of each row and column."""
    frame = logged.losses()
    frame = _needs(frame[frame["objective"].str.count("/") == 3], "losses of auxiliary objectives")
    stages = frame["objective"].str.split("/", expand=True)
    output = stages[3] if stages[0].nunique() < 2 else stages[0] + ": " + stages[3]
    frame = frame.assign(transform=stages[1], representation=stages[2], output=output)
    places: list[Any] = list(frame.groupby(["row", "column", "output"]).groups)
    panels = _panels(figure, len(places), 3, (3.4, 2.4))
    transforms, representations = list(frame["transform"].unique()), list(frame["representation"].unique())
    for axes, (row, column, output) in zip(panels, places, strict=True):
        part = frame[(frame["row"] == row) & (frame["column"] == column) & (frame["output"] == output)]
        for objective, lines in part.groupby("objective"):
            mean = lines.groupby("step")["loss"].mean()
            colour = COLOURS[transforms.index(lines["transform"].iloc[0]) % len(COLOURS)]
            dash = _DASHES[representations.index(lines["representation"].iloc[0]) % len(_DASHES)]
            axes.plot(mean.index, mean, color=colour, linestyle=dash, label=readable(str(objective)))
        axes.set_title(f"{row} on {_short(column)}: {output}", loc="left")
        axes.set_xlabel("step")
        axes.set_ylabel("training loss (nats)")
    handles = [panels[0].plot([], [], color=COLOURS[at % len(COLOURS)])[0] for at in range(len(transforms))]
    dashes = [panels[0].plot([], [], "#444444", linestyle=_DASHES[at % 4])[0] for at in range(len(representations))]
    figure.legend([*handles, *dashes], [*transforms, *representations], loc="outside right upper")


def _learned(logged: Logged, more_than: int = 1) -> pd.DataFrame:
    """Weights over steps of the rows of more objectives than that, and of different weights."""
    frame = logged.weights()
    spread = frame.groupby(["row", "column"])["weight"].transform(lambda weights: weights.max() - weights.min())
    count = frame.groupby(["row", "column"])["objective"].transform("nunique")
    return _needs(frame[(spread > 1e-6) & (count > more_than)], "learned weights: run a method such as aang")


def _needs(frame: pd.DataFrame, what: str) -> pd.DataFrame:
    if frame.empty:
        raise UserError(f"the store has no run with {what}")
    return frame


def _lines(axes: Axes, frame: pd.DataFrame, names: Sequence[str]) -> None:
    """Draw the mean over seeds of `value` for each name over steps, with a band of one standard deviation."""
    for number, name in enumerate(names):
        steps = frame[frame["name"] == name].groupby("step")["value"]
        mean, deviation = steps.mean(), steps.std().fillna(0.0)
        style: dict[str, Any] = {"color": COLOURS[number % len(COLOURS)]}
        axes.plot(mean.index, mean, label=name, linestyle=_DASHES[number % len(_DASHES)], **style)
        axes.fill_between(mean.index, mean - deviation, mean + deviation, alpha=0.15, linewidth=0, **style)


def _panels(figure: Figure, count: int, most: int, size: tuple[float, float], **shared: Any) -> list[Axes]:
    """Return `count` panels, at most `most` in a line, each of a size in inches."""
    wide = min(count, most)
    high = math.ceil(count / wide)
    figure.set_size_inches(size[0] * wide + 1.2, size[1] * high + 0.4)
    panels = figure.subplots(high, wide, squeeze=False, **shared).ravel()
    for empty in panels[count:]:
        empty.set_visible(False)
    return list(panels[:count])


def _short(label: str) -> str:
    """Return a label that fits above a panel."""
    return label if len(label) <= 34 else f"{label[:33]}…"


FIGURES: Mapping[str, Callable[..., None]] = {
    "bars": _bars,
    "weights": _weights,
    "objectives": _objectives,
    "curve": _curve,
    "cost": _cost,
    "space": _space,
    "distances": _distances,
    "losses": _losses,
}
"""The figures by name."""
