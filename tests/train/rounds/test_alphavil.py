"""alphaVIL's rounds on a text model, compared with a round computed by hand. (docs/semantics.md, section 7)"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from aang_ray.methods.rounds import Alphavil
from aang_ray.train.rounds import RoundStepper
from tests.train.rounds.running import PLAIN, config_of, rounds, take

ALPHAVIL = "alphavil, round_steps: 2, alpha_lr: 2.0, alpha_steps: 3"


def method_of(made: RoundStepper) -> Alphavil:
    assert isinstance(made.setup.method, Alphavil)
    return made.setup.method


def dev_loss(made: RoundStepper, parameters_Q: Tensor) -> float:
    """Mean dev loss at parameters that are written into the modules."""
    made.vector.write(parameters_Q)
    setup = made.setup
    setup.encoder.eval()
    setup.heads.eval()
    (piece,) = setup.domain.end_task_pieces("dev", np.arange(len(setup.task.dev)), 1000)
    with torch.no_grad():
        features_EH, labels_E = setup.domain.features(piece)
        loss = F.cross_entropy(setup.head_of["end-task"](features_EH), labels_E)
    setup.encoder.train()
    setup.heads.train()
    return float(loss)


def trained_alone(made: RoundStepper, start_Q: Tensor, task: int, weights: list[float]) -> Tensor:
    """delta of two AdamW steps on one task alone; the k-th step has the learning rate of step 3 k of 6."""
    made.vector.write(start_Q)
    setup, optim = made.setup, made.setup.config.optim
    groups = [
        {"params": list(setup.encoder.parameters()), "lr": optim.body_lr, "weight_decay": optim.body_weight_decay},
        {"params": list(setup.heads.parameters()), "lr": optim.head_lr, "weight_decay": optim.head_weight_decay},
    ]
    optimizer = torch.optim.AdamW(groups, betas=optim.betas, eps=optim.eps)
    for number in range(2):
        for group, rate in zip(optimizer.param_groups, (optim.body_lr, optim.head_lr), strict=True):
            group["lr"] = weights[task] * rate * (1 - 3 * number / 6)  # no warm-up, decay to 0 at step 6
        objectives = () if task == 0 else (made.objectives[task - 1],)
        batch = setup.domain.source.batch_of(number, task == 0, objectives)
        (piece,) = setup.domain.pieces(batch, 1000, False)
        optimizer.zero_grad()
        torch.autograd.backward(setup.domain.losses(piece, setup.head_of)[-1])
        for module in (setup.encoder, *setup.head_of.values()):
            torch.nn.utils.clip_grad_norm_(module.parameters(), optim.clip)
        optimizer.step()
    return made.vector.read() - start_Q


def test_a_round_is_what_it_is_by_hand(tiny: dict[str, Any]) -> None:
    """Deltas by plain optimisers, alpha's gradient by finite differences of the dev loss, momentum by hand."""
    config = config_of(tiny, ALPHAVIL, *PLAIN, "schedule.steps=6", "schedule.warmup_fraction=0")
    made, hand = rounds(config), rounds(config)
    start_Q = hand.vector.read()
    take(made, 6)
    deltas = [trained_alone(hand, start_Q, task, [1.0, 1.0, 1.0]) for task in range(3)]
    alpha_N, velocity_N, h = np.ones(3), np.zeros(3), 1e-5

    def loss(values_N: np.ndarray) -> float:
        moved = sum((float(a) * delta for a, delta in zip(values_N, deltas, strict=True)), start_Q)
        return dev_loss(hand, moved)

    for _ in range(3):
        gradient_N = np.array([(loss(alpha_N + h * u) - loss(alpha_N - h * u)) / (2 * h) for u in np.eye(3)])
        velocity_N = 0.5 * velocity_N + gradient_N
        alpha_N = alpha_N - 2.0 * velocity_N
    found = method_of(made).state_dict()["alpha"]
    assert np.abs(alpha_N - 1).max() > 0.01, "the example moves alpha"
    np.testing.assert_allclose(found, alpha_N, rtol=1e-6)
    expected_Q = sum((float(a) * delta for a, delta in zip(alpha_N, deltas, strict=True)), start_Q)
    torch.testing.assert_close(made.vector.read() - start_Q, expected_Q - start_Q, rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose(method_of(made).weights(made.objectives), np.maximum(alpha_N, 1e-6))


def test_the_order_of_the_tasks_changes_nothing(tiny: dict[str, Any]) -> None:
    """Two rounds, so that the weights that the first one found are used."""
    forward, backward = (rounds(config_of(tiny, ALPHAVIL, *PLAIN, "schedule.steps=12")) for _ in range(2))
    backward.objectives = backward.objectives[::-1]
    for made in (forward, backward):
        take(made, 12)
    torch.testing.assert_close(backward.vector.read(), forward.vector.read(), rtol=1e-9, atol=1e-12)
    order = forward.objectives
    assert method_of(backward).weights(order) == pytest.approx(method_of(forward).weights(order), rel=1e-9)
    assert len(set(method_of(forward).weights(order))) == 3


def test_weights_scale_rates_under_adamw_and_losses_where_published(tiny: dict[str, Any]) -> None:
    """The second task begins at step 2; its rate is that of the round's first step."""
    for weight in ("sound", "published"):
        made = rounds(config_of(tiny, f"{ALPHAVIL}, task_weight: {weight}", "schedule.warmup_fraction=0"))
        method = method_of(made)
        method.move(made.objectives, [0.0, -0.75, 0.0])
        for step in range(3):
            prepared = made.prepare(step)
            made.step(prepared)
        assert prepared.own is not None
        rates = [group["initial_lr"] for group in made.optimizer.param_groups]
        coefficients_S = method.request(prepared.own.sampled).coefficients_S
        assert rates == pytest.approx([2.5e-4, 2.5e-3] if weight == "sound" else [1e-3, 1e-2])
        assert coefficients_S.tolist() == [0.0, 0.0, 1.0 if weight == "sound" else 0.25]


def test_under_sgd_the_weight_is_one_on_the_loss(tiny: dict[str, Any]) -> None:
    """Rate times w, decay divided by w: theta - w lr (g + decay / w theta) = theta - lr (w g + decay theta)."""
    made = rounds(config_of(tiny, ALPHAVIL, "optim.algorithm=sgd", "optim.momentum=0.5"))
    method_of(made).move(made.objectives, [3.0, 0.0, 0.0])
    take(made, 1)
    assert isinstance(made.optimizer, torch.optim.SGD)
    body, heads = made.optimizer.param_groups
    assert (body["initial_lr"], body["weight_decay"], body["momentum"]) == pytest.approx((4e-3, 0.0025, 0.5))
    assert (heads["initial_lr"], heads["weight_decay"]) == pytest.approx((4e-2, 0.025))


def test_at_alpha_one_the_updates_add_up(tiny: dict[str, Any]) -> None:
    made = rounds(config_of(tiny, "alphavil, round_steps: 2, alpha_lr: 1.0e-30", *PLAIN, "schedule.steps=6"))
    start_Q = made.vector.read()
    for step in range(6):
        made.step(made.prepare(step))
        if step in (1, 3):
            assert torch.equal(made.vector.read(), start_Q), "every task begins with the same parameters"
    deltas_NQ = method_of(made).deltas_NQ
    assert deltas_NQ is not None
    torch.testing.assert_close(made.vector.read(), start_Q + deltas_NQ.sum(dim=0))
    assert (deltas_NQ.abs().sum(dim=1) > 0).all()
