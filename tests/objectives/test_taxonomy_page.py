"""docs/taxonomy.md lists every primitive, and no module about text names another domain."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from aang_ray.objectives import DOMAINS
from aang_ray.objectives.primitives import BUILT_IN

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "taxonomy.md"


def rows(heading: str) -> list[str]:
    """The names in the first column of the table below a heading."""
    (section,) = re.findall(
        rf"^## {heading}\n(.*?)(?=^## )", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )
    return re.findall(r"^\| `([^`]+)` \|", section, re.MULTILINE)


@pytest.mark.parametrize("stage", ["data", "transform", "representation", "output"])
def test_the_page_has_a_row_for_every_primitive(stage: str) -> None:
    heading = "Data" if stage == "data" else f"{stage.capitalize()}s"
    listed, known = rows(heading), BUILT_IN.names(stage)
    for name in known:
        assert name in listed, (
            f"docs/taxonomy.md has no row for the {stage} {name}: add `| `{name}` | what it does | source |` to the "
            f'table below "## {heading}"'
        )
    for name in listed:
        assert name in known, f'docs/taxonomy.md, "## {heading}": there is no {stage} {name}; delete its row'


def test_modules_about_text_name_no_other_domain() -> None:
    folder = ROOT / "aang_ray" / "objectives"
    own = {f"{module.rsplit('.', 1)[1]}.py" for module in DOMAINS.values()} | {"__init__.py"}
    about_text = [path for path in sorted(folder.rglob("*.py")) if path.name not in own]
    assert len(about_text) > 5
    for path in about_text:
        code = path.read_text(encoding="utf-8")
        for domain in DOMAINS:
            assert not re.search(rf"import {domain}|objectives\.{domain}|[\"']{domain}[\"']", code), f"{path}: {domain}"
