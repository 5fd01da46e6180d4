"""One run as text: what was set, what it scored, how it went, and why it failed."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from aang_ray.errors import UserError
from aang_ray.report.show import describe_run, list_runs
from aang_ray.store import HistoryRow, Scores, Store, WeightRow

Write = Callable[..., None]


def only_cell(store: Store) -> str:
    (cell,) = store.done()
    return cell


def logged(store: Store, other: Path) -> Store:
    """A copy of a store of one run, with two evaluations and the weights of two objectives."""
    record = store.record(only_cell(store))
    dev = Scores(0.75, 0.7, 40, {"neg": 20, "pos": 20}, 0.51234)
    history = (
        HistoryRow(10, None, {"a/b": 3.0}, 1.0, 0, 100, "tapt"),
        HistoryRow(1030, dev, {"end-task": 0.6, "a/b": 2.5}, 2.0, 960, 2000, "train"),
    )
    weights = (WeightRow(1030, 0.4321, {"a/b": 1.0}, {"A": {"a/b": 0.25, "c/d": 0.5}, "D": {"a": 0.25, "c": 0.5}}, {}),)
    copy = Store(other)
    copy.write(replace(record, history=history, weights=weights))
    return copy


def test_scores_history_and_weights_are_shown(store: Store, write: Write, tmp_path: Path) -> None:
    write(store, method="aang", dev=0.8, test=0.7, clean=0.6)
    text = describe_run(logged(store, tmp_path / "copy"), only_cell(store))
    assert f"cell {only_cell(store)}: aang-td n=6 on movie, seed 0: done" in text
    assert "100 steps, 3,200 end-task examples, 1,000,000 tokens, 10.0 s, best dev at step 60" in text
    lines = [[part.strip() for part in line.strip("|").split("|")] for line in text.splitlines()]
    assert ["dev", "80.00", "40.00", "0.5000", "500", "neg 250, pos 250"] in lines
    assert ["test", "70.00", "35.00", "0.5000", "1,500", "neg 750, pos 750"] in lines
    assert ["test without texts of train or dev", "60.00", "30.00", "0.5000", "1,480", "neg 740, pos 740"] in lines
    assert ["10", "tapt", "–", "–", "–", "–", "0", "1.0"] in lines
    assert ["1,030", "train", "75.00", "70.00", "0.5123", "0.6000", "960", "2.0"] in lines
    assert "Weights at step 1,030: 0.4321 of the end task; of the objectives" in text
    assert lines.index(["c/d", "–", "0.5000", "–"]) < lines.index(["a/b", "1.0000", "0.2500", "2.5000"])
    assert "D: a 0.2500, c 0.5000" in text


def test_the_configuration_is_what_differs_from_the_defaults_of_the_method(store: Store, write: Write) -> None:
    write(store, method="attittud", optim__body_lr=3e-5)
    text = describe_run(store, only_cell(store))
    assert re.search(r"^  method.name: attittud$", text, re.MULTILINE)
    assert re.search(r"^  optim.body_lr: 3e-05$", text, re.MULTILINE)
    assert "optim.head_lr" not in text
    assert "method.refresh_every" not in text
    whole = describe_run(store, only_cell(store), full=True)
    assert "  optim.head_lr: " in whole
    assert "  method.refresh_every: " in whole


def test_a_failed_run_shows_its_error_and_the_end_of_its_log(store: Store, write: Write, tmp_path: Path) -> None:
    write(store, failed=True)
    record = store.record(only_cell(store))
    log = 'Traceback (most recent call last):\n  File "x.py", line 1\nValueError: loss is nan'
    other = Store(tmp_path / "other")
    other.write(replace(record, result=replace(record.result, log_tail=log)))
    text = describe_run(other, only_cell(store))
    assert "seed 0: failed" in text
    assert "Error: loss is nan\n" in text
    assert text.rstrip().endswith(log)
    assert "scores in %" not in text
    assert f"{only_cell(store)} failed: loss is nan" in list_runs(other)


def test_a_run_is_found_by_the_first_characters_of_its_name(store: Store, write: Write) -> None:
    write(store)
    assert describe_run(store, only_cell(store)[:3]) == describe_run(store, only_cell(store))


def test_a_name_that_does_not_name_one_run_is_one_line_with_what_is_there(store: Store, write: Write) -> None:
    for seed in range(5):
        write(store, seed=seed)
    with pytest.raises(UserError, match=r"no run begins with xyz; store \S+ has (\w{16} \(.*?\), ){2}.* and 2 more$"):
        describe_run(store, "xyz")
    with pytest.raises(UserError, match="5 runs begin with ; store"):
        describe_run(store, "")


def test_a_list_of_all_runs(store: Store, write: Write) -> None:
    with pytest.raises(UserError, match=f"there are no runs in store {store.uri}"):
        list_runs(store)
    write(store, seed=1)
    write(store, seed=0)
    lines = list_runs(store).splitlines()
    assert [re.split(r"\s*\|\s*", line)[4:6] for line in lines[2:]] == [["0", "done"], ["1", "done"]]


def test_of_very_many_classes_the_first_are_shown(store: Store, write: Write, tmp_path: Path) -> None:
    write(store)
    record = store.record(only_cell(store))
    many = Scores(0.5, 0.5, 10_000, {f"class-{number}": 1 for number in range(10_000)}, 9.0)
    other = Store(tmp_path / "many")
    other.write(replace(record, result=replace(record.result, dev=many, test=many, test_clean=many)))
    text = describe_run(other, only_cell(other))
    assert "class-19 1 and 9,980 more classes" in text
    assert len(text) < 10_000
