"""Weights of losses: scalarizations, GradNorm, MT-TARTAN. Exact values, worked out by hand."""

from __future__ import annotations

from math import exp

import pytest
import torch

from aang_ray.methods.gradnorm import relative_gradient
from tests.methods.driving import Driven, rows
from tests.methods.problem import Problem

GRADIENTS = rows([3.0, 0.0], [0.0, 1.0])
"""||g_E|| = 3, ||g_1|| = 1."""


def losses(*values: float) -> torch.Tensor:
    """Of the end task and the objectives, after the dev loss."""
    return torch.tensor([0.0, *values])


def test_mt_tartan_weighs_all_alike() -> None:
    made = Driven("mt_tartan", n=3)
    assert made.coefficients(0, 1, 2).tolist() == pytest.approx([0.25] * 4)
    row = made.method.describe(made.sampled_at((0, 1, 2)))
    assert row is not None
    assert row.end_task_weight == pytest.approx(0.25)
    assert list(row.weights.values()) == pytest.approx([1 / 3] * 3)


def test_random_weights_are_a_draw_for_each_step_and_seed() -> None:
    made, again, other = Driven("random", seed=1), Driven("random", seed=1), Driven("random", seed=2)
    draws = []
    for _ in range(400):
        draws.append(made.coefficients(0, 1))
        made.steps += 1
    drawn = torch.stack(draws)
    assert (drawn > 0).all()
    torch.testing.assert_close(drawn.sum(1), torch.ones(400))
    # Softmax of three normal numbers: mean 1/3, standard deviation below 1/4, so 1/80 of a mean of 400.
    assert drawn.mean(0).tolist() == pytest.approx([1 / 3] * 3, abs=5 / 80)
    assert torch.equal(again.coefficients(0, 1), draws[0])
    assert not torch.equal(other.coefficients(0, 1), draws[0])
    assert not torch.equal(draws[0], draws[1])


def test_random_numbers_go_on_as_if_nothing_was_drawn() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    Driven("random").coefficients(0, 1)
    assert torch.equal(torch.rand(4), expected)


def test_uncertainty() -> None:
    # L = sum exp(-s_i) L_i / 2 + s_i / 2: at s = 0 the weights are 1/2, dL/ds_i = (1 - L_i) / 2. With losses 2 and 4
    # and rate 0.1: s = (0.05, 0.15).
    made = Driven("uncertainty", n=1, lr=0.1)
    assert made.coefficients(2).tolist() == [0.5, 0.5]
    made.step(GRADIENTS, [2], losses(2.0, 4.0))
    assert made.coefficients(2).tolist() == pytest.approx([exp(-0.05) / 2, exp(-0.15) / 2])
    assert made.coefficients(0).tolist() == pytest.approx([exp(-0.05) / 2, 0.5]), "not sampled, not moved"
    made.step(GRADIENTS, [0], losses(1.0, 0.0), labels=[0.0])
    assert made.coefficients(0)[1] == 0.5, "no labels, not moved"


def test_uncertainty_settles_where_a_weight_is_the_inverse_of_its_loss() -> None:
    made = Driven("uncertainty", n=1, lr=0.5)
    for _ in range(200):
        made.step(GRADIENTS, [0], losses(2.0, 0.25))
    assert made.coefficients(0).tolist() == pytest.approx([1 / 4, 2.0], rel=1e-3)


def test_dwa() -> None:
    # Epochs of one step. Mean losses (4, 1), then (2, 1): r = (1/2, 1), T = 2: softmax(1/4, 1/2).
    made = Driven("dwa", n=1, epoch_steps=1)
    for values in ((4.0, 1.0), (2.0, 1.0)):
        assert made.coefficients(1).tolist() == [0.5, 0.5]
        made.step(GRADIENTS, [1], losses(*values))
    total = exp(0.25) + exp(0.5)
    assert made.coefficients(1).tolist() == pytest.approx([exp(0.25) / total, exp(0.5) / total])
    # An objective that was never sampled has r = 1, too.
    assert made.coefficients(3).tolist() == made.coefficients(1).tolist()


def test_dwa_averages_over_an_epoch_what_was_sampled_and_had_labels() -> None:
    # Epochs of two steps. Objective 0: (1 + 3) / 2 = 2, then 1 (its second step there has no labels): r = 1/2.
    # Objective 1: sampled in the second epoch alone: r = 1. End task: 2, then 3: r = 3/2. T = 1.
    made = Driven("dwa", n=1, epoch_steps=2, temperature=1.0)
    made.step(GRADIENTS, [0], losses(1.0, 1.0))
    made.step(GRADIENTS, [0], losses(3.0, 3.0))
    made.step(rows([1.0], [1.0], [1.0]), [0, 1], losses(2.0, 1.0, 8.0))
    made.step(GRADIENTS, [0], losses(4.0, 0.0), labels=[0.0])
    scores = [exp(1.5), exp(0.5), exp(1.0)]
    assert made.coefficients(0, 1).tolist() == pytest.approx([score / sum(scores) for score in scores])


def test_gradnorm() -> None:
    # v = (1, 1), G = (3, 1), mean 2. At the first step L = L(0), so r = 1 and both targets are 2:
    # v_E <- 1 - 0.1 * 3 / 2 = 0.85, v_1 <- 1 + 0.1 * 1 / 2 = 1.05, scaled to a sum of 2: w = (17/19, 21/19).
    made = Driven("gradnorm", n=1, lr=0.1)
    made.step(GRADIENTS, [2], losses(8.0, 8.0))
    assert made.coefficients(2).tolist() == pytest.approx([17 / 38, 21 / 38])
    assert made.coefficients(0)[1].item() == pytest.approx(1 / (1 + 17 / 19)), "not sampled, not moved"
    # Now G = (51/19, 21/19), mean 36/19. Losses 4 and 8: L / L(0) = (1/2, 1), r = (2/3, 4/3); with alpha = 3/2 the
    # targets are 36/19 (0.5443, 1.5396) = (1.03, 2.92): the end task's is exceeded, the objective's not. Steps
    # 0.1 * 3 * 19/36 = 19/120 down and 19/360 up, so the sum is 2 - 38/360 = 341/180.
    made.step(GRADIENTS, [2], losses(4.0, 8.0))
    expected = [(17 / 19 - 19 / 120) * 180 / 341, (21 / 19 + 19 / 360) * 180 / 341]
    assert made.coefficients(2).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("count", [2, 7, 25])
def test_a_step_of_gradnorm_is_about_its_rate_for_any_number_of_losses(count: int) -> None:
    """Gradients of about the same length, half of them a little longer: weights of mean 1 move by the rate."""
    longer_m = torch.arange(count) % 2 == 0
    norms_m = torch.where(longer_m, 5.01, 5.0)
    ones_m = torch.ones(count)
    moves_m = relative_gradient(ones_m, norms_m, ones_m, ones_m, ones_m.bool(), 1.5)
    torch.testing.assert_close(moves_m, torch.where(longer_m, 1.0, -1.0), rtol=3e-3, atol=0.0)


def test_gradnorm_with_alpha_0_settles_where_weighted_norms_are_equal() -> None:
    # ||g|| = (3, 1): c = (1/4, 3/4) gives 3/4 each.
    made = Driven("gradnorm", n=1, alpha=0.0, lr=1e-3)
    for _ in range(1500):
        made.step(GRADIENTS, [2], losses(1.0, 5.0))
    assert made.coefficients(2).tolist() == pytest.approx([0.25, 0.75], abs=5e-3)


@pytest.mark.parametrize("seed", range(3))
def test_gradnorm_follows_the_gradient_of_its_loss(seed: int) -> None:
    """d/dv_i of sum |G_i - t_i| at fixed targets, against finite differences of norms of v_i L_i's gradients."""
    problem = Problem.random(5, seed)
    gradients_SP = problem.gradients_SP()
    made = Driven("gradnorm", n=3, lr=1e-2, alpha=0.5)
    relative_m = torch.ones(4, dtype=torch.float64)
    start = losses(2.0, 3.0, 1.0, 4.0)
    made.step(gradients_SP, [0, 1, 3], start)
    scaled = [float(v * g.norm()) for v, g in zip(relative_m, gradients_SP[1:], strict=True)]
    mean, h, moved = sum(scaled) / 4, 1e-6, []
    for i, gradient_P in enumerate(gradients_SP[1:]):
        either = [abs(float(((relative_m[i] + s * h) * gradient_P).norm()) - mean) for s in (1, -1)]
        moved.append(1.0 - 1e-2 * (either[0] - either[1]) / (2 * h) / mean)
    expected = torch.tensor(moved) / sum(moved)
    torch.testing.assert_close(made.coefficients(0, 1, 3), expected.float(), rtol=1e-6, atol=1e-7)
    before = made.coefficients(0, 1, 3)
    gradients_SP[3] = 0.0
    made.step(gradients_SP, [0, 1, 3], losses(1.0, 1.0, 0.0, 1.0), labels=[5.0, 0.0, 5.0])
    assert made.coefficients(0, 1, 3)[2].item() == pytest.approx(before[2].item(), rel=1e-6), "no labels, not moved"
