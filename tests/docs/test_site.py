"""The site builds without a warning, and has what its pages promise."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_pictures_are_small_and_sound() -> None:
    for picture in (ROOT / "docs" / "images").iterdir():
        assert picture.stat().st_size < 150_000, picture.name
        if picture.suffix == ".svg":
            assert ET.parse(picture).getroot().tag.endswith("svg")
    assert (ROOT / "docs" / "images" / "page.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    for module in ("sphinx", "furo", "myst_parser"):
        pytest.importorskip(module)
    # A copy, because the page of all commands is written next to the others.
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "-d", str(tmp_path / "trees")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [*command, "docs", str(tmp_path / "html")],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=environment,
    )
    assert result.returncode == 0, result.stderr
    html = tmp_path / "html"
    pages = {str(path.relative_to(html).with_suffix("")) for path in html.rglob("*.html")}
    assert {"index", "tutorial", "aang", "reference/python", "reference/settings", "reference/commands"} <= pages
    index = (html / "index.html").read_text(encoding="utf-8")
    for page in (ROOT / "docs").rglob("*.md"):  # new pages are listed without an entry of their own
        assert f'href="{page.relative_to(ROOT / "docs").with_suffix(".html")}"' in index, page
    settings = (html / "reference" / "settings.html").read_text(encoding="utf-8")
    assert "body_lr" in settings
    assert "Keep the first k layers" in settings
    assert re.search(r"Default:.{0,80}0\.0001", settings)  # of optim.body_lr
    assert (html / "search.html").read_text(encoding="utf-8").count("searchindex.js")  # no page takes its place
    assert "train" in (html / "reference" / "python.html").read_text(encoding="utf-8")
    loaded = re.findall(r'(?:src|<link[^>]* href)="(https?://[^"]+)"', index)
    assert not loaded, "the pages load nothing from elsewhere"
