"""Schedule, optimiser, evaluation, plan, memory, prefetching."""

from __future__ import annotations

import gc
import itertools
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score
from torch.optim.lr_scheduler import LambdaLR

from aang_ray.config.sections import ScheduleConfig
from aang_ray.data.tasks import Labelled, Ragged
from aang_ray.errors import RunFailure
from aang_ray.train.device import MicroBatch, activation_bytes
from aang_ray.train.evaluate import Predictions, SplitReader, bootstrap_interval
from aang_ray.train.loop import LossLog, prefetched
from aang_ray.train.optim import make_optimizer, rate_factor, warmup_steps
from tests.train.running import stepper, tiny_config


def test_warm_up_and_decay() -> None:
    # 100 steps, 6 % warm-up: the rate rises over 6 steps, is full at the 7th and reaches 0 after the last.
    schedule = ScheduleConfig(steps=100)
    assert warmup_steps(schedule) == 6
    assert warmup_steps(ScheduleConfig(steps=50_000)) == 700
    layer = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    made = LambdaLR(optimizer, rate_factor(schedule))
    rates = []
    for _ in range(100):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        made.step()
    assert rates[0] == pytest.approx(1 / 7)
    assert rates[6] == 1.0
    assert rates[99] == pytest.approx(1 / 94)
    assert all(a < b for a, b in itertools.pairwise(rates[:7]))
    assert optimizer.param_groups[0]["lr"] == 0.0


def test_every_parameter_is_optimised_once_at_its_rate(tiny: dict[str, Any]) -> None:
    made = stepper(tiny_config(tiny))
    optimizer = make_optimizer(made.setup.encoder, made.setup.heads, made.setup.config.optim)
    seen = [id(p) for group in optimizer.param_groups for p in group["params"]]
    expected = [id(p) for m in (made.setup.encoder, made.setup.heads) for p in m.parameters()]
    assert sorted(seen) == sorted(expected)
    body = {id(p) for p in made.setup.encoder.parameters()}
    for group in optimizer.param_groups:
        assert {group["lr"]} == {1e-3 if id(p) in body else 1e-2 for p in group["params"]}
        assert {group["weight_decay"]} == {0.01 if id(p) in body else 0.1 for p in group["params"]}


def test_scores_are_over_the_stated_label_set() -> None:
    # Labels a, b, c, d; d never occurs. Predicted a a b c, true a b b c:
    # F1(a) = 2/3, F1(b) = 2/3, F1(c) = 1, F1(d) = 0: macro-F1 = 7/12. Accuracy 3/4.
    logits = torch.eye(4)[[0, 0, 1, 2]] * 5
    scores = Predictions(logits, np.array([0, 1, 1, 2])).scores(["a", "b", "c", "d"])
    assert scores.accuracy == 0.75
    assert scores.macro_f1 == pytest.approx(7 / 12)
    assert scores.per_class == {"a": 1, "b": 2, "c": 1, "d": 0}
    assert scores.loss == pytest.approx(float(torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1, 1, 2]))))


def test_predictions_come_back_in_the_splits_order(tiny: dict[str, Any]) -> None:
    made = stepper(tiny_config(tiny))
    setup = made.setup
    split = setup.task.test
    head = setup.head_of["end-task"]
    together = SplitReader(split, np.arange(len(split)), 0).predict(setup.encoder, head, setup.compute)
    assert (together.labels_E == split.labels).all()
    for index in (0, 7, 39):
        alone = Labelled(
            Ragged(np.asarray(split.tokens[index]), np.array([0, len(split.tokens[index])])), split.labels[[index]]
        )
        one = SplitReader(alone, np.array([0]), 0).predict(setup.encoder, head, setup.compute)
        torch.testing.assert_close(one.logits_EC[0], together.logits_EC[index], rtol=1e-4, atol=1e-5)
    assert setup.encoder.training


def test_a_configuration_is_filled_from_task_and_content(tiny: dict[str, Any]) -> None:
    config = tiny_config(tiny)
    assert config.data.metric == "accuracy"
    assert config.fingerprints.data
    assert config.fingerprints.encoder
    assert config.fingerprints.space
    assert not tiny_config(tiny, "method=finetune").fingerprints.space
    # 150 epochs over 80 train and 60 domain texts at 24 auxiliary examples a step: ceil(150 * 140 / 24) = 875.
    from_epochs = tiny_config(tiny, "schedule.steps=null")
    assert from_epochs.schedule.steps == 875
    assert tiny_config(tiny, "schedule.steps=null", "method=finetune").schedule.steps == 875


def test_losses_are_averaged_by_name_and_checked() -> None:
    log = LossLog(check_every=2)
    log.add(1, ("", "a", "b"), torch.tensor([9.0, 1.0, 2.0]))
    log.add(2, ("", "a", "c"), torch.tensor([9.0, 3.0, 5.0]))
    assert log.means() == {"a": 2.0, "b": 2.0, "c": 5.0}
    log.add(3, ("", "a"), torch.tensor([0.0, 4.0]))
    assert log.means() == {"a": 4.0}
    log.add(4, ("", "a"), torch.tensor([0.0, float("nan")]))
    with pytest.raises(RunFailure, match=r"step 4: the loss of a is nan, its last finite loss was 4"):
        log.read()


def test_micro_batches() -> None:
    auto = MicroBatch(None, 100)
    auto.fit(bytes_per_text=1e6, free=40_000_000)
    assert auto.texts == 20
    for _ in range(4):
        auto.halve()
    assert auto.texts == 1
    with pytest.raises(RunFailure, match="out of memory with 1 texts"):
        auto.halve()
    stated = MicroBatch(30, 100)
    stated.fit(1e12, 1)
    assert stated.texts == 30
    with pytest.raises(RunFailure, match=r"lower batch.micro"):
        stated.halve()


def test_activation_bytes_counts_what_backward_keeps() -> None:
    x = torch.randn(100, 10, requires_grad=True)
    # tanh keeps its output, 100 * 10 floats of 4 bytes; the sum keeps nothing more.
    assert activation_bytes(lambda: torch.tanh(x).sum()) == 4000


def test_activation_bytes_lets_go_of_what_it_counted() -> None:
    weights = [torch.randn(100, 10, requires_grad=True)]
    gone = weakref.ref(weights[0])
    activation_bytes(lambda: torch.tanh(weights[0]).sum())
    weights.clear()
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_prefetching_keeps_the_order_and_raises_in_place(depth: int) -> None:
    assert list(prefetched(lambda step: step * step, 2, 7, depth)) == [4, 9, 16, 25, 36]

    def fails(step: int) -> int:
        if step == 3:
            raise ValueError("no batch")
        return step

    made = prefetched(fails, 0, 10, depth)
    assert [next(made) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="no batch"):
        next(made)


def test_the_bootstrap_interval_is_that_of_a_binomial() -> None:
    # 80 of 100 right: the accuracy of a resample is Binomial(100, 0.8) / 100, whose 2.5 % and 97.5 % quantiles
    # are 0.72 and 0.87.
    logits = torch.eye(2)[[0] * 80 + [1] * 20]
    found = bootstrap_interval(Predictions(logits, np.zeros(100, dtype=np.int64)), "accuracy", 2)
    assert found == pytest.approx((0.72, 0.87), abs=0.015)
    assert bootstrap_interval(Predictions(logits[:1], np.zeros(1, dtype=np.int64)), "accuracy", 2) is None


def test_the_bootstrap_interval_of_macro_f1_is_that_of_scikit_learn() -> None:
    drawn = np.random.default_rng(7)
    labels, classes = drawn.integers(0, 4, 60), 5  # the fifth class does not occur
    logits = torch.nn.functional.one_hot(torch.from_numpy(np.where(drawn.random(60) < 0.6, labels, 0)), classes).float()
    chosen = np.random.default_rng(0).integers(0, 60, (1000, 60))
    found = bootstrap_interval(Predictions(logits, labels), "macro_f1", classes)
    of_each = [
        f1_score(labels[of], logits.argmax(1).numpy()[of], labels=range(classes), average="macro", zero_division=0)
        for of in chosen
    ]
    assert found == pytest.approx(tuple(np.percentile(of_each, [2.5, 97.5])), abs=1e-12)
