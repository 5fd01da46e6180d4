"""Zero gradients, vanishing weights and empty segments give finite numbers."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from aang_ray.gradients import LoopEngine, SegmentEngine
from aang_ray.gradients.engine import Request
from aang_ray.gradients.statistics import cosine
from tests.gradients.examples import Examples, example_losses, examples, heads_of
from tests.gradients.steps import run, scores_of

BOUNDS = (0, 3, 5, 5, 9)


def network() -> tuple[nn.Module, nn.ModuleDict, Examples]:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh())
    return body, heads_of(6, torch.float32), examples(torch.randn(9, 4), BOUNDS)


def _backward_of_body(body: nn.Module, heads: nn.ModuleDict, piece: Examples, request: Request) -> list[nn.Parameter]:
    torch.autograd.backward(example_losses(body, heads["head"])(piece) @ request.coefficients_S)
    return list(body.parameters())


def test_a_weight_that_underflows_keeps_its_norm() -> None:
    body, heads, piece = network()
    losses, engine = example_losses(body, heads["head"]), SegmentEngine(body, heads, False)
    usual = Request(torch.tensor([0.0, 0.5, 0.2, 0.3]), scores=True, joint_from=0)
    vanishing = Request(torch.tensor([0.0, 0.5, 1e-44, 0.0]), scores=True)
    expected, _ = run(engine, body, heads, [piece], losses, usual)
    assert expected.joint_norm2 is not None
    plain = [p.grad for p in _backward_of_body(body, heads, piece, usual)]
    torch.testing.assert_close(
        expected.joint_norm2, torch.stack([g.square().sum() for g in plain if g is not None]).sum()
    )
    body.zero_grad(set_to_none=True)
    heads.zero_grad(set_to_none=True)
    result, updates = run(engine, body, heads, [piece], losses, vanishing)
    dots_S, norms2_S = scores_of(result)
    assert torch.equal(dots_S, scores_of(expected)[0])
    assert torch.equal(norms2_S, scores_of(expected)[1])
    assert norms2_S[3] > 0
    assert all(bool(update.isfinite().all()) for update in updates.values())


def test_losses_of_zero_gradient() -> None:
    body, heads, piece = network()
    plain = example_losses(body, heads["head"])

    def flat(piece: Examples) -> Tensor:
        return plain(piece) * torch.tensor([0.0, 1.0, 1.0, 0.0])

    request = Request(torch.tensor([0.0, 0.5, 0.2, 0.3]), scores=True)
    result, _ = run(SegmentEngine(body, heads, False), body, heads, [piece], flat, request)
    dots_S, norms2_S = scores_of(result)
    assert torch.equal(cosine(dots_S, norms2_S), torch.zeros(4))
    assert norms2_S[1] > 0


def test_losses_without_a_graph() -> None:
    body, heads, piece = network()
    request = Request(torch.zeros(4), scores=True, joint_from=2)
    for engine in (SegmentEngine(body, heads, False), LoopEngine(body, heads, False)):
        pieces = [examples(piece.inputs[:3], (0, 3, 3, 3, 3))]
        result, updates = run(engine, body, heads, pieces, lambda _: torch.zeros(4), request)
        assert torch.equal(scores_of(result)[1], torch.zeros(4))
        assert all(not update.any() for update in updates.values())
        assert result.joint_norm2 is not None
        assert float(result.joint_norm2) == 0


def test_nothing_but_the_update_where_nothing_is_asked() -> None:
    body, heads, piece = network()
    losses = example_losses(body, heads["head"])
    coefficients = torch.tensor([0.0, 0.5, 0.2, 0.3])
    expected, scored = run(
        SegmentEngine(body, heads, False), body, heads, [piece], losses, Request(coefficients, scores=True)
    )
    for engine in (SegmentEngine(body, heads, False), LoopEngine(body, heads, False)):
        result, updates = run(engine, body, heads, [piece], losses, Request(coefficients))
        assert result.dots_S is result.norms2_S is result.gram_SS is result.separate_SP is None
        torch.testing.assert_close(result.losses_S, expected.losses_S)
        for name, update in updates.items():
            torch.testing.assert_close(update, scored[name], rtol=1e-5, atol=1e-7)


def test_gradients_are_added_to_what_is_there() -> None:
    body, heads, piece = network()
    losses, engine = example_losses(body, heads["head"]), SegmentEngine(body, heads, False)
    request = Request(torch.tensor([0.0, 0.5, 0.2, 0.3]), scores=True)
    engine([piece], losses, request)
    once = [p.grad.clone() for p in body.parameters() if p.grad is not None]
    engine([piece], losses, request)
    for parameter, gradient in zip(body.parameters(), once, strict=True):
        torch.testing.assert_close(parameter.grad, 2 * gradient)


@given(st.lists(st.lists(st.floats(-(2.0**50), 2.0**50, width=32), min_size=3, max_size=3), min_size=1, max_size=5))
def test_cosine_is_finite_and_at_most_one(rows: list[list[float]]) -> None:
    g_SP = torch.tensor(rows)
    scores = cosine(g_SP @ g_SP[0], g_SP.square().sum(1))
    assert bool(scores.isfinite().all())
    assert bool((scores.abs() <= 1).all())


def test_cosine_by_hand() -> None:
    # v = (3, 4), g = (4, 3): 24 / 25; g = 0: 0; g = -v: -1.
    g_SP = torch.tensor([[3.0, 4.0], [4.0, 3.0], [0.0, 0.0], [-3.0, -4.0]])
    expected = torch.tensor([1.0, 0.96, 0.0, -1.0])
    torch.testing.assert_close(cosine(g_SP @ g_SP[0], g_SP.square().sum(1)), expected)
