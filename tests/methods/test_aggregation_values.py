"""Each aggregation on two parameters, worked out by hand."""

from __future__ import annotations

from math import exp, sqrt
from typing import Any

import pytest
import torch

from tests.methods.driving import Driven, rows

CONFLICT = rows([1.0, 0.0], [-1.0, 1.0])
"""g_E = (1, 0) and g_1 = (-1, 1): <g_E, g_1> = -1. A vector (x, y) harms neither where x >= 0 and y >= x."""

VALUES: list[tuple[str, dict[str, Any], list[float]]] = [
    # g_E + (1/2) g_1 = (1/2, 1/2) and g_1 + g_E = (0, 1), added.
    ("pcgrad", {}, [0.5, 1.5]),
    # On (1 - t) g_E + t g_1 = (1 - 2t, t) the norm 5 t^2 - 4 t + 1 is least at t = 2/5.
    ("mgda", {}, [0.2, 0.4]),
    # Mean (0, 1/2), ball of radius c / 2 around it. min(x, y - x) is 1/4 at (1/4, 1/2), on the rim for c = 1/2, where
    # both products are equal; with c = 0 the mean itself.
    ("cagrad", {}, [0.25, 0.5]),
    ("cagrad", {"c": 0.0}, [0.0, 0.5]),
    # d = (1 - a) g_E + a g_1 = (1 - 2a, a) with equal projections on (1, 0) and (-1, 1) / sqrt 2:
    # sqrt 2 (1 - 2a) = 3a - 1, so a = (sqrt 2 + 1) / (3 + 2 sqrt 2) = sqrt 2 - 1.
    ("imtl_g", {}, [3 - 2 * sqrt(2), sqrt(2) - 1]),
    # Polar factor of J = [[1, 0], [-1, 1]]: (J + cof J) / sqrt 5 = [[2, 1], [-1, 2]] / sqrt 5; singular values
    # (sqrt 5 +- 1) / 2, so the mean of its rows, (1, 3) / (2 sqrt 5), times the smaller one, or, for `rmse`, times
    # the root of the mean of their squares, sqrt(3 / 2).
    ("aligned_mtl", {}, [(sqrt(5) - 1) / 4 / sqrt(5), 3 * (sqrt(5) - 1) / 4 / sqrt(5)]),
    ("aligned_mtl", {"scale_mode": "rmse"}, [sqrt(1.5) / 2 / sqrt(5), 3 * sqrt(1.5) / 2 / sqrt(5)]),
    # The projections are (1/2, 1/2) and (0, 1); their mean.
    ("upgrad", {}, [0.25, 0.75]),
    # The mean (0, 1/2) harms neither.
    ("dualproj", {}, [0.0, 0.5]),
    # <g_E, g_1> < 0: half of g_E is left.
    ("cosine_gating", {}, [0.5, 0.0]),
    ("cosine_gating", {"mode": "weigh"}, [0.5, 0.0]),
]


@pytest.mark.parametrize(("name", "settings", "expected"), VALUES)
def test_one_objective_in_conflict(name: str, settings: dict[str, Any], expected: list[float]) -> None:
    # TorchJD's projections add 1e-4 to the diagonal of the Gram matrix, its other solvers stop at about 1e-4.
    assert Driven(name, n=1, **settings).step(CONFLICT, [2]).tolist() == pytest.approx(expected, abs=3e-4)


def test_cagrad_with_radius_0_is_the_mean_wherever_it_is() -> None:
    # g_E = 0 is a stationary point of the end task: nothing helps both, but a ball of radius 0 leaves no choice.
    assert Driven("cagrad", n=1, c=0.0).step(rows([0.0, 0.0], [1.0, 1.0]), [2]).tolist() == [0.5, 0.5]


def test_weights_of_losses_on_the_same_conflict() -> None:
    # Coefficients 1/2 and 1/2: (1/2 - 1/2, 1/2). With g_2 = (0, 3): static 1/2, 1/4, 1/4; mt_tartan 1/3 each.
    for name in ("static", "mt_tartan", "uncertainty", "dwa", "gradnorm"):
        assert Driven(name, n=1).step(CONFLICT, [2]).tolist() == pytest.approx([0.0, 0.5])
    three = rows([1.0, 0.0], [-1.0, 1.0], [0.0, 3.0])
    assert Driven("static").step(three, [2, 3]).tolist() == pytest.approx([0.25, 1.0])
    assert Driven("mt_tartan").step(three, [2, 3]).tolist() == pytest.approx([0.0, 4 / 3], abs=1e-6)
    assert Driven("finetune").step(rows([1.0, 0.0]), []).tolist() == [1.0, 0.0]
    # Coefficients c and 1 - c: (2 c - 1, 1 - c), on the line x = 1 - 2 y between the two gradients.
    for x, y in (Driven("random", n=1, seed=seed).step(CONFLICT, [2]).tolist() for seed in range(5)):
        assert 0 < y < 1
        assert x == pytest.approx(1 - 2 * y)


def test_weights_of_losses_after_a_step() -> None:
    """The second update on the same conflict, losses 2 and 4 at the first."""
    at = torch.tensor([0.0, 2.0, 4.0])
    # s = 0.1 (L_i - 1) / 2 = (0.05, 0.15): coefficients exp(-s) / 2.
    a, b = exp(-0.05) / 2, exp(-0.15) / 2
    made = Driven("uncertainty", n=1, lr=0.1)
    made.step(CONFLICT, [2], at)
    assert made.step(CONFLICT, [2], at).tolist() == pytest.approx([a - b, b])
    # ||g|| = (1, sqrt 2), mean (1 + sqrt 2) / 2 = m; g_1 is the longer one: v = (1 + 0.1 / m, 1 - 0.1 sqrt 2 / m).
    m = (1 + sqrt(2)) / 2
    up, down = 1 + 0.1 / m, 1 - 0.1 * sqrt(2) / m
    made = Driven("gradnorm", n=1, lr=0.1)
    made.step(CONFLICT, [2], at)
    assert made.step(CONFLICT, [2], at).tolist() == pytest.approx([(up - down) / (up + down), down / (up + down)])
    # Losses (2, 4), then (1, 4), T = 2: r = (1/2, 1), softmax(1/4, 1/2).
    made = Driven("dwa", n=1, epoch_steps=1)
    made.step(CONFLICT, [2], at)
    made.step(CONFLICT, [2], torch.tensor([0.0, 1.0, 4.0]))
    c = exp(0.25) / (exp(0.25) + exp(0.5))
    assert made.step(CONFLICT, [2], at).tolist() == pytest.approx([2 * c - 1, 1 - c])


def test_preference_counts_the_objectives_together_as_much_as_the_end_task() -> None:
    # g_E = (2, 0), g_1 = (0, 4), g_2 = (0, 8): no conflict, projections are the gradients. Uniform: (2, 12) / 3;
    # static: (1/2) (2, 0) + (1/4) (0, 12).
    gradients = rows([2.0, 0.0], [0.0, 4.0], [0.0, 8.0])
    for name in ("upgrad", "dualproj"):
        assert Driven(name).step(gradients, [0, 1]).tolist() == pytest.approx([2 / 3, 4.0], rel=1e-3)
        assert Driven(name, preference="static").step(gradients, [0, 1]).tolist() == pytest.approx([1, 3], rel=1e-3)
    # Rank 2 with singular values 2 and sqrt 80; rows of the polar factor: (1, 0), (0, 4) / sqrt 80, (0, 8) / sqrt 80.
    for preference, expected in (("uniform", [2 / 3, 8 / sqrt(80)]), ("static", [1.0, 6 / sqrt(80)])):
        made = Driven("aligned_mtl", preference=preference)
        assert made.step(gradients, [0, 1]).tolist() == pytest.approx(expected)


def test_the_lengths_of_aligned_mtl() -> None:
    # Rows along the axes, of lengths 1, 2 and 6, which are the singular values: made one length, and averaged. The root
    # of the mean of their squares is sqrt(41 / 3).
    gradients = rows([1.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 6.0])
    for mode, length in (("min", 1.0), ("median", 2.0), ("rmse", sqrt(41 / 3))):
        made = Driven("aligned_mtl", scale_mode=mode)
        assert made.step(gradients, [0, 1]).tolist() == pytest.approx([length / 3] * 3, rel=1e-5)


def test_nash_mtl() -> None:
    # alpha_i (G alpha)_i = 1: with G = diag(1, 4), alpha = (1, 1/2) and the update is (1, 1), for gradients of any
    # scale. At most `max_norm` long.
    gradients = rows([1.0, 0.0], [0.0, 2.0])
    assert Driven("nash_mtl", n=1).step(gradients, [0]).tolist() == pytest.approx([sqrt(0.5), sqrt(0.5)], abs=1e-4)
    for scale in (1e-6, 1.0, 1e6):
        free = Driven("nash_mtl", n=1, max_norm=0.0).step(scale * gradients, [0])
        assert free.tolist() == pytest.approx([1.0, 1.0], abs=1e-3)


def test_graddrop() -> None:
    # g_E = (1, 2), g_1 = (3, -2): coordinate 0 is positive in both, 1 + 3; in coordinate 1 either sign has
    # probability 1/2. With all of g_E leaking, its 2 stays when the negative sign is drawn: 2 or 2 - 2.
    gradients = rows([1.0, 2.0], [3.0, -2.0])
    for leak, outcomes in ((0.0, {(4.0, 2.0), (4.0, -2.0)}), (1.0, {(4.0, 2.0), (4.0, 0.0)})):
        made = Driven("graddrop", n=1, end_task_leak=leak)
        drawn = [tuple(made.step(gradients, [0]).tolist()) for _ in range(100)]
        assert set(drawn) == outcomes
        # Within five standard deviations of 50.
        assert 25 < drawn.count((4.0, 2.0)) < 75


def test_cosine_gating_counts_what_agrees() -> None:
    # g_E = (1, 0); g_1 = (-1, 1) disagrees; g_2 = (1, 1) has cosine 1 / sqrt 2; g_3 = (0, 2) is neutral, cosine 0.
    # Coefficients of static multitask: 1/2 and 1/6. Gate: (1/2 + 1/6, 1/6 + 2/6); weigh: 1/2 + 1/(6 sqrt 2), ...
    gradients = rows([1.0, 0.0], [-1.0, 1.0], [1.0, 1.0], [0.0, 2.0])
    gate = Driven("cosine_gating", n=3)
    assert gate.step(gradients, [0, 1, 2]).tolist() == pytest.approx([2 / 3, 1 / 2])
    weigh = Driven("cosine_gating", n=3, mode="weigh")
    assert weigh.step(gradients, [0, 1, 2]).tolist() == pytest.approx([0.5 + 1 / 6 / sqrt(2), 1 / 6 / sqrt(2)])
    row = gate.method.describe(gate.sampled)
    assert row is not None
    assert row.end_task_weight == pytest.approx(0.6)
    assert list(row.weights.values()) == pytest.approx([0, 0.5, 0.5])


def test_an_objective_without_labels_is_left_out() -> None:
    # The shortest convex combination of g_E, g_1 and a gradient that is 0 would be 0.
    gradients = rows([1.0, 0.0], [0.0, 0.0], [-1.0, 1.0])
    made = Driven("mgda")
    assert made.step(gradients, [1, 2], labels=[0.0, 5.0]).tolist() == pytest.approx([0.2, 0.4], abs=1e-3)
    row = made.method.describe(made.sampled)
    assert row is not None
    assert list(row.weights.values()) == [0.0, 1.0]
    assert torch.equal(Driven("mgda").step(gradients, [1, 2]), torch.zeros(2).double())


def test_weights_of_a_row() -> None:
    # PCGrad on the conflict above: g_E + g_1 / 2 and g_1 + g_E are 2 g_E + (3/2) g_1.
    made = Driven("pcgrad", n=1)
    made.step(CONFLICT, [2])
    row = made.method.describe(made.sampled)
    assert row is not None
    assert row.step == 1
    assert row.end_task_weight == pytest.approx(2 / 3.5)
    assert list(row.weights.values()) == [1.0]
    assert list(row.health.values()) == pytest.approx([2.0, 1.5])
    assert next(iter(row.health)) == "weight/end_task"
