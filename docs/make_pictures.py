"""Make the pictures of the documentation from the committed quality store: `python docs/make_pictures.py`.

It needs the extras `page` and `dev`, and Chromium.
"""

import shutil
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

from aang_ray.report.page import build_page
from aang_ray.store import Store

ROOT = Path(__file__).parents[1]


def main() -> None:
    """Write `docs/images/page.png`: the top of the report's page."""
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        path = Path(folder) / "page.html"
        path.write_text(build_page(Store(ROOT / "benchmarks" / "results" / "store")), encoding="utf-8")
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1000, "height": 760})
        page.goto(path.as_uri())
        page.wait_for_selector("#charts svg")
        page.screenshot(path=ROOT / "docs" / "images" / "page.png")
        browser.close()


if __name__ == "__main__":
    main()
