"""Every figure is drawn from what was logged, and says in one line what it lacks."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from aang_ray.errors import UserError
from aang_ray.report.figures import FIGURES, interval, plot
from aang_ray.report.logged import Logged, early_and_late, readable
from aang_ray.report.weights import agreement, describe_weights
from aang_ray.store import HistoryRow, Store, WeightRow

Write = Callable[..., None]
NAMES = [f"end-task/{t}/{r}/{o}" for t in ("mask", "no-op") for r in ("bidirectional", "left-to-right") for o in "ab"]


def factors(step: int, seed: int) -> dict[str, dict[str, float]]:
    """The logit of `mask` grows by 0.1 a step of 10, the same for all seeds; one objective has a part of its own."""
    own = {name: (0.05 * seed if name == NAMES[0] else 0.0) for name in NAMES}
    transforms = {"mask": step / 100, "no-op": 0.0}
    return {
        "A": own,
        "D": {"end-task": 0.0},
        "T": transforms,
        "R": {"bidirectional": step / 200, "left-to-right": 0.0},
        "O": {"a": 0.0, "b": step / 400},
    }


def log(store: Store, folder: Path) -> Store:
    """A copy of a store whose runs have ten logged steps, weights that grow, losses and distances."""
    copy = Store(folder)
    for cell in store.done():
        record = store.record(cell)
        learned = record.result.method == "aang"
        steps = range(10, 101, 10)
        history = tuple(
            HistoryRow(s, record.result.dev, {"end-task": 1.0, **dict.fromkeys(NAMES, 2.0)}, s, s, s, "train")
            for s in steps
        )
        rows = tuple(
            WeightRow(
                s, 0.5, {}, factors(s, record.result.seed), {f"distance2/{n}": 1.0 + i for i, n in enumerate(NAMES)}
            )
            for s in steps
        )
        copy.write(replace(record, history=history, weights=rows if learned else ()))
    return copy


@pytest.fixture
def logged(store: Store, write: Write, tmp_path: Path) -> Store:
    for size in (100, 300):
        for seed in range(3):
            write(store, seed=seed, test=0.7 + seed / 100, data__train_size=size)
            write(store, method="aang", seed=seed, test=0.72 + seed / 50, data__train_size=size)
    return log(store, tmp_path / "logged")


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_is_drawn(logged: Store, tmp_path: Path, name: str) -> None:
    plot(name, logged, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("ending", "start"), [("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_the_same_store_gives_the_same_file(logged: Store, tmp_path: Path, ending: str, start: bytes) -> None:
    pictures = []
    for name in ("a", "b"):
        plot("bars", logged, tmp_path / f"{name}.{ending}")
        pictures.append((tmp_path / f"{name}.{ending}").read_bytes())
    assert pictures[0] == pictures[1]
    assert pictures[0].startswith(start)


def test_a_figure_names_its_axes_rows_and_units(logged: Store, tmp_path: Path) -> None:
    def text(name: str) -> str:
        plot(name, logged, tmp_path / "figure.svg")
        return (tmp_path / "figure.svg").read_text(encoding="utf-8")

    assert {">finetune<", ">aang-td<", ">test accuracy (%)<"} <= set(_texts(text("bars")))
    assert {">labelled training texts<", ">test accuracy (%)<", ">300<"} <= set(_texts(text("curve")))
    assert {">transform<", ">mask<", ">step<"} <= set(_texts(text("weights")))
    assert {">seconds of a run<"} <= set(_texts(text("cost")))
    assert {">training loss (nats)<"} <= set(_texts(text("losses")))


def _texts(svg: str) -> list[str]:
    return [f">{part.partition('<')[0]}<" for part in svg.split(">")]


def test_what_a_figure_lacks_is_one_line(store: Store, write: Write, tmp_path: Path) -> None:
    write(store)
    path = tmp_path / "a.png"
    for name, message in {
        "weights": "no run with learned weights",
        "objectives": "no run with learned weights",
        "space": "no run with learned weights",
        "distances": "gradients.local_distances=true",
        "losses": "losses of auxiliary objectives",
        "curve": "several data.train_size",
        "pie": "figure 'pie' is unknown; choose one of bars, weights",
    }.items():
        with pytest.raises(UserError, match=message):
            plot(name, store, path)
    with pytest.raises(UserError, match="one of the endings"):
        plot("bars", store, tmp_path / "a.jpg")
    with pytest.raises(UserError, match="cannot be written"):
        plot("bars", store, tmp_path / "none" / "a.png")
    with pytest.raises(UserError, match="the table has no row 'aang'; choose one of finetune"):
        plot("bars", store, path, rows=["aang"])


def test_without_matplotlib_the_extra_is_named(
    store: Store, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(store)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"pip install 'aang-ray\[figures\]'"):
        plot("bars", store, tmp_path / "a.png")


def test_the_interval_is_students(logged: Store) -> None:
    """t(0.975, 2 degrees of freedom) = 4.302653."""
    assert interval(0.7, 0.01, 3) == pytest.approx((0.7 - 4.302653 * 0.01 / 3**0.5, 0.7 + 4.302653 * 0.01 / 3**0.5))
    assert interval(0.7, 0.01, 1) is None


def test_weights_are_the_softmax_of_the_sums_of_factors(logged: Store) -> None:
    frame = Logged(logged, ["aang-td"], ["movie (train_size=100)"]).weights()
    last = frame[(frame["step"] == 100) & (frame["seed"] == 2)].set_index("objective")["weight"]
    logits = np.array(
        [1.0 * ("mask" in n) + 0.5 * ("bidir" in n) + 0.25 * n.endswith("b") + 0.1 * (n == NAMES[0]) for n in NAMES]
    )
    assert last[NAMES].to_numpy() == pytest.approx(np.exp(logits) / np.exp(logits).sum())


def test_early_is_the_first_tenth_and_late_the_last_half(logged: Store) -> None:
    """Steps 10, ..., 100: early is step 10 alone, late are 60 to 100."""
    frame = Logged(logged, ["aang-td"], ["movie (train_size=100)"]).weights()
    one = frame[(frame["seed"] == 0) & (frame["objective"] == NAMES[1])].set_index("step")["weight"]
    means = early_and_late(frame)
    found = means[(means["seed"] == 0) & (means["objective"] == NAMES[1])].iloc[0]
    assert found["early"] == pytest.approx(one[10])
    assert found["late"] == pytest.approx(one[[60, 70, 80, 90, 100]].mean())


def test_seeds_that_agree_and_seeds_that_follow_noise(logged: Store) -> None:
    text = describe_weights(Logged(logged, ["aang-td"], ["movie (train_size=100)"]))
    assert "aang-td on movie (train_size=100): 8 objectives with logged weights, 3 seeds; weight of the" in text
    assert "The seeds order the objectives alike (Kendall's W" in text
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    assert lines[4][0] == "mask · bidirectional · b"
    (mask,) = [line for line in lines if line[:2] == ["transform", "mask"]]
    assert float(mask[3]) > float(mask[2]) > float(mask[4]) - 0.001 == 0.499


def test_kendalls_w_of_opposite_orders() -> None:
    """Two seeds with opposite orders: all rank sums are equal, W = 0. Equal orders: W = 1, and Friedman's statistic is
    seeds (objectives - 1) = 8 with 4 degrees of freedom, p = exp(-4) (1 + 4) = 0.0916.
    """

    def part(second: list[float]) -> pd.DataFrame:
        lines = [("abcde"[i], s, v) for s, vs in enumerate(([1.0, 2, 3, 4, 5], second)) for i, v in enumerate(vs)]
        return pd.DataFrame(lines, columns=["objective", "seed", "late"])

    opposite = agreement(part([5.0, 4, 3, 2, 1]))
    assert (opposite["w"], "follow noise" in opposite["sentence"]) == (pytest.approx(0.0, abs=1e-12), True)
    equal = agreement(part([1.0, 2, 3, 4, 5]))
    assert (equal["w"], equal["p"]) == (pytest.approx(1.0), pytest.approx(5 * np.exp(-4)))
    assert agreement(part([])[:5])["w"] is None


def test_equal_weights_and_no_weights_are_said(store: Store, write: Write, tmp_path: Path) -> None:
    write(store)
    with pytest.raises(UserError, match="no run of the store has weights"):
        describe_weights(Logged(store))


def test_names_for_people() -> None:
    assert readable("end-task/mask/bidirectional/denoise") == "mask · bidirectional · denoise"
    assert readable("in-domain/mask/bidirectional/denoise") == "in-domain · mask · bidirectional · denoise"
    assert readable("end-task") == "end-task"
