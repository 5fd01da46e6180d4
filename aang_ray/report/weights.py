"""Which objectives and primitives carried weight, early and late, and whether the seeds agree."""

from __future__ import annotations

from typing import Any

import pandas as pd

from aang_ray.errors import UserError
from aang_ray.report.formats import ABSENT, markdown_grid
from aang_ray.report.logged import STAGES, Logged, early_and_late, readable
from aang_ray.report.significance import LEVEL, p_text

SHOWN = 10
"""Objectives that are listed unless all are asked for."""


def describe_weights(logged: Logged, *, everything: bool = False) -> str:
    """Return a text: for each row and column with several objectives what had weight, and whether seeds agree.

    Early is the first 10 % of the steps (at least the first logged weights), late the last 50 %.

    Args:
        logged: The chosen runs.
        everything: List all objectives, not only the 10 of highest late weight.

    Raises:
        UserError: if no run logged weights of objectives.
    """
    weights, factors = logged.weights(), logged.factors()
    if weights.empty:
        raise UserError("no run of the store has weights of auxiliary objectives")
    means = early_and_late(weights)
    end_task = early_and_late(factors[factors["stage"] == "λ"].rename(columns={"name": "objective", "value": "weight"}))
    parts = []
    for (row, column), part in means.groupby(["row", "column"]):
        place = end_task[(end_task["row"] == row) & (end_task["column"] == column)][["early", "late"]].mean()
        objectives, seeds = part["objective"].nunique(), part["seed"].nunique()
        title = (
            f"{row} on {column}: {objectives} objective{'s' * (objectives > 1)} with logged weights, "
            f"{seeds} seed{'s' * (seeds > 1)}; weight of the end task {place['early']:.3f} early, "
            f"{place['late']:.3f} late"
        )
        spread = part["late"].max() - part["late"].min()
        if objectives < 2 or not spread > 1e-6:
            parts.append(f"{title}. The weights of the objectives are equal.")
            continue
        text, per_objective = _objectives(part, everything)
        parts += [title, text, *([_primitives(per_objective)] if part["objective"].str.count("/").eq(3).all() else [])]
        parts.append(agreement(part)["sentence"])
    return "\n\n".join(parts) + "\n"


def agreement(part: pd.DataFrame) -> dict[str, Any]:
    """Return how far the seeds agree on the order of the objectives by late weight.

    Kendall's W is 1 if all seeds have the same order, and about 1 / seeds if the orders are random. Friedman's test has
    random orders as its hypothesis.

    Args:
        part: The lines of `early_and_late` of one row and column.

    Returns:
        `w`, `p` (None for one seed, or fewer than three objectives that all seeds have), and a `sentence`.
    """
    late = part.pivot(index="objective", columns="seed", values="late").dropna()
    objectives, seeds = late.shape
    if seeds < 2 or objectives < 3:
        why = "one seed" if seeds < 2 else f"{objectives} objectives that all seeds have"
        return {"w": None, "p": None, "sentence": f"With {why}, nobody can tell whether these weights follow noise."}
    from scipy import stats

    statistic, p = stats.friedmanchisquare(*late.to_numpy())
    w = float(statistic) / (seeds * (objectives - 1))
    about = f"(Kendall's W {w:.2f}, Friedman p {p_text(float(p))}, {seeds} seeds)"
    alike = f"The seeds order the objectives alike {about}."
    noise = f"The seeds order the objectives no more alike than chance would {about}: these weights follow noise."
    sentence = alike if p < LEVEL else noise
    return {"w": w, "p": float(p), "sentence": sentence}


def _objectives(part: pd.DataFrame, everything: bool) -> tuple[str, pd.DataFrame]:
    by_objective = part.groupby("objective")
    frame = by_objective[["early", "late"]].mean().assign(deviation=by_objective["late"].std())
    frame = frame.sort_values("late", ascending=False)
    shown = frame if everything else frame.head(SHOWN)
    grid = pd.DataFrame(
        {
            "objective": [readable(name) for name in shown.index],
            "early": [_number(value) for value in shown["early"]],
            "late": [_number(value) for value in shown["late"]],
            "± over seeds": [_number(value) for value in shown["deviation"]],
            "late / uniform": [_number(value * len(frame), 2) for value in shown["late"]],
        }
    )
    more = len(frame) - len(shown)
    return markdown_grid(grid) + (f"\n\n{more} more have less (--all shows them)" if more else ""), frame


def _primitives(frame: pd.DataFrame) -> str:
    """Sums of weight of the objectives that use a primitive, beside the share of objectives that do."""
    names = pd.DataFrame([name.split("/") for name in frame.index], frame.index, columns=[*"DTRO"])
    lines = []
    for stage in "DTRO":
        sums = frame[["early", "late"]].groupby(names[stage]).sum().sort_values("late", ascending=False)
        shares = names[stage].value_counts(normalize=True)
        if len(sums) > 1:
            lines += [
                [STAGES[stage], name, _number(line["early"]), _number(line["late"]), _number(shares[name])]
                for name, line in zip(map(str, sums.index), sums.to_dict("records"), strict=True)
            ]
    header = ["stage", "primitive", "early", "late", "share of the objectives"]
    return markdown_grid(pd.DataFrame(lines, columns=header)) if lines else ""


def _number(value: float, digits: int = 3) -> str:
    return ABSENT if pd.isna(value) else f"{value:.{digits}f}"
