"""A configuration keeps its names: with another cell hash every store made before would not be recognised."""

from __future__ import annotations

from typing import Any

import pytest

from tests.frozen.frozen import names_of, read_json

CASES: list[dict[str, Any]] = read_json("hashes.json")


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_names_of_a_configuration(case: dict[str, Any]) -> None:
    assert names_of(case["config"]) == {key: case[key] for key in ("cell", "group", "row_name")}
