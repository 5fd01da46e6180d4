"""Links between pages lead somewhere, and the files for contributors hold what tools expect."""

from __future__ import annotations

import importlib.util
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def links(page: Path) -> Iterator[tuple[str, str]]:
    """Yield the target file (empty for the page itself) and the anchor of every link that stays in the project."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" not in target and not target.startswith("mailto:"):
            file, _, anchor = target.partition("#")
            yield file, anchor


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page as GitHub makes them: of its headings, and of bold text that begins a paragraph."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    for file, anchor in links(page):
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), f"{page.name} links to {file}"
        if anchor:
            assert anchor in anchors(target), f"{page.name} links to {file}#{anchor}"


def test_every_page_of_the_documentation_can_be_reached() -> None:
    found, waiting = set(), [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
    while waiting:
        page = waiting.pop()
        if page.suffix == ".md" and page not in found:
            found.add(page)
            waiting += [(page.parent / file).resolve() for file, _ in links(page) if file]
    assert set((ROOT / "docs").rglob("*.md")) <= found


@pytest.mark.parametrize(
    "file", [".pre-commit-config.yaml", "CITATION.cff", *(f".github/workflows/{n}.yml" for n in ("test", "docs"))]
)
def test_files_of_other_tools_are_yaml(file: str) -> None:
    assert yaml.safe_load((ROOT / file).read_text(encoding="utf-8"))


def test_the_citation_names_the_version_and_the_three_papers() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert citation["version"] == project["version"]
    assert [paper["year"] for paper in citation["references"]] == [2023, 2021, 2020]
    assert all(paper["title"] and paper["authors"] for paper in citation["references"])


@pytest.fixture
def bounds() -> ModuleType:
    spec = importlib.util.spec_from_file_location("lower_bounds", ROOT / ".github" / "lower_bounds.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_lower_bounds(bounds: ModuleType) -> None:
    assert list(bounds.lower_bounds(["ray[train, tune]>=2.60,<2.61", "fsspec>=2025.3"])) == [
        "ray==2.60",
        "fsspec==2025.3",
    ]
    with pytest.raises(ValueError, match="torch<3: expected a lower bound"):
        list(bounds.lower_bounds(["torch<3"]))


def test_every_dependency_has_a_lower_bound(bounds: ModuleType) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [requirement for extra in project["optional-dependencies"].values() for requirement in extra]
    assert len(list(bounds.lower_bounds([*project["dependencies"], *extras]))) == len(project["dependencies"]) + len(
        extras
    )
