"""The four formats say the same."""

import csv
import io
import json
import subprocess
import sys
from collections.abc import Callable
from typing import cast

import pytest

from aang_ray.errors import UserError
from aang_ray.report import Format, build_table, render
from aang_ray.store import Store

Write = Callable[..., None]


@pytest.fixture
def small(store: Store, write: Write) -> Store:
    for seed, (single, multi) in enumerate(((0.74, 0.75), (0.76, 0.80))):
        write(store, seed=seed, test=single, dev=0.7)
        write(store, method="aang", seed=seed, test=multi, dev=0.8, majority=seed == 0, seconds=1234.56)
    return store


def test_markdown(small: Store) -> None:
    """Differences 0.01 and 0.04: mean 0.025, t = 0.025 / (0.0212132 / sqrt 2) = 5/3, p = 1 - 2/pi atan(5/3) = 0.344."""
    lines = render(build_table(small)).splitlines()
    assert lines[0] == "movie: accuracy in %, 1,500 test examples"
    assert lines[2:6] == [
        "| method      |          test |          dev | seeds |     p | steps | examples |    tokens | seconds |",
        "| ----------- | ------------: | -----------: | ----: | ----: | ----: | -------: | --------: | ------: |",
        "| finetune    |  75.00 ± 1.41 | 70.00 ± 0.00 |     2 |     – |   100 |    3,200 | 1,000,000 |    10.0 |",
        "| aang-td n=6 | 77.50 ± 3.54† | 80.00 ± 0.00 |     2 | 0.344 |   100 |    3,200 | 1,000,000 | 1,234.6 |",
    ]
    assert lines[-1] == "- † aang-td on movie: 1 of 2 runs never left the majority class on dev."


def test_several_tasks_have_all_scores_at_a_glance(small: Store, write: Write) -> None:
    write(small, task="tweets", test=0.85, dev=0.8)
    lines = render(build_table(small)).splitlines()
    assert lines[0].startswith("Test scores in %")
    assert lines[2:6] == [
        "| method   |   movie, accuracy | tweets, accuracy | average |",
        "| -------- | ----------------: | ---------------: | ------: |",
        "| finetune |  75.00 ± 1.41 (2) |        85.00 (1) |   80.00 |",
        "| aang-td  | 77.50 ± 3.54† (2) |                – |       – |",
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
    assert aang["test_values"] == [0.75, 0.80]
    assert aang["test_mean"] == pytest.approx(0.775, rel=1e-15)
    assert aang["p_value"] == pytest.approx(0.34404, abs=1e-5)
    assert (aang["seeds"], aang["majority_runs"], aang["seconds"]) == ([0, 1], 1, 1234.56)
    assert aang["settings"]["method.aux_lr"] == "0.1"


def test_csv_has_a_line_an_entry(small: Store, write: Write) -> None:
    write(small, task='ta,sk "x"', test=0.85)
    lines = list(csv.DictReader(io.StringIO(render(build_table(small), "csv"))))
    assert [(line["task"], line["row"]) for line in lines] == [
        ("movie", "finetune"),
        ("movie", "aang-td"),
        ('ta,sk "x"', "finetune"),
    ]
    assert json.loads(lines[1]["test_values"]) == [0.75, 0.80]
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


def test_an_unknown_format_is_refused(small: Store) -> None:
    with pytest.raises(UserError, match="format 'html' is unknown; choose one of json, csv, markdown, latex"):
        render(build_table(small), cast(Format, "html"))


def test_the_report_needs_neither_torch_nor_ray_nor_scipy_to_start() -> None:
    code = (
        "import sys, aang_ray.report\nprint([m for m in ('torch', 'ray', 'transformers', 'scipy') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
