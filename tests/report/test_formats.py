"""All formats say the same."""

import csv
import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest

from aang_ray.errors import UserError
from aang_ray.report import Format, build_table, render
from aang_ray.store import Store

Write = Callable[..., None]


@pytest.fixture
def small(store: Store, write: Write) -> Store:
    for seed, (single, multi) in enumerate(((0.74, 0.75), (0.76, 0.80), (0.75, 0.775))):
        write(store, seed=seed, test=single, dev=0.7)
        write(store, method="aang", seed=seed, test=multi, dev=0.8, majority=seed == 0, seconds=1234.56)
    return store


def test_markdown(small: Store) -> None:
    """Differences 0.01, 0.04 and 0.025: mean 0.025, sd 0.015, t = 0.025 / (0.015 / sqrt 3) = 2.88675, two degrees of
    freedom, p = 1 - t / sqrt(2 + t^2) = 0.10197.
    """
    lines = render(build_table(small)).splitlines()
    assert lines[0] == "movie: accuracy in %, 1,500 test examples"
    assert lines[2:6] == [
        "| method      |          test |          dev | seeds | p (pairs) | steps | examples |    tokens | seconds |",
        "| ----------- | ------------: | -----------: | ----: | --------: | ----: | -------: | --------: | ------: |",
        "| finetune    |  75.00 ± 1.00 | 70.00 ± 0.00 |     3 |         – |   100 |    3,200 | 1,000,000 |    10.0 |",
        "| aang-td n=6 | 77.50 ± 2.50† | 80.00 ± 0.00 |     3 | 0.102 (3) |   100 |    3,200 | 1,000,000 | 1,234.6 |",
    ]
    assert lines[-1] == "- † aang-td on movie: 1 of 3 runs never left the majority class on dev."


def test_several_tasks_have_all_scores_at_a_glance(small: Store, write: Write) -> None:
    write(small, task="tweets", test=0.85, dev=0.8)
    lines = render(build_table(small)).splitlines()
    assert lines[0].startswith("Test scores in %")
    assert lines[2:6] == [
        "| method   |   movie, accuracy | tweets, accuracy | average |",
        "| -------- | ----------------: | ---------------: | ------: |",
        "| finetune |  75.00 ± 1.00 (3) |        85.00 (1) |   80.00 |",
        "| aang-td  | 77.50 ± 2.50† (3) |                – |       – |",
    ]
    titles = [line for line in lines if "test examples" in line]
    assert titles == ["movie: accuracy in %, 1,500 test examples", "tweets: accuracy in %, 1,500 test examples"]


def test_the_clean_view_and_the_oracle_are_columns(store: Store, write: Write) -> None:
    write(store, method="aang", dev=0.9, test=0.7, clean=0.6, method__aux_lr=1.0)
    write(store, method="aang", dev=0.8, test=0.75, clean=0.65, method__aux_lr=0.1)
    plain = render(build_table(store))
    assert "oracle" not in plain
    assert "1,480 of them neither in train nor in dev (clean)" in plain
    lines = render(build_table(store, oracle=True)).splitlines()
    header, row = ([cell.strip() for cell in lines[i].split("|")[1:-1]] for i in (2, 4))
    assert (
        dict(zip(header, row, strict=True)).items()
        >= {
            "test": "70.00",
            "test clean": "60.00",
            "oracle": "75.00",
            "dev": "90.00",
        }.items()
    )
    assert any(line.startswith("- oracle: ") for line in lines)


def test_json_has_full_numbers(small: Store) -> None:
    value = json.loads(render(build_table(small, oracle=True), "json"))
    assert value["rows"] == ["finetune", "aang-td"]
    entries = {(entry["row"], entry["chosen_by"]): entry for entry in value["entries"]}
    assert len(entries) == 4
    aang = entries["aang-td", "dev"]
    assert aang["test_values"] == [0.75, 0.80, 0.775]
    assert aang["test_mean"] == pytest.approx(0.775, rel=1e-15)
    assert aang["p_value"] == pytest.approx(0.10197, abs=1e-5)
    assert (aang["seeds"], aang["majority_runs"], aang["seconds"]) == ([0, 1, 2], 1, 1234.56)
    assert aang["settings"]["method.aux_lr"] == "1.0"


def test_csv_has_a_line_an_entry(small: Store, write: Write) -> None:
    write(small, task='ta,sk "x"', test=0.85)
    lines = list(csv.DictReader(io.StringIO(render(build_table(small), "csv"))))
    assert [(line["task"], line["row"]) for line in lines] == [
        ("movie", "finetune"),
        ("movie", "aang-td"),
        ('ta,sk "x"', "finetune"),
    ]
    assert json.loads(lines[1]["test_values"]) == [0.75, 0.80, 0.775]
    assert lines[2]["test_sd"] == ""


def test_latex_escapes(store: Store, write: Write) -> None:
    write(store, task="50%_of_{a}&b", test=0.75)
    write(store, task="50%_of_{a}&b", seed=1, test=0.77, majority=True)
    text = render(build_table(store), "latex")
    assert r"\caption{50\%\_of\_\{a\}\&b: accuracy in \%, 1,500 test examples}" in text
    assert r"finetune & 76.00 $\pm$ 1.41$^\dagger$ & 50.00 $\pm$ 0.00 & 2 & --" in text
    assert text.count(r"\begin{table}") == text.count(r"\end{table}") == 1
    assert not set("±†–") & set(text)


def test_markdown_escapes(store: Store, write: Write) -> None:
    write(store, task="a|b")
    write(store, task="c")
    header = render(build_table(store)).splitlines()[2]
    assert r"a\|b" in header


def numbers(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"[-+]?\d+\.\d\d(?!\d)", text)]


def test_all_formats_say_the_same_numbers(small: Store, write: Write) -> None:
    """Mean and deviation of the paper's shape, parsed from every format."""
    for seed in range(3):
        write(small, task="tweets", seed=seed, test=0.85 + seed / 100, dev=0.8)
        write(small, task="tweets", method="aang", seed=seed, test=0.9 - seed / 50, dev=0.8)
    table = build_table(small, paper=True)
    markdown = [line for line in render(table).splitlines() if line.startswith(("| no", "| yes"))]
    latex = [line for line in render(table, "latex").splitlines() if re.match(r"(no|yes) &", line)]
    rows = re.findall("<tr>(.*?)</tr>", render(table, "html"), flags=re.DOTALL)
    html = [re.sub("<[^>]*>", " ", row) for row in rows if "<td" in row]
    terminal = [line for line in render(table, "terminal").splitlines() if re.match("│ (no|yes) ", line)]
    csv_rows = list(csv.DictReader(io.StringIO(render(table, "csv"))))
    entries = json.loads(render(table, "json"))["entries"]
    for position, row in enumerate(("finetune", "aang-td")):
        expected = [
            round(100 * value, 2)
            for column in ("movie", "tweets")
            for entry in entries
            if (entry["row"], entry["column"]) == (row, column)
            for value in (entry["test_mean"], entry["test_sd"])
        ]
        assert len(expected) == 4
        from_csv = [
            round(100 * float(line[name]), 2)
            for line in csv_rows
            if line["row"] == row
            for name in ("test_mean", "test_sd")
        ]
        average = round((expected[0] + expected[2]) / 2, 2)
        assert from_csv == expected
        assert numbers(markdown[position]) == pytest.approx([*expected, average])
        assert numbers(latex[position]) == pytest.approx([*expected, average])
        assert numbers(html[position]) == pytest.approx([*expected, average])
        assert numbers(re.sub("\x1b[^m]*m", "", terminal[position])) == pytest.approx([*expected, average])


def test_the_best_is_bold_and_the_second_underlined(small: Store, write: Write) -> None:
    for seed in range(3):
        write(small, method="static", seed=seed, test=0.8, dev=0.8)
    table = build_table(small, paper=True)
    assert "**80.00 ± 0.00 (3)**" in render(table)
    assert "<u>77.50 ± 2.50† (3)</u>" in render(table)
    assert r"\textbf{80.00 $\pm$ 0.00 (3)}" in render(table, "latex")
    assert r"\underline{77.50 $\pm$ 2.50$^\dagger$ (3)}" in render(table, "latex")
    html = render(table, "html")
    assert html.count("font-weight: bold") == html.count("text-decoration: underline") == 1


def test_published_scores_stand_beside_a_task_of_the_paper(store: Store, write: Write) -> None:
    write(store, task="citation_intent", test=0.6)
    text = render(build_table(store, paper=True))
    assert "Table 2; RoBERTa-base, 3 seeds, chosen on test" in text
    assert re.search(r"\| yes +\| AANG-TD +\| +24 \| 73.26 ± 1.32 \|", text)
    assert "ACL-ARC" in text
    assert "SciERC" not in text


HOSTILE = "<script>alert(1)</script>|$x$&\\_{%}#~^`"


def test_html_and_markdown_escape_a_task_that_is_a_script(store: Store, write: Write) -> None:
    write(store, task=HOSTILE)
    write(store, task="b")
    html = render(build_table(store), "html")
    assert "<script>" not in html
    assert "&lt;script&gt;" in html
    assert "<script>" not in render(build_table(store)).replace("\\<script>", "")


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="there is no TeX on this machine")
def test_latex_compiles(small: Store, write: Write, tmp_path: Path) -> None:
    for seed in range(3):
        write(small, task=HOSTILE, seed=seed, test=0.7 + seed / 50)
        write(small, task=HOSTILE, method="static", seed=seed, test=0.8, cut=40 if seed == 2 else None)
    pages = [
        render(build_table(small, **options), "latex") for options in ({"oracle": True}, {"paper": True, "tests": True})
    ]
    preamble = r"\documentclass{article}\usepackage{booktabs}\begin{document}"
    (tmp_path / "t.tex").write_text("\n".join([preamble, *pages, r"\end{document}"]), encoding="utf-8")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "t.tex"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-2000:]


def test_an_unknown_format_is_refused(small: Store) -> None:
    with pytest.raises(
        UserError, match="format 'pdf' is unknown; choose one of json, csv, markdown, latex, html, terminal"
    ):
        render(build_table(small), cast(Format, "pdf"))


def test_the_report_needs_neither_torch_nor_ray_nor_scipy_to_start() -> None:
    code = (
        "import sys, aang_ray.report\nprint([m for m in ('torch', 'ray', 'transformers', 'scipy') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
