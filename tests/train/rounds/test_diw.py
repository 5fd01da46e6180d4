"""DIW's rounds on a text model, with scripted dev scores. (docs/semantics.md, section 7)"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score

from aang_ray.methods.rounds import Diw
from aang_ray.train.rounds import RoundStepper
from tests.train.rounds.running import PLAIN, config_of, rounds, take

DIW = "diw, round_steps: 2, tries: 3"


def scripted(
    tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch, scores: Iterable[float], *settings: str
) -> RoundStepper:
    """Return the given dev scores, in the order of the calls."""
    script = iter(scores)
    monkeypatch.setattr(RoundStepper, "_score", lambda _: next(script))
    return rounds(config_of(tiny, DIW, *PLAIN, *settings))


def method_of(made: RoundStepper) -> Diw:
    assert isinstance(made.setup.method, Diw)
    return made.setup.method


def test_rounds_are_tried_again_until_dev_improves(tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tasks of two steps alone beside the end task's two, then tries of two steps.

    Round 1: alone 0.5, 0.7, 0.4, together 0.6: over, w = 1 + 0.1 (-0.1, 0.1, -0.2) = (0.99, 1.01, 0.98).
    Round 2: alone 0.6, 0.6, 0.6, together 0.5, so w = (1.00, 1.02, 0.99), and again 0.7: over, better than 0.6,
    w = (0.99, 1.01, 0.98).
    """
    made = scripted(tiny, monkeypatch, [0.5, 0.7, 0.4, 0.6, 0.6, 0.6, 0.6, 0.5, 0.7], "schedule.steps=18")
    start_Q = made.vector.read()
    take(made, 6)
    assert torch.equal(made.vector.read(), start_Q), "the tries begin where the tasks began"
    assert not made.evaluates_after(6)
    take(made, 8, first=6)
    assert made.evaluates_after(8)
    assert not made.ends_after(8)
    assert method_of(made).weights(made.objectives) == pytest.approx([0.99, 1.01, 0.98])
    start_Q = made.vector.read()
    take(made, 16, first=8)
    assert torch.equal(made.vector.read(), start_Q), "the first try was taken back"
    assert not made.evaluates_after(16)
    assert method_of(made).weights(made.objectives) == pytest.approx([1.0, 1.02, 0.99])
    take(made, 18, first=16)
    assert made.evaluates_after(18)
    assert made.ends_after(18)
    assert method_of(made).weights(made.objectives) == pytest.approx([0.99, 1.01, 0.98])
    assert not torch.equal(made.vector.read(), start_Q)


def test_after_so_many_tries_the_last_one_stands(tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    made = scripted(tiny, monkeypatch, [0.5, 0.5, 0.5, 0.9, *[0.5] * 6], "schedule.steps=40")
    take(made, 8)
    for step in range(8, 20):
        made.step(made.prepare(step))
        assert made.evaluates_after(step + 1) == (step + 1 == 20)
    assert method_of(made).last_score == 0.5


def test_no_try_is_begun_that_the_run_has_no_steps_for(tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    made = scripted(tiny, monkeypatch, [0.5, 0.5, 0.5, 0.9, 0.5, 0.5, 0.5, 0.5], "schedule.steps=17")
    take(made, 16)
    assert made.evaluates_after(16)
    assert made.ends_after(16)


def test_tries_see_the_same_batches_and_rounds_others(tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    made = scripted(tiny, monkeypatch, [0.5, 0.5, 0.5, 0.9, *[0.5] * 6], "schedule.steps=40")
    ids: dict[int, bytes] = {}
    for step in range(20):
        prepared = made.prepare(step)
        ids[step] = b"".join(segment.ids_T.tobytes() for segment in prepared.batch.segments)
        assert prepared.batch.segments[1].examples == (16 if step in (0, 1, 8, 9) or step % 8 >= 6 or step >= 14 else 0)
        made.step(prepared)
    assert ids[14] == ids[16] == ids[18]
    assert ids[15] == ids[17] == ids[19]
    assert len({ids[step] for step in (6, 7, 14, 15)}) == 4


@pytest.mark.parametrize("metric", ["accuracy", "macro_f1"])
def test_scores_are_those_of_the_end_task_on_dev(tiny: dict[str, Any], metric: str) -> None:
    """Compare with scikit-learn, from the logits of each dev text alone, with dropout off."""
    made = rounds(config_of(tiny, DIW, f"data.metric={metric}"))
    take(made, 1)
    setup = made.setup
    setup.encoder.eval()
    setup.heads.eval()
    predicted, labels = [], []
    for i in range(len(setup.task.dev)):
        (piece,) = setup.domain.end_task_pieces("dev", np.array([i]), 1)
        with torch.no_grad():
            features_EH, labels_E = setup.domain.features(piece)
            predicted.append(int(setup.head_of["end-task"](features_EH).argmax()))
        labels.append(int(labels_E))
    setup.encoder.train()
    setup.heads.train()
    expected = (
        accuracy_score(labels, predicted) if metric == "accuracy" else f1_score(labels, predicted, average="macro")
    )
    assert made._score() == pytest.approx(expected)
    assert 0 < expected < 1


def test_a_round_by_hand(tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A try of one step of SGD without decay on 1/3 (L_E + L_1 + L_2): theta - lr times the mean gradient."""
    rates = ("optim.algorithm=sgd", "optim.momentum=0", "optim.body_weight_decay=0", "optim.head_weight_decay=0")
    settings = (*PLAIN, *rates, "optim.clip=1.0e6", "schedule.steps=4", "schedule.warmup_fraction=0")
    script = iter([0.5, 0.5, 0.5, 0.5])
    monkeypatch.setattr(RoundStepper, "_score", lambda _: next(script))
    made = rounds(config_of(tiny, "diw, round_steps: 1, tries: 1", *settings))
    start_Q, optim = made.vector.read(), made.setup.config.optim
    take(made, 3)
    (piece,) = made.setup.domain.pieces(made.batch(0), 1000, False)
    losses_S = made.setup.domain.losses(piece, made.setup.head_of)
    gradients = torch.autograd.grad(losses_S[1:].mean(), made.vector.parameters, allow_unused=True)
    body = len(list(made.setup.encoder.parameters()))
    steps = [
        torch.zeros_like(p) if g is None else (optim.body_lr if i < body else optim.head_lr) * g
        for i, (p, g) in enumerate(zip(made.vector.parameters, gradients, strict=True))
    ]
    take(made, 4, first=3)
    moved_Q = made.vector.read() - start_Q
    torch.testing.assert_close(moved_Q, -torch.cat([step.flatten() for step in steps]), rtol=1e-6, atol=1e-12)
    assert float(moved_Q.norm()) > 0


def test_the_order_of_the_tasks_changes_nothing(tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The score depends only on what was trained: the end task, the first objective, the second, all."""
    found = []
    for turned in (False, True):
        script = iter([0.5, 0.3, 0.7, 0.6, *[0.5] * 4] if turned else [0.5, 0.7, 0.3, 0.6, *[0.5] * 4])
        monkeypatch.setattr(RoundStepper, "_score", lambda _, script=script: next(script))
        made = rounds(config_of(tiny, DIW, *PLAIN, "schedule.steps=8"))
        order = made.objectives
        made.objectives = order[::-1] if turned else order
        take(made, 8)
        found.append((made.vector.read(), method_of(made).weights(order)))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-9, atol=1e-12)
    assert found[1][1] == pytest.approx(found[0][1])


def test_one_worker_trains_a_try_as_static_multitask_does(
    tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At w = 1 the loss is the mean of the tasks'."""
    made = scripted(tiny, monkeypatch, [0.5] * 4, "schedule.steps=8")
    take(made, 6)
    prepared = made.prepare(6)
    assert method_of(made).request(prepared.sampled).coefficients_S.tolist() == pytest.approx([0.0, *[1 / 3] * 3])
    assert [segment.examples for segment in prepared.batch.segments] == [0, 16, 12, 12]
    losses_S = made.step(prepared).losses_S
    assert (losses_S[1:] > 0).all()
