"""Make the pictures of the documentation: `python docs/make_pictures.py`, with names of pictures to make only these.

Figures and page show the committed quality store. It needs the extras `figures`, `page` and `dev`, and for the page
Chromium.
"""

import shutil
import sys
import tempfile
from html import escape
from pathlib import Path

from aang_ray.objectives.objective import STAGES
from aang_ray.objectives.primitives import BUILT_IN
from aang_ray.report.figures import plot
from aang_ray.report.page import build_page
from aang_ray.store import Store

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs" / "images"
COLUMN = "movie (layers=2)"
STORE = ROOT / "benchmarks" / "results" / "store"

QUESTIONS = {
    "data": "which texts?",
    "transform": "how corrupted?",
    "representation": "who sees whom?",
    "output": "what is predicted?",
}
PATHS = {
    "GPT": ("in-domain", "no-op", "left-to-right", "denoise", "#0072B2"),
    "TAPT (BERT)": ("end-task", "bert-op", "bidirectional", "denoise", "#D55E00"),
    "one that nobody named": ("end-task", "mask", "random-factorized", "end-task", "#009E73"),
}
"""Objectives that the picture of the stages shows, with the colour of each."""
_WIDTH, _STEP, _TOP, _LINE = 172, 216, 78, 24


def stages() -> None:
    """Draw the four stages with their choices, and some objectives as paths through them."""
    choices = {stage: [name for name in BUILT_IN.names(stage) if name != "supervised"] for stage in STAGES}
    rows = max(map(len, choices.values()))
    width, height = 3 * _STEP + _WIDTH + 24, _TOP + _LINE * rows + 58
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="sans-serif" role="img">',
        "<title>The four stages of an objective</title>",
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
    ]
    for number, stage in enumerate(STAGES):
        left = 12 + number * _STEP
        parts += [
            f'<rect x="{left}" y="12" width="{_WIDTH}" height="{_TOP + _LINE * rows - 8}" rx="8" fill="#f5f5f5" '
            'stroke="#bbbbbb"/>',
            f'<text x="{left + 12}" y="36" font-size="15" font-weight="bold">{stage.capitalize()}</text>',
            f'<text x="{left + 12}" y="55" font-size="12" fill="#555555">{QUESTIONS[stage]}</text>',
        ]
        parts += [
            f'<text x="{left + 20}" y="{_TOP + _LINE * row + 12}" font-size="13">{escape(name)}</text>'
            for row, name in enumerate(choices[stage])
        ]
    for number, (name, (*path, colour)) in enumerate(PATHS.items()):
        points = []
        for stage_number, (stage, choice) in enumerate(zip(STAGES, path, strict=True)):
            y = _TOP + _LINE * choices[stage].index(choice) + 7 + 3 * (number - 1)
            left = 12 + stage_number * _STEP
            points += [(left + 8, y), (left + _WIDTH - 8, y)]
            parts += [
                f'<circle cx="{left + 8}" cy="{y}" r="4" fill="{colour}"/>',
                f'<rect x="{left + 8}" y="{y - 9}" width="{_WIDTH - 16}" height="18" rx="9" fill="{colour}" '
                'fill-opacity="0.15"/>',
            ]
        for (x0, y0), (x1, y1) in zip(points[1:-1:2], points[2::2], strict=True):
            middle = (x0 + x1) / 2
            parts.append(
                f'<path d="M{x0} {y0} C{middle} {y0} {middle} {y1} {x1} {y1}" fill="none" stroke="{colour}" '
                'stroke-width="2.5"/>'
            )
        x, y = 24 + number * 240, height - 16
        parts += [
            f'<rect x="{x}" y="{y - 9}" width="18" height="4" fill="{colour}"/>',
            f'<text x="{x + 26}" y="{y}" font-size="13">{escape(name)}</text>',
        ]
    (IMAGES / "stages.svg").write_text("\n".join([*parts, "</svg>", ""]), encoding="utf-8")


def bars() -> None:
    """Draw the test scores on `movie`."""
    plot("bars", Store(STORE), IMAGES / "bars.svg", tasks=[COLUMN])


def weights() -> None:
    """Draw the factors of AANG-TD on `movie` over the steps."""
    plot("weights", Store(STORE), IMAGES / "weights.svg", tasks=[COLUMN], rows=["aang-td"])


def objectives() -> None:
    """Draw the objectives of highest weight of AANG-TD on `movie`."""
    plot("objectives", Store(STORE), IMAGES / "objectives.svg", tasks=[COLUMN], rows=["aang-td"])


def page() -> None:
    """Photograph the top of the report's page."""
    from playwright.sync_api import sync_playwright

    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        path = Path(folder) / "page.html"
        path.write_text(build_page(Store(STORE)), encoding="utf-8")
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        window = browser.new_page(viewport={"width": 1000, "height": 760})
        window.goto(path.as_uri())
        window.wait_for_selector("#charts svg")
        window.screenshot(path=IMAGES / "page.png")
        browser.close()


PICTURES = {"stages": stages, "bars": bars, "weights": weights, "objectives": objectives, "page": page}


if __name__ == "__main__":
    for chosen in sys.argv[1:] or PICTURES:
        PICTURES[chosen]()
