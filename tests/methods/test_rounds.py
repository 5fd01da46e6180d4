"""alphaVIL's mixing and DIW's weights on problems worked by hand. (docs/semantics.md, section 7)"""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from aang_ray.config.methods import AlphavilConfig, DiwConfig
from aang_ray.methods.rounds import SMALLEST_WEIGHT, Alphavil, Diw, RoundMethod
from tests.methods.problem import NAMES, Problem, sampled

CPU = torch.device("cpu")


def alphavil(**settings: Any) -> Alphavil:
    return Alphavil(NAMES["A"], CPU, AlphavilConfig(**settings))


def diw(**settings: Any) -> Diw:
    return Diw(NAMES["A"], CPU, DiwConfig(**settings))


def stored(method: RoundMethod) -> dict[str, Any]:
    """The state as it comes back from a file."""
    stream = io.BytesIO()
    torch.save(method.state_dict(), stream)
    stream.seek(0)
    state: dict[str, Any] = torch.load(stream, weights_only=True)
    return state


def test_two_steps_of_mixing_by_hand() -> None:
    """theta = 0, delta_1 = (1, 0), delta_2 = (0, 1), L = |theta - (2, 0)|^2 / 2: dL/dalpha = (alpha_1 - 2, alpha_2).

    lr 0.1, momentum 0.5. alpha = (1, 1): gradient and velocity (-1, 1), alpha = (1.1, 0.9). Gradient (-0.9, 0.9),
    velocity (-1.4, 1.4), alpha = (1.24, 0.76). So w = (1 + 0.24, 1 - 0.24).
    """
    target = torch.tensor([2.0, 0.0])
    method = alphavil(alpha_steps=2, alpha_lr=0.1)
    alpha_N = method.mix(torch.zeros(2), torch.eye(2), lambda point: point - target)
    assert alpha_N.tolist() == pytest.approx([1.24, 0.76])
    method.learn((3,), alpha_N.tolist())
    assert method.weights((3,)) == pytest.approx([1.24, 0.76])
    row = method.describe(sampled(3))
    assert row.end_task_weight == pytest.approx(0.62)
    assert list(row.weights.values()) == [1.0]
    assert row.health["alpha/end-task"] == pytest.approx(1.24)
    assert row.health["w/end-task"] == pytest.approx(1.24)


def test_the_gradient_of_alpha_is_that_of_finite_differences() -> None:
    """One plain step of rate 1 moves alpha by minus its gradient."""
    problem = Problem.random(1, seed=3)
    deltas_NP = 0.1 * torch.randn(4, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def loss(alpha_N: Tensor) -> Tensor:
        return problem.loss(0, problem.theta_P + alpha_N @ deltas_NP)

    def gradient(point_P: Tensor) -> Tensor:
        point_P = point_P.clone().requires_grad_()
        return torch.autograd.grad(problem.loss(0, point_P), point_P)[0]

    ones_N, h = torch.ones(4, dtype=torch.float64), 1e-5
    moved_N = alphavil(alpha_steps=1, alpha_lr=1.0).mix(problem.theta_P, deltas_NP, gradient)
    units_NN = h * torch.eye(4, dtype=torch.float64)
    differences = torch.stack([(loss(ones_N + unit) - loss(ones_N - unit)) / (2 * h) for unit in units_NN])
    torch.testing.assert_close(ones_N - moved_N, differences, rtol=1e-8, atol=1e-10)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**31), order=st.permutations(range(4)), scale=st.sampled_from([0.0, 1e-12, 1.0, 1e6]))
def test_laws_of_mixing(seed: int, order: list[int], scale: float) -> None:
    """Other orders give the same numbers in another order, equal updates equal ones; updates of 0 leave alpha at 1.

    The rate is divided by the square of large updates: along them the loss has so much more curvature.
    """
    generator = torch.Generator().manual_seed(seed)
    theta_P, target_P = torch.randn(2, 7, generator=generator, dtype=torch.float64)
    deltas_NP = 0.1 * torch.randn(4, 7, generator=generator, dtype=torch.float64)
    deltas_NP[3] = deltas_NP[0]

    def mix(deltas_NP: Tensor, lr: float) -> Tensor:
        method = alphavil(alpha_steps=5, alpha_lr=lr)
        return method.mix(theta_P, deltas_NP, lambda point_P: point_P - target_P)

    alpha_N = mix(scale * deltas_NP, 0.01 / max(scale, 1.0) ** 2)
    assert alpha_N.isfinite().all()
    assert alpha_N[0] == alpha_N[3]
    if scale == 0:
        assert torch.equal(alpha_N, torch.ones(4).double())
    again_N = mix(scale * deltas_NP[order], 0.01 / max(scale, 1.0) ** 2)
    torch.testing.assert_close(again_N, alpha_N[order], rtol=1e-9, atol=1e-9)


@given(order=st.permutations([0, 1, 2, 3]), together=st.floats(0, 1))
def test_laws_of_judging(order: list[int], together: float) -> None:
    """DIW's weights do not depend on the order of tasks, and tasks that do alike alone weigh alike."""
    alone = {0: 0.25, 1: 0.75, 2: 0.5, 3: 0.5}
    one, other = diw(), diw()
    one.judge((0, 1, 2, 3), (0.5, *(alone[k] for k in range(4))), together)
    other.judge(order, (0.5, *(alone[k] for k in order)), together)
    assert dict(zip(order, other.weights(order)[1:], strict=True)) == dict(enumerate(one.weights(range(4))[1:]))
    end_task, *_, third, fourth = one.weights(range(4))
    assert end_task == third == fourth


def test_weights_never_fall_below_the_clamp() -> None:
    method = alphavil()
    method.learn((0, 2), [0.5, -3.0, 1.2])
    assert method.weights((0, 2)) == pytest.approx([0.5, SMALLEST_WEIGHT, 1.2])
    method.learn((0, 2), [1.0, 1.5, 1.0])
    assert method.weights((0, 2)) == pytest.approx([0.5, 0.5 + SMALLEST_WEIGHT, 1.2])


def test_a_task_alone_and_all_together() -> None:
    method = diw()
    method.move((1, 2), [0.5, 0.0, -1.0])  # w = (1.5, 1, 1e-6)
    assert method.request(sampled()).coefficients_S.tolist() == [0.0, 1.0], "the end task alone"
    assert method.request(sampled(2)).coefficients_S.tolist() == [0.0, 0.0, 1.0], "an objective alone"
    method.together = True
    assert method.request(sampled(1, 2)).coefficients_S.tolist() == pytest.approx([0.0, 0.5, 1 / 3, 1e-6 / 3])
    method.together, method.loss_scale = False, 0.25
    assert method.request(sampled(2)).coefficients_S.tolist() == [0.0, 0.0, 0.25]


def test_diw_moves_weights_towards_what_does_better_alone() -> None:
    """w_i += 0.1 (s_i - s): alone 0.8 and 0.3, together 0.5 gives (1.03, 0.98), and the first round is over."""
    method = diw()
    assert method.judge((3,), (0.8, 0.3), 0.5)
    assert method.weights((3,)) == pytest.approx([1.03, 0.98])
    method.end_round(0.5)
    assert not method.judge((3,), (0.8, 0.3), 0.5), "no better than the last round's"
    assert not method.judge((3,), (0.8, 0.3), 0.4)
    assert method.weights((3,)) == pytest.approx([1.03 + 0.03 + 0.04, 0.98 - 0.02 - 0.01])
    assert method.judge((3,), (0.8, 0.3), 0.6), "better"
    method.end_round(0.6)
    assert [method.judge((3,), (0.0, 0.0), 0.6) for _ in range(10)] == [False] * 9 + [True], "ten tries"
    row = method.describe(sampled(3))
    assert row.health["tries"] == 10
    assert row.health["together"] == 0.6


@pytest.mark.parametrize("kind", [alphavil, diw])
def test_the_state_comes_back(kind: Any) -> None:
    method, again = kind(), kind()
    if isinstance(method, Alphavil):
        method.learn((0, 1), [1.25, 0.5, 0.0])
    else:
        method.judge((0, 1), (0.5, 0.25, 1.0), 0.75)
        method.end_round(0.75)
        method.judge((0, 1), (0.5, 0.25, 1.0), 0.5)
    again.load_state_dict(stored(method))
    assert again.describe(sampled(0, 1)) == method.describe(sampled(0, 1))
    assert stored(again) == stored(method)
    assert sum(method.describe(sampled(0, 1)).weights.values()) == pytest.approx(1.0)
