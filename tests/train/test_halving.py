"""Search by short trials, then training with what helped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.special import logsumexp
from scipy.stats import ttest_rel

from aang_ray.config.methods import HalvingConfig
from aang_ray.config.run import RunConfig
from aang_ray.objectives.calibration import RIDGE
from aang_ray.store.schema import CellRecord, WeightRow
from aang_ray.train.control import RunControl
from aang_ray.train.evaluate import Predictions
from aang_ray.train.halving import Search, example_losses, z_of
from aang_ray.train.run import run_cell
from tests.train.running import tiny_config
from tests.train.test_checkpoint import numbers

SEARCH = ["method.name=halving", "method.trial_steps=2", "method.finalists=2"]
SPACE = """
blocks:
  - data: [end-task]
    transform: [mask]
    representation: [bidirectional, left-to-right, right-to-left]
    output: [denoise]
"""
"""Three objectives."""


@pytest.fixture
def same(tmp_path: Path) -> list[str]:
    """What a search and the runs that it is compared with have in common."""
    file = tmp_path / "three.yaml"
    file.write_text(SPACE, encoding="utf-8")
    return [f"space={file}", "n=all", "schedule.steps=4", "schedule.eval_every=2"]


@pytest.mark.parametrize(
    ("candidates", "rungs"),
    [
        (12, [(12, 13), (6, 25), (3, 50)]),  # 50 / 4 = 12.5 and 50 / 2, rounded up
        (24, [(24, 7), (12, 13), (6, 25), (3, 50)]),
        (4, [(4, 25), (3, 50)]),
        (3, [(3, 50)]),
        (1, [(1, 50)]),
    ],
)
def test_rungs(candidates: int, rungs: list[tuple[int, int]]) -> None:
    config = HalvingConfig(candidates=candidates)
    assert config.rungs(candidates) == rungs
    # At most: the end task alone, then the best 2, …, all finalists together.
    assert config.pretraining_steps == sum(size * steps for size, steps in rungs) + 50 * rungs[-1][0]


def test_z_is_the_statistic_of_the_paired_t_test() -> None:
    rng = np.random.default_rng(0)
    better, worse = rng.normal(0.5, 1, 40), rng.normal(0.7, 1, 40)
    assert z_of(better, worse) == pytest.approx(ttest_rel(worse, better).statistic)
    assert z_of(better, better) == 0.0
    assert z_of(better, better + 1) > 1e6


@pytest.mark.parametrize("weights", [None, (1.0, 3.0, 0.5)])
def test_the_loss_of_a_trial_is_calibrated(weights: tuple[float, ...] | None) -> None:
    """The mean is the minimum over scale and biases that SciPy finds, less the ridge, which is not part of the loss."""
    rng = np.random.default_rng(1)
    logits, labels = rng.normal(size=(60, 3)), rng.integers(0, 3, 60)
    logits[np.arange(60), labels] += 1.0
    share = np.ones(60) if weights is None else np.asarray(weights)[labels]
    share = share / share.sum()

    def loss(x: Any, ridge: float) -> float:
        z = np.exp(x[0]) * logits + x[1:]
        return float(share @ (logsumexp(z, axis=1) - z[np.arange(60), labels]) + ridge / 2 * x @ x)

    found = minimize(loss, np.zeros(4), args=(RIDGE,), tol=1e-10)
    predictions = Predictions(torch.tensor(logits), labels)
    class_weights = None if weights is None else torch.tensor(weights)
    losses = example_losses(predictions, class_weights)
    assert losses.shape == (60,)
    assert losses.mean() == pytest.approx(loss(found.x, 0.0), abs=1e-6)


ALONE = "end-task"


def searched(losses: dict[str, float], **settings: Any) -> tuple[Search, list[WeightRow], list[str]]:
    """A finished search in which each trial's examples have these mean losses, whatever its steps; and its trials."""
    noise = np.tile([0.1, -0.1], 50)  # the same in all trials but for a small part of each trial's own
    own = {key: np.roll(np.tile([0.02, -0.01, -0.01, 0.0], 25), place) for place, key in enumerate(losses)}
    search = Search([key for key in losses if key != ALONE and "+" not in key], HalvingConfig(**settings))
    rows, trials = [], []
    while not search.over:
        trial = "+".join(search.next) or ALONE
        trials.append(trial)
        row = search.judge(losses[trial] + noise + own[trial], step=len(rows))
        rows += [row] if row is not None else []
    return search, rows, trials


def test_the_better_half_goes_on_and_the_best_together_are_kept() -> None:
    losses = {"a": 0.60, "b": 0.72, "c": 0.68, "d": 0.65, ALONE: 0.69, "a+d": 0.61}
    search, rows, trials = searched(losses, finalists=2)
    assert trials == ["a", "b", "c", "d", "a", "d", ALONE, "a+d"]  # the best alone is not trained again
    left = [sorted(key for key, weight in row.weights.items() if weight > 0) for row in rows]
    assert left == [["a", "d"], ["a", "d"], ["a"]]  # both gain over the end task alone; together they are worse than a
    assert search.kept == ("a",)
    assert rows[0].weights == {"a": 0.5, "b": 0.0, "c": 0.0, "d": 0.5}
    assert rows[1].health["dev_loss/d"] == pytest.approx(0.65)
    assert rows[2].health == {"dev_loss/a": pytest.approx(0.60), "dev_loss/a + d": pytest.approx(0.61)}


def test_objectives_that_are_better_together_are_kept_together() -> None:
    losses = {"a": 0.61, "b": 0.60, "c": 0.62, ALONE: 0.69, "b+a": 0.58, "b+a+c": 0.59}
    search, _, trials = searched(losses)
    assert trials[-2:] == ["b+a", "b+a+c"]
    assert search.kept == ("b", "a")


def test_of_sets_that_cannot_be_told_apart_the_largest_is_kept() -> None:
    """A standard error is 0.0022: of 100 differences that are 0.03, -0.01, -0.03 and 0.01 from their mean."""
    losses = {"a": 0.61, "c": 0.62, "b": 0.60, ALONE: 0.69, "b+a+c": 0.601, "b+a": 0.6005}
    search, _, _ = searched(losses)
    assert search.kept == ("b", "a", "c")
    search, _, _ = searched({**losses, "b+a+c": 0.603})
    assert search.kept == ("b", "a")


def test_only_objectives_that_gain_are_tried_together() -> None:
    search, rows, trials = searched({"a": 0.60, "b": 0.72, "c": 0.69, ALONE: 0.69})
    assert trials == ["a", "b", "c", ALONE]
    assert search.kept == ("a",)
    assert len(rows) == 1


def test_nothing_is_kept_that_does_not_gain() -> None:
    search, rows, _ = searched({"a": 0.69, "b": 0.72, ALONE: 0.69})
    assert search.kept == ()
    assert rows[-1].end_task_weight == 1.0
    assert search.result_config(RunConfig()).method.name == "finetune"


def test_a_search_continues_from_its_state() -> None:
    losses = {("a",): 0.60, ("b",): 0.72, ("c",): 0.62, (): 0.69, ("a", "c"): 0.59}
    config = HalvingConfig(finalists=2)
    whole = Search(["a", "b", "c"], config)
    while not whole.over:
        whole.judge(losses[whole.next] + np.array([0.0, 0.01, 0.02]), 0)
    cut = Search(["a", "b", "c"], config)
    while not cut.over:
        cut.judge(losses[cut.next] + np.array([0.0, 0.01, 0.02]), 0)
        state = json.loads(json.dumps(cut.state_dict()))
        cut = Search(["a", "b", "c"], config)
        cut.load_state_dict(state)
    assert cut.state_dict() == whole.state_dict()
    assert whole.kept == ("a", "c")


def trained(record: CellRecord, stage: str = "train") -> list[Any]:
    """What a stage logged, with steps and counts from its own beginning."""
    rows = [row for row in record.history if row.stage == stage]
    return [(row.dev, row.losses) for row in rows]


def test_what_is_found_is_trained_as_if_it_had_been_given(tiny: dict[str, Any], same: list[str]) -> None:
    """The run ends as static multitask with the kept objectives, or as fine-tuning, from the same first parameters."""
    kept = run_cell(tiny_config(tiny, *same, *SEARCH, "method.least_z=-1000"))
    keys = [key for key, share in kept.weights[2].weights.items() if share > 0]
    given = ", ".join(f'"{key}": 1.0' for key in keys)
    static = run_cell(tiny_config(tiny, *same, f"method={{name: static, weights: {{objectives: {{{given}}}}}}}"))
    assert 1 <= len(keys) <= 2
    assert trained(kept) == trained(static)
    assert kept.result.test == static.result.test
    nothing = run_cell(tiny_config(tiny, *same, *SEARCH, "method.least_z=1000"))
    finetuned = run_cell(tiny_config(tiny, *same, "method=finetune"))
    assert trained(nothing) == trained(finetuned)
    assert nothing.result.test == finetuned.result.test


def test_what_a_search_logs(tiny: dict[str, Any], same: list[str]) -> None:
    """3 candidates, 2 finalists: 3 trials of 1 step, 3 of 2 steps, one with both finalists, then 4 training steps."""
    config = tiny_config(tiny, *same, *SEARCH, "method.least_z=-1000")
    assert config.total_steps == 3 * 1 + 3 * 2 + 2 + 4
    record = run_cell(config)
    searching = [(row.step, row.dev) for row in record.history if row.stage == "search"]
    assert searching == [(step, None) for step in (1, 2, 3, 5, 7, 9, 11)]
    assert [row.step for row in record.history if row.stage == "train"] == [13, 15]
    assert record.result.steps == 15
    assert [row.step for row in record.weights][:3] == [3, 9, 11]
    assert {row.step for row in record.weights[3:]} <= {13, 15}
    assert sorted(record.weights[0].weights.values()) == [0.0, 0.5, 0.5]


@pytest.mark.parametrize("stop", [2, 3, 6, 9, 10, 11, 13])
def test_stop_and_resume(tiny: dict[str, Any], same: list[str], tmp_path: Path, stop: int) -> None:
    """In each rung, between them, between search and training, and in the training."""
    config = tiny_config(tiny, *same, *SEARCH, "method.least_z=-1000")
    plain = run_cell(config)
    cut = run_cell(config, checkpoints=tmp_path / "runs", control=RunControl(until=stop))
    assert (cut.result.status, cut.result.steps) == ("cut", stop)
    assert numbers(run_cell(config, checkpoints=tmp_path / "runs")) == numbers(plain)
