"""The report's page in a real browser: it works, loads nothing, shows no error, and shows foreign text as text."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from aang_ray.report.page import build_page
from aang_ray.store import HistoryRow, Scores, Store, WeightRow
from tests.report.conftest import write_cell

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HOSTILE = "<script>document.title='hit'</script><img src=x onerror=\"document.title='hit'\">"
STAGES = {"T": ("mask", "no-op"), "R": ("bidirectional", "left-to-right"), "O": ("denoise", "end-task")}
NAMES = ["/".join(("end-task", *choices)) for choices in product(*STAGES.values())]

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine: apt-get install chromium"),
]


def fill(folder: Path, runs: int = 3) -> Store:
    """Two methods on a task whose name, labels and error are HTML, with history and weights."""
    plain, store = Store(folder / "plain"), Store(folder / "store")
    for seed in range(runs):
        write_cell(plain, task=HOSTILE, seed=seed, test=0.7 + seed / 1000)
        write_cell(plain, task=HOSTILE, method="aang", seed=seed, test=0.72 + seed / 500)
    write_cell(plain, task=HOSTILE, method="static", failed=True)
    scores = Scores(0.7, 0.6, 10, {HOSTILE: 5, "b": 5}, 0.5)
    for cell in plain.done():
        record = plain.record(cell)
        losses = {"end-task": 1.0, **dict.fromkeys(NAMES, 2.0)}
        history = tuple(HistoryRow(s, scores, losses, 1.0, s, s, "train") for s in range(10, 60, 10))
        health = {f"distance2/{name}": 1.0 + i for i, name in enumerate(NAMES)}
        rows = tuple(
            WeightRow(s, 0.5, dict.fromkeys(NAMES, 0.25), {"A": {n: s * i / 100 for i, n in enumerate(NAMES)}}, health)
            for s in range(10, 60, 10)
        )
        rows = tuple(
            replace(
                row,
                factors={
                    **row.factors,
                    "D": {"end-task": 0.0},
                    "T": {"mask": row.step / 50, "no-op": 0.0},
                    "R": {"bidirectional": 0.0, "left-to-right": 0.1},
                    "O": {"denoise": 0.0, "end-task": 0.0},
                },
            )
            for row in rows
        )
        failed = record.result.status == "failed"
        result = replace(record.result, error=HOSTILE, log_tail=HOSTILE) if failed else record.result
        weights = rows if record.result.method == "aang" else ()
        store.write(replace(record, result=result, history=() if failed else history, weights=weights))
    return store


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    path = folder / "report.html"
    path.write_text(build_page(fill(folder)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(params=["light", "dark", "phone"])
def page(request: pytest.FixtureRequest, browser: Any, page_file: Path) -> Iterator[Any]:
    """The page, opened; at the end nothing was logged and nothing was asked for."""
    size = {"width": 380 if request.param == "phone" else 1200, "height": 900}
    scheme = "dark" if request.param == "dark" else "light"
    context = browser.new_context(viewport=size, color_scheme=scheme)
    opened, told, asked = context.new_page(), [], []
    opened.on("console", lambda message: told.append(message.text) if message.type == "error" else None)
    opened.on("pageerror", lambda error: told.append(str(error)))
    opened.on("request", lambda request: asked.append(request.url))
    opened.goto(page_file.as_uri())
    opened.wait_for_selector("#charts svg")
    opened.wait_for_selector("#learned svg")
    yield opened
    assert told == []
    assert asked == [page_file.as_uri()]
    assert opened.title() == "Results of store", "no text of the store was run"
    context.close()


def cells(page: Any, table: str, column: int) -> list[str]:
    found: list[str] = page.locator(f"#{table} tbody tr > :nth-child({column})").all_inner_texts()
    return found


def test_it_fits_sorts_filters_and_opens_a_run(page: Any) -> None:
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.locator("#entries th button", has_text="test").first.click()
    assert cells(page, "entries", 1) == ["aang-td n=6", "finetune"]
    page.locator("#entries th button", has_text="test").first.click()
    assert cells(page, "entries", 1) == ["finetune", "aang-td n=6"]
    assert page.locator("#entries th[aria-sort=ascending]").inner_text().startswith("test")
    page.locator("#run-filter").fill("failed")
    assert len(cells(page, "runs", 1)) == 1
    page.locator("#runs tbody button").click()
    dialog = page.get_by_role("dialog")
    assert HOSTILE in dialog.inner_text()
    assert "static-td n=6" in dialog.inner_text()
    page.keyboard.press("Escape")
    assert not dialog.is_visible()
    page.locator("#run-filter").fill("aang")
    page.locator("#runs tbody button").first.focus()
    page.keyboard.press("Enter")
    dialog.locator("svg").wait_for()
    assert "method.name" in dialog.inner_text()
    assert "mask · bidirectional · denoise" in dialog.inner_text()


def test_captions_stay_in_view(page: Any) -> None:
    """Also where the table is wider than the window, and while it is scrolled."""
    page.locator("#runs").evaluate("table => table.parentElement.scrollTo(80, 0)")
    captions = page.locator("caption span").all()
    assert len(captions) == 3
    for caption in captions:
        box = caption.bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= page.viewport_size["width"]


def test_every_line_has_its_name(page: Any) -> None:
    drawn = page.locator("#learned figure", has_text="Factors of the transform").locator("svg")
    assert {"mask", "no-op"} <= set(drawn.locator("text").all_text_contents())


def test_every_figure_is_there(page: Any) -> None:
    page.wait_for_function("[...document.querySelectorAll('figure')].every(one => one.querySelector('svg'))")
    shown = page.locator("figure:has(svg) figcaption").all_inner_texts()
    for start in (
        *("Test score on", "What a run costs on", "Mean dev score on", "Early (first 10 %", "Late (last 50 %"),
        *("Factors of the transform", "Mean weight of the 8 objectives"),
        *("Late weight of the objectives with output denoise", "Training loss of the objectives with output end-task"),
        "Squared distance of the gradient of each objective",
    ):
        assert any(caption.startswith(start) for caption in shown), start


def test_the_reading_is_in_words(page: Any) -> None:
    text = page.locator("section").first.inner_text()
    assert re.search(r"aang-td is 2\.10 points above finetune on .* p (= 0\.\d{3}|< 0\.001) with 3 seeds", text)
    assert "× the time" in text


def test_axe_finds_nothing_serious(page: Any) -> None:
    from axe_playwright_python.sync_playwright import Axe

    page.evaluate("() => 0")
    results = Axe().run(page).response["violations"]
    serious = [one for one in results if one["impact"] in ("serious", "critical")]
    assert not serious, json.dumps([(one["id"], [node["html"][:200] for node in one["nodes"]]) for one in serious])


def test_a_thousand_runs_open_in_two_seconds(browser: Any, tmp_path: Path) -> None:
    store = fill(tmp_path)
    html = build_page(store)
    start, end = html.index('id="data">') + len('id="data">'), html.index("</script>", html.index('id="data">'))
    data = json.loads(html[start:end])
    for count in (1000, 5000):
        data["runs"] = [
            {
                **data["runs"][i % len(data["runs"])],
                "cell": f"{i:016x}",
                "history": [[s, 0.7, 0.5, 0.4] for s in range(50)],
            }
            for i in range(count)
        ]
        path = tmp_path / f"{count}.html"
        text = json.dumps(data).replace("<", "\\u003c")
        path.write_text(html[:start] + text + html[end:], encoding="utf-8")
        page = browser.new_page()
        page.goto(path.as_uri())
        page.wait_for_selector("#charts svg")
        took = page.evaluate("performance.getEntriesByType('navigation')[0].domContentLoadedEventEnd")
        print(f"{count} runs: {took:.0f} ms")
        page.locator("#run-filter").fill(f"{count - 1:016x}")
        started = time.monotonic()
        assert len(cells(page, "runs", 1)) == 1
        assert time.monotonic() - started < 5
        page.close()


def test_the_page_is_small(page_file: Path) -> None:
    assert page_file.stat().st_size < 3_000_000


def test_without_vega_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from aang_ray.errors import UserError

    monkeypatch.setitem(sys.modules, "vl_convert", None)
    with pytest.raises(UserError, match=r"pip install 'aang-ray\[page\]'"):
        build_page(fill(tmp_path))
