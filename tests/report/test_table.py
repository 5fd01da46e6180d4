"""The arithmetic of the table against examples worked out by hand, and what stands in which place."""

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aang_ray.errors import UserError
from aang_ray.report import Format, build_table, render, trace
from aang_ray.report.select import select
from aang_ray.store import Scores, Store, WeightRow

Write = Callable[..., None]


def line(table: pd.DataFrame, row: str, column: str = "movie", chosen_by: str = "dev") -> Any:
    """The one line of a row and a column, as a tuple with names."""
    (found,) = table[
        (table["row"] == row) & (table["column"] == column) & (table["chosen_by"] == chosen_by)
    ].itertuples()
    return found


def entry(store: Store, row: str, column: str = "movie") -> Any:
    return line(build_table(store), row, column)


def rows(table: pd.DataFrame) -> list[str]:
    """All rows, those without a finished run included."""
    return list(table["row"].cat.categories)


def columns(table: pd.DataFrame) -> list[str]:
    return list(table["column"].unique())


def notes(table: pd.DataFrame) -> list[str]:
    found: list[str] = table.attrs["notes"]
    return found


def budgets(store: Store) -> list[str]:
    return [note for note in notes(build_table(store)) if "budgets" in note]


def test_a_worked_example(store: Store, write: Write) -> None:
    """Paired over seeds 0, 1, 2.

    finetune 0.70 0.72 0.74: mean 0.72, squared deviations 4e-4 + 0 + 4e-4, sd = sqrt(8e-4 / 2) = 0.02.
    static   0.73 0.73 0.79: mean 0.75, squared deviations 4e-4 + 4e-4 + 16e-4, sd = sqrt(24e-4 / 2) = 0.034641.
    Differences 0.03 0.01 0.05: mean 0.03, sd = sqrt(8e-4 / 2) = 0.02, t = 0.03 / (0.02 / sqrt 3) = 2.598, and with 2
    degrees of freedom the two-sided p = 1 - t / sqrt(2 + t^2) = 1 - 2.598 / sqrt(8.75) = 0.12169.
    """
    for seed, (single, multi) in enumerate(zip((0.70, 0.72, 0.74), (0.73, 0.73, 0.79), strict=True)):
        write(store, seed=seed, test=single, dev=0.6, seconds=10.0 + seed)
        write(store, method="static", seed=seed, test=multi, dev=0.7 + 0.1 * seed)
    table = build_table(store)
    assert rows(table) == ["finetune", "static-td"]
    finetune, static = (line(table, row) for row in rows(table))
    chosen = finetune
    assert chosen.test_mean == pytest.approx(0.72)
    assert chosen.test_sd == pytest.approx(0.02)
    assert chosen.seeds == [0, 1, 2]
    assert chosen.seconds == pytest.approx(11.0)
    assert (chosen.steps, chosen.examples, chosen.tokens) == (100, 3200, 1_000_000)
    assert static.test_mean == pytest.approx(0.75)
    assert static.test_sd == pytest.approx(math.sqrt(24e-4 / 2))
    assert static.dev_mean == pytest.approx(0.8)
    assert math.isnan(finetune.p_value)
    t = 0.03 / (0.02 / math.sqrt(3))
    assert static.p_value == pytest.approx(1 - t / math.sqrt(2 + t * t))
    assert static.p_value == pytest.approx(0.12169, abs=1e-5)


def test_dev_chooses_and_the_oracle_chooses_otherwise(store: Store, write: Write) -> None:
    """aux_lr = 1 has the best dev mean (0.80), aux_lr = 0.1 the best test mean (0.79)."""
    for rate, devs, tests in ((1.0, (0.78, 0.82), (0.70, 0.72)), (0.1, (0.70, 0.72), (0.78, 0.80))):
        for seed in (0, 1):
            write(store, method="aang", seed=seed, dev=devs[seed], test=tests[seed], method__aux_lr=rate)
    table = build_table(store, oracle=True)
    selection = line(table, "aang-td")
    assert selection.test_mean == pytest.approx(0.71)
    assert line(table, "aang-td", chosen_by="oracle").test_mean == pytest.approx(0.79)
    assert selection.settings["method.aux_lr"] == "1.0"
    assert dict(selection.differing) == {"method.aux_lr": "1.0"}
    assert "aang-td on movie: method.aux_lr=1.0; best mean dev of 2 configurations." in notes(build_table(store))


def test_sizes_of_the_sample_compete_within_a_row(store: Store, write: Write) -> None:
    for n, dev in ((3, 0.7), (6, 0.8), ("all", 0.75)):
        write(store, method="aang", n=n, dev=dev, test=dev)
    table = build_table(store)
    assert rows(table) == ["aang-td"]
    assert line(table, "aang-td").label == "aang-td n=6"
    assert line(table, "aang-td").candidates == 3


def test_spaces_are_rows_of_their_own(store: Store, write: Write) -> None:
    for space in ("td", "search_spaces/xyz.yaml"):
        write(store, method="aang", space=space, fingerprints__space=space)
    assert rows(build_table(store)) == ["aang-td", "aang-xyz"]


def test_fewer_seeds_do_not_compete(store: Store, write: Write) -> None:
    """A lucky single seed of another configuration must not beat a mean over two."""
    for seed in (0, 1):
        write(store, method="aang", seed=seed, dev=0.7, test=0.7, method__aux_lr=0.1)
    write(store, method="aang", seed=0, dev=0.9, test=0.9, method__aux_lr=1.0)
    selection = entry(store, "aang-td")
    assert selection.test_mean == pytest.approx(0.7)
    assert (selection.candidates, selection.incomplete) == (1, 1)
    assert "aang-td on movie: 1 further configuration has fewer than 2 seeds and did not compete." in (
        notes(build_table(store))
    )


def test_different_problems_are_different_columns(store: Store, write: Write) -> None:
    """A learning curve: more labels must not win as if it were a hyper-parameter."""
    for size, score in ((100, 0.6), (300, 0.7)):
        for method in ("finetune", "aang"):
            write(store, method=method, test=score, dev=score, data__train_size=size)
    table = build_table(store)
    assert columns(table) == ["movie (train_size=100)", "movie (train_size=300)"]
    assert line(table, "aang-td", "movie (train_size=100)").test_mean == pytest.approx(0.6)
    assert not any("configurations" in note for note in notes(table))


def test_encoders_are_columns_by_name(store: Store, write: Write) -> None:
    for name, content in (("bert", "1" * 16), ("roberta", "2" * 16)):
        write(store, encoder__name=name, fingerprints__encoder=content)
    assert columns(build_table(store)) == ["movie (name=bert)", "movie (name=roberta)"]


def test_changed_content_behind_one_name_is_told_by_its_fingerprint(store: Store, write: Write) -> None:
    for content in ("1" * 16, "2" * 16):
        write(store, fingerprints__data=content)
    assert columns(build_table(store)) == [f"movie (data={d * 12})" for d in "12"]


def test_the_same_content_under_another_path_is_the_same_column(store: Store, write: Write) -> None:
    write(store, data__task="/here/movie")
    write(store, seed=1, data__task="/there/movie")
    assert columns(build_table(store)) == ["movie"]
    assert entry(store, "finetune").seeds == [0, 1]


def test_tasks_are_columns_and_a_missing_run_leaves_a_gap(store: Store, write: Write) -> None:
    write(store)
    write(store, task="tweets")
    write(store, method="aang", task="tweets")
    table = build_table(store)
    assert columns(table) == ["movie", "tweets"]
    assert set(table["column"][table["row"] == "aang-td"]) == {"tweets"}


def test_rows_stand_in_the_papers_order(store: Store, write: Write) -> None:
    for method in ("aang", "static", "finetune"):
        write(store, method=method)
    assert rows(build_table(store)) == ["finetune", "static-td", "aang-td"]


def test_both_test_views(store: Store, write: Write) -> None:
    write(store, test=0.8, clean=0.7)
    table = build_table(store)
    found = line(table, "finetune")
    assert (found.test_examples, found.clean_examples) == (1500, 1480)
    assert "test clean" in render(table)
    assert found.test_clean_mean == pytest.approx(0.7)


def test_a_chosen_metric_chooses_and_is_shown(store: Store, write: Write) -> None:
    write(store, test=0.8)
    table = build_table(store, metric="macro_f1")
    assert set(table["metric"]) == {"macro_f1"}
    assert line(table, "finetune").test_mean == pytest.approx(0.4)
    with pytest.raises(UserError, match="metric 'f1' is unknown; choose one of accuracy, macro_f1"):
        build_table(store, metric="f1")


def test_the_majority_class_is_marked(store: Store, write: Write) -> None:
    write(store, seed=0, majority=True)
    write(store, seed=1)
    assert entry(store, "finetune").majority_runs == 1
    assert notes(build_table(store)) == ["† finetune on movie: 1 of 2 runs never left the majority class on dev."]


def test_failed_runs_are_counted(store: Store, write: Write) -> None:
    write(store)
    for seed in (0, 1):
        write(store, method="aang", seed=seed, failed=True)
    table = build_table(store)
    assert rows(table) == ["finetune", "aang-td"]
    assert "aang-td on movie: 2 runs failed." in notes(table)


def test_failed_runs_that_were_mended_are_not_counted(store: Store, write: Write) -> None:
    """With other data and the same settings they have other names; with another rate they are another configuration."""
    write(store)
    write(store, method="aang", failed=True, fingerprints__data="print-of-broken")
    assert any("failed" in note for note in notes(build_table(store)))
    write(store, method="aang")
    assert not any("failed" in note for note in notes(build_table(store)))
    write(store, method="aang", failed=True, optim__body_lr=10.0)
    assert "aang-td on movie: 1 run failed." in notes(build_table(store))


def test_only_the_columns_of_some_configurations(store: Store, write: Write) -> None:
    write(store, data__train_size=100)
    write(store)
    write(store, task="tweets", failed=True)
    write(store, method="aang", failed=True)
    write(store, method="static", task="tweets")
    (group,) = set(
        store.results(["group", "row", "task", "status"]).to_pandas().query("row.str.startswith('aang')")["group"]
    )
    write(store, method="aang", seed=1)
    table = build_table(store, groups={group})
    assert columns(table) == ["movie (train_size=all)"]
    assert rows(table) == ["finetune", "aang-td"]  # what other sweeps ran on the same data stands beside it
    assert notes(table)[-1] == "aang-td on movie: 1 run failed."


def test_runs_that_were_cut_short_are_in_no_average_and_marked(store: Store, write: Write) -> None:
    write(store, test=0.6)
    write(store, dev=0.9, optim__body_lr=1e-3, cut=40)
    write(store, dev=0.9, optim__body_lr=2e-3, cut=60)
    write(store, method="aang", dev=0.9, cut=40)
    table = build_table(store)
    chosen = entry(store, "finetune")
    assert chosen.test_values == [0.6]
    assert (chosen.candidates, chosen.cut) == (1, 2)
    assert [note for note in notes(table) if note.startswith("‡")] == [
        "‡ aang-td on movie: 1 run was cut short by a scheduler after 40 steps and did not compete.",
        "‡ finetune on movie: 2 runs were cut short by a scheduler after 40 to 60 steps and did not compete.",
    ]
    assert rows(table) == ["finetune", "aang-td"]
    text = render(table)
    assert "60.00‡" in text
    assert render(table, "latex").count(r"$^\ddagger$") == 3


def test_unequal_budgets_are_told(store: Store, write: Write) -> None:
    write(store)
    write(store, method="static")
    assert budgets(store) == []
    write(store, method="aang", schedule__steps=200)
    assert budgets(store) == [
        "movie: budgets of end-task examples differ: aang-td 6,400, finetune 3,200, static-td 3,200."
    ]


def test_rounds_have_the_budget_that_their_runs_have_seen(store: Store, write: Write) -> None:
    """Twice the steps, of which half are the end task's: 3,200 examples; a quarter of them where that is what was."""
    write(store)
    write(store, method="alphavil", schedule__steps=200)
    assert budgets(store) == []
    write(store, method="diw", examples=800)
    assert budgets(store) == [
        "movie: budgets of end-task examples differ: alphavil-td 3,200, diw-td 800, finetune 3,200."
    ]


def test_rows_that_are_older_than_a_setting_stand_with_its_default(store: Store, write: Write, tmp_path: Path) -> None:
    """A configuration in the store has the settings of its day."""
    for seed in (0, 1):
        write(store, seed=seed, test=0.5 + seed / 10)
    write(store, method="static", seed=0)
    mixed = Store(tmp_path / "mixed")
    for cell in store.done():
        record = store.record(cell)
        config = json.loads(json.dumps(record.result.config))
        if record.result.seed == 0:
            del config["data"]["external"], config["encoder"]["revision"], config["final_finetune"]
        mixed.write(replace(record, result=replace(record.result, config=config)))
    table = build_table(mixed)
    assert columns(table) == ["movie"]
    assert entry(mixed, "finetune").seeds == [0, 1]
    assert render(table) == render(build_table(store))


def test_a_final_fine_tuning_counts_in_the_budget(store: Store, write: Write) -> None:
    write(store)
    write(store, final_finetune__steps=10)
    assert budgets(store) == ["movie: budgets of end-task examples differ: finetune 3,200, finetune+finetune 3,520."]


def test_the_budget_of_tied_compute_and_of_convergence(store: Store, write: Write) -> None:
    """100 steps of 32 + 64 examples, all of the end task; a run until convergence has the budget that it has seen."""
    write(store)
    write(store, method__tied_compute=True, batch__auxiliary=64, examples=9600)
    write(store, method="static", schedule__until="converged", examples=1234)
    assert budgets(store) == [
        "movie: budgets of end-task examples differ: finetune 3,200, finetune-tied 9,600, static-td 1,234."
    ]


@pytest.mark.parametrize(
    ("ours", "seeds"),
    [((0.7,), (0,)), ((0.7, 0.9), (0, 1)), ((0.7, 0.8), (5, 6)), ((0.6, 0.7, 0.8), (0, 1, 2))],
    ids=["one seed", "two seeds", "no common seed", "equal differences"],
)
def test_no_p_value_where_there_is_no_test(
    store: Store, write: Write, ours: tuple[float, ...], seeds: tuple[int, ...]
) -> None:
    for seed, test in enumerate((0.5, 0.6, 0.7)):
        write(store, seed=seed, test=test)
    for seed, test in zip(seeds, ours, strict=True):
        write(store, method="static", seed=seed, test=test)
    table = build_table(store)
    static = line(table, "static-td")
    assert math.isnan(static.p_value)
    pairs = len({0, 1, 2} & set(seeds))
    assert static.pairs == pairs
    assert any(
        note.endswith(f": static-td on movie ({pairs}).") and note.startswith("No p-value") for note in notes(table)
    )
    assert f"– ({pairs})" in render(table)


def test_a_tiny_p_value_is_not_printed_as_zero(store: Store, write: Write) -> None:
    for seed in range(5):
        write(store, seed=seed, test=0.5)
        write(store, method="static", seed=seed, test=0.8 + 0.0001 * seed)
    assert entry(store, "static-td").p_value < 1e-6
    assert "| < 0.001 (5) |" in render(build_table(store))


@pytest.mark.parametrize("form", ["markdown", "latex", "json", "csv"])
def test_a_task_without_a_clean_test_text_does_not_disturb_the_table(store: Store, write: Write, form: Any) -> None:
    """All its test texts are also in train or dev: the scores of the clean view are not numbers."""
    for seed in (0, 1):
        write(store, seed=seed, test=0.5 + 0.1 * seed, clean=math.nan)
        write(store, method="static", seed=seed, test=0.6 + 0.2 * seed, clean=math.nan)
        write(store, task="tweets", seed=seed, test=0.7 + 0.1 * seed, clean=0.6)
    table = build_table(store, oracle=True)
    assert line(table, "finetune").test_mean == pytest.approx(0.55)
    assert math.isnan(line(table, "finetune").test_clean_mean)
    assert math.isnan(line(table, "finetune").test_clean_sd)
    assert line(table, "finetune", "tweets").test_clean_mean == pytest.approx(0.6)
    assert "nan" not in render(table, form).lower()


def test_the_pairs_of_a_p_value_are_those_seeds_that_both_rows_have(store: Store, write: Write) -> None:
    """static has seeds 0 to 3, finetune 0 to 2: three pairs."""
    for seed, test in enumerate((0.5, 0.6, 0.5)):
        write(store, seed=seed, test=test)
    for seed, test in enumerate((0.7, 0.9, 0.8, 0.1)):
        write(store, method="static", seed=seed, test=test)
    table = build_table(store)
    assert line(table, "static-td").pairs == 3
    # d = (0.2, 0.3, 0.3): mean 0.26667, sd 0.057735, t = 8; two degrees of freedom: p = 1 - 8 / sqrt(66) = 0.01527.
    assert "| 0.015 (3) |" in render(table)


def test_nothing_to_report_is_one_line(store: Store, write: Write) -> None:
    with pytest.raises(UserError, match=f"there is no store at {store.uri}"):
        build_table(store)
    write(store, failed=True)
    with pytest.raises(UserError, match=r"has no finished run \(1 failed\)"):
        build_table(store)


def test_a_task_whose_test_texts_all_stand_in_train_or_dev_has_no_clean_score(
    store: Store, write: Write, tmp_path: Path
) -> None:
    """The clean view is empty there, its scores are not numbers, and the table of all tasks must still be made."""
    for seed in range(3):
        write(store, seed=seed, test=0.7 + seed / 50)
        write(store, task="other", seed=seed)
        write(store, method="static", seed=seed, test=0.8 + seed / 50)
    empty, nan = Store(tmp_path / "empty"), float("nan")
    for cell in store.done():
        record = store.record(cell)
        nothing = Scores(nan, nan, 0, {"neg": 0, "pos": 0}, nan)
        clean = nothing if record.result.task == "movie" else record.result.test_clean
        empty.write(replace(record, result=replace(record.result, test_clean=clean)))
    table = build_table(empty)
    assert line(table, "finetune").test_clean_values is None
    assert math.isnan(line(table, "finetune").test_clean_mean)
    for form in get_args(Format):
        assert "nan" not in render(table, form).lower()
    assert "movie: accuracy in %, 1,500 test examples, all of them also in train or in dev" in render(table)
    clean = build_table(empty, view="test_clean")
    assert line(clean, "static-td").pairs == 0
    assert re.search(r"\| finetune  \| +– \| +50.00 ± 0.00 \(3\) \|", render(clean))


def test_rows_and_columns_of_ones_own(store: Store, write: Write) -> None:
    """Table 3 of the paper: one configuration is chosen for each n; the baseline is that of the same problem."""
    for seed in range(3):
        write(store, seed=seed, test=0.70 + seed / 100)
        for n, test in ((3, 0.72), (6, 0.75), ("all", 0.71)):
            write(store, method="aang", n=n, seed=seed, test=test + seed / 50, dev=0.5, method__aux_lr=0.1)
            write(store, method="aang", n=n, seed=seed, test=0.1, dev=0.4, method__aux_lr=1.0)
    table = build_table(store, rows=("method",), cols=("n",))
    assert list(table["column"].cat.categories) == ["–", "n=3", "n=6", "n=all"]
    assert set(table["block"]) == {"movie"}
    assert line(table, "aang-td", "n=6").test_mean == pytest.approx(0.77)
    assert line(table, "aang-td", "n=6").difference == pytest.approx(0.06)
    assert line(table, "aang-td", "n=3").candidates == 2
    turned = build_table(store, rows=("method", "n"), cols=("task",))
    assert rows(turned) == ["finetune", "aang-td n=3", "aang-td n=6", "aang-td n=all"]
    assert line(turned, "aang-td n=6").p_value == line(table, "aang-td", "n=6").p_value
    rates = build_table(store, rows=("method",), cols=("method.aux_lr",))
    assert line(rates, "aang-td", "aux_lr=1.0").test_mean == pytest.approx(0.1)
    with pytest.raises(UserError, match=r"has the setting data\.size"):
        build_table(store, cols=("data.size",))
    with pytest.raises(UserError, match="each may stand once"):
        build_table(store, rows=("method", "n"), cols=("n",))


def test_a_learning_curve_has_a_column_for_each_size(store: Store, write: Write) -> None:
    for size in (1000, 300, 100):
        for seed in range(3):
            write(store, seed=seed, test=0.6 + size / 1e4 + seed / 100, data__train_size=size)
            write(store, method="aang", seed=seed, test=0.61 + size / 1e4 + seed / 50, data__train_size=size)
    table = build_table(store, cols=("data.train_size",))
    assert list(table["column"].cat.categories) == ["train_size=100", "train_size=300", "train_size=1000"]
    assert set(table["block"]) == {"movie"}
    assert line(table, "aang-td", "train_size=300").difference == pytest.approx(0.02)
    write(store)
    assert "train_size=all" in set(build_table(store, cols=("data.train_size",))["column"])


def test_any_row_can_be_the_baseline(store: Store, write: Write) -> None:
    for seed in range(3):
        write(store, seed=seed, test=0.70)
        write(store, method="static", seed=seed, test=0.71 + seed / 50)
        write(store, method="aang", seed=seed, test=0.75 + seed / 100)
    table = build_table(store, against="static-td")
    assert line(table, "finetune").difference == pytest.approx(-0.03)
    assert math.isnan(line(table, "static-td").pairs)
    assert line(table, "aang-td").difference == pytest.approx(0.03)
    with pytest.raises(UserError, match="there is no row 'static'; choose one of aang-td, finetune, static-td"):
        build_table(store, against="static")


def test_the_papers_comparison_is_with_the_best_row_of_one_objective(store: Store, write: Write) -> None:
    """Each of three seeds 0, 1, 2; the space of `bert` has one objective, that of `td` several."""
    for seed in range(3):
        write(store, seed=seed, test=0.70, dev=0.5)
        write(store, method="aang", space="bert", n=1, seed=seed, test=0.72 + seed / 100, dev=0.6)
        write(store, method="aang", seed=seed, test=0.75, dev=0.7)
    weighed = Store(f"{store.uri}-weighed")
    for cell in store.done():
        record = store.record(cell)
        names = {"bert": ["a"], "td": ["a", "b", "c"], None: []}[record.result.space]
        row = WeightRow(10, 0.5, dict.fromkeys(names, 0.5), {"A": dict.fromkeys(names, 0.0)}, {})
        weighed.write(replace(record, weights=(row,) if names else ()))
    table = build_table(weighed, paper=True)
    assert [line(table, row).objectives for row in rows(table)] == [1, 3, 1]
    aang = line(table, "aang-td")
    assert (aang.adaptive, line(table, "finetune").adaptive) == (True, False)
    assert aang.difference == pytest.approx(0.02)
    assert math.isnan(line(table, "bert-style").pairs)


def test_a_number_is_traced_to_its_runs(store: Store, write: Write) -> None:
    for seed in range(2):
        write(store, method="aang", seed=seed, test=0.7 + seed / 10, dev=0.8, method__aux_lr=0.1)
        write(store, method="aang", seed=seed, test=0.1, dev=0.6, method__aux_lr=1.0)
    text = trace(store, "aang-td@movie")
    assert "chosen among 2 by its mean dev accuracy of 80.00" in text
    assert "  method.aux_lr: 0.1" in text
    for cell, status in store.done().items():
        assert status == "done"
        result = store.record(cell).result
        assert (f"cell {cell}" in text) == (result.dev is not None and result.dev.accuracy == 0.8)
    assert re.search(r"not chosen: \w{16}, mean dev 60.00 over 2 seeds; method.aux_lr=1.0", text)
    write(store, method="aang", test=0.5, data__train_size=100)
    both = trace(store, "aang-td@movie")
    assert "aang-td on movie (train_size=100):" in both
    assert "aang-td on movie (train_size=all):" in both
    assert "train_size=100" not in trace(store, "aang-td@movie (train_size=all)")
    with pytest.raises(UserError, match="the table has no place 'static'; it has aang-td@movie"):
        trace(store, "static")


@given(st.lists(st.floats(0, 1), min_size=2, max_size=8), st.floats(-1, 1))
def test_a_shift_moves_the_mean_and_not_the_deviation(values: list[float], shift: float) -> None:
    plain, moved = (
        select(
            pd.DataFrame(
                {
                    "group": "g",
                    "label": "l",
                    "seed": range(len(tests)),
                    "choices": [{}] * len(tests),
                    "majority": False,
                    **dict.fromkeys(("test_clean", "dev", "steps", "examples", "tokens", "seconds"), 1.0),
                    "test": tests,
                }
            )
        )["dev"]
        for tests in (values, [value + shift for value in values])
    )
    assert moved["test_mean"] == pytest.approx(plain["test_mean"] + shift, abs=1e-12)
    assert moved["test_sd"] == pytest.approx(plain["test_sd"], abs=1e-9)
