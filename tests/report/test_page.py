"""What the report's page shows, as data. The page itself is tested in a browser, in tests/integration."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest

from aang_ray.report.logged import Logged, early_and_late
from aang_ray.report.page import build_page
from aang_ray.store import Store
from tests.report.test_figures import NAMES, logged

__all__ = ["logged"]
COLUMN = "movie (train_size=100)"


def page_data(store: Store) -> dict[str, Any]:
    html = build_page(store)
    start = html.index('id="data">') + len('id="data">')
    found: dict[str, Any] = json.loads(html[start : html.index("</script>", start)])
    return found


def test_figures_of_the_objectives(logged: Store) -> None:
    """Distances are 1, 2, … in every run; losses are 2 at each of ten evaluations."""
    data = page_data(logged)
    (place,) = (one for one in data["learned"] if one["column"] == COLUMN)
    assert [line[1:] for line in place["distances"]] == [[1.0 + i, 0.0] for i in range(len(NAMES))]
    assert place["distances"][0][0] == "mask · bidirectional · a"
    assert len(place["losses"]) == 10 * len(NAMES)
    assert {(line[3], line[4]) for line in place["losses"]} == {(step, 2.0) for step in range(10, 101, 10)}
    late = early_and_late(Logged(logged, ["aang-td"], [COLUMN]).weights()).groupby("objective")["late"].mean()
    space = {"/".join(("end-task", line[1], line[2], line[0])): line[3] for line in place["space"]}
    assert space == pytest.approx((late * len(NAMES)).to_dict(), abs=1e-3)


def test_what_is_at_the_top_of_the_runs(logged: Store) -> None:
    """Of six runs, three in each column, each has five objectives at the top."""
    for lines in page_data(logged)["top"].values():
        columns: Counter[str] = Counter()
        for _, column, fraction in lines:
            columns[column] += fraction
        assert columns == pytest.approx({COLUMN: 2.5, "movie (train_size=300)": 2.5})


def test_entries_of_one_curve(logged: Store) -> None:
    entries = page_data(logged)["entries"]
    assert {(entry["column"], entry["labels"], entry["curve"]) for entry in entries} == {
        (f"movie (train_size={size})", size, "movie (train_size)") for size in (100, 300)
    }
