"""Products with the Jacobian, its leading subspace, and parts of a gradient in it (docs/semantics.md, section 6)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torchjd.aggregation import PCGrad

from aang_ray.gradients.statistics import ExampleJacobian, called_at, reweighted, span
from aang_ray.model.encoder import Encoder
from tests.gradients.steps import TextPiece, make_heads, relative, text_piece
from tests.model.families import FAMILIES, small_encoder

PIECES = (text_piece([(6, 4, 5), (9,)]), text_piece([(3, 7)]))


def class_losses(encoder: Encoder, heads: nn.ModuleDict) -> Callable[[TextPiece], Tensor]:
    """Cross-entropy of each text, [E]."""

    def losses(piece: TextPiece) -> Tensor:
        logits_EC = heads["pooled"](encoder.pool(encoder(piece.inputs), piece.inputs))
        return F.cross_entropy(logits_EC, piece.inputs.lengths_E % logits_EC.shape[1], reduction="none")

    return losses


def dense(body: nn.Module, losses: Callable[[TextPiece], Tensor]) -> Tensor:
    """J, [M, P]."""
    parameters = list(body.parameters())
    rows = []
    for piece in PIECES:
        for loss in losses(piece):
            found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
            parts = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]
            rows.append(torch.cat([part.flatten() for part in parts]))
    return torch.stack(rows)


@pytest.mark.parametrize("family", FAMILIES)
def test_products_with_the_jacobian_of_every_family(family: str) -> None:
    encoder = small_encoder(family, dtype=torch.float64, pooling="mean").eval()
    losses = class_losses(encoder, make_heads(encoder, torch.float64))
    jacobian = ExampleJacobian(encoder, PIECES, losses, examples=6)
    J_MP = dense(encoder, losses)
    generator = torch.Generator().manual_seed(0)
    omega_KM = torch.randn(3, len(J_MP), generator=generator, dtype=torch.float64)
    directions_PK = torch.randn(jacobian.size, 2, generator=generator, dtype=torch.float64)
    assert relative(jacobian.left(omega_KM), omega_KM @ J_MP) < 1e-7
    assert relative(jacobian.right(directions_PK), J_MP @ directions_PK) < 1e-7
    assert relative(jacobian.mean_gradient(), J_MP.mean(dim=0)) < 1e-7
    assert all(p.grad is None for p in encoder.parameters()), "nothing is left behind"


def test_a_call_at_other_parameters_leaves_the_modules_as_they_were() -> None:
    layer = nn.Linear(2, 1, bias=False)
    before = layer.weight
    scale = torch.tensor(3.0, requires_grad=True)
    result = called_at({"weight": scale * torch.ones(1, 2)}, layer, lambda x: layer(x).sum(), torch.ones(1, 2))
    result.backward()
    assert (result.item(), float(scale.grad or 0)) == (6.0, 2.0)
    assert layer.weight is before


SUM, NONE, FLIP = (1.0, 1.0, 1.0), (0.0, 0.0, 0.0), (1.0, 1.0, -1.0)


def of_matrix(J_MP: Tensor) -> ExampleJacobian:
    """The Jacobian of l_M = J theta."""
    body = nn.Module()
    body.theta = nn.Parameter(torch.zeros(J_MP.shape[1], dtype=J_MP.dtype))
    return ExampleJacobian(body, (J_MP,), lambda rows_MP: rows_MP @ body.theta, len(J_MP))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_of_a_small_encoder_it_is_the_row_space_in_singular_directions() -> None:
    """With as many directions as examples, the subspace is the whole row space, for any sketch."""
    encoder = small_encoder("bert", dtype=torch.float64, pooling="mean").eval()
    losses = class_losses(encoder, make_heads(encoder, torch.float64))
    J_MP = dense(encoder, losses)
    V_PK = span(ExampleJacobian(encoder, PIECES, losses, len(J_MP)), random(6, 6), rotate=True)
    S_K, right_KP = torch.linalg.svd(J_MP, full_matrices=False)[1:]
    assert relative((right_KP @ V_PK).abs(), torch.eye(6, dtype=torch.float64)) < 1e-6
    assert relative(torch.linalg.vector_norm(J_MP @ V_PK, dim=0), S_K) < 1e-9


def test_a_short_sketch_finds_the_leading_directions_of_a_decaying_spectrum() -> None:
    """sigma_i = 10^-i: with k = 4 the three leading directions come out to about sigma_5 / sigma_3."""
    left_MM, right_PM = torch.linalg.qr(random(12, 12))[0], torch.linalg.qr(random(50, 12, seed=1))[0]
    J_MP = left_MM * 10.0 ** -torch.arange(12, dtype=torch.float64) @ right_PM.t()
    V_PK = span(of_matrix(J_MP), random(4, 12, seed=2), rotate=True)
    assert relative((right_PM[:, :3].t() @ V_PK[:, :3]).abs(), torch.eye(3, dtype=torch.float64)) < 0.05
    assert relative(V_PK.t() @ V_PK, torch.eye(4, dtype=torch.float64)) < 1e-10


@pytest.mark.parametrize("rotate", [True, False])
def test_directions_that_no_example_has_are_left_out(rotate: bool) -> None:
    """6 examples of rank 3 with k = 5, and examples with zero gradients."""
    J_MP = random(3, 20).repeat(2, 1)
    V_PK = span(of_matrix(J_MP), random(5, 6, seed=1), rotate)
    norms_K = torch.linalg.vector_norm(V_PK, dim=0)
    assert int((norms_K > 0).sum()) == 3
    assert relative(V_PK @ (V_PK.t() @ J_MP.t()), J_MP.t()) < 1e-9
    assert not span(of_matrix(torch.zeros(6, 20)), torch.ones(5, 6), rotate).any()


@given(st.integers(0, 10**6), st.integers(1, 5))
def test_the_three_parts_add_up_and_are_what_they_are_called(seed: int, k: int) -> None:
    g_P, V_PK, p_K = random(9, seed=seed), torch.linalg.qr(random(9, k, seed=seed + 1))[0], random(k, seed=seed + 2)
    parts = [
        reweighted(g_P, V_PK, p_K, *(float(part == name) for name in ("perp", "plus", "minus")))[0]
        for part in ("perp", "plus", "minus")
    ]
    torch.testing.assert_close(sum(parts, torch.zeros_like(g_P)), g_P)
    torch.testing.assert_close(V_PK.t() @ parts[0], torch.zeros(k, dtype=torch.float64), atol=1e-12, rtol=0)
    assert float(parts[1] @ V_PK @ p_K) >= 0 >= float(parts[2] @ V_PK @ p_K)
    shares_3 = reweighted(g_P, V_PK, p_K, *SUM)[1]
    torch.testing.assert_close(shares_3, torch.stack([part @ part for part in parts]) / (g_P @ g_P))


def test_all_ones_is_multitask_and_all_zeros_the_end_task_alone() -> None:
    g_P, V_PK, p_K = random(9), torch.linalg.qr(random(9, 3, seed=1))[0], random(3, seed=2)
    assert torch.equal(reweighted(g_P, V_PK, p_K, *SUM)[0], g_P)
    assert torch.equal(reweighted(g_P, V_PK, p_K, *NONE)[0], torch.zeros_like(g_P))
    flipped_P = reweighted(g_P, V_PK, p_K, *FLIP)[0]
    assert ((V_PK.t() @ flipped_P) * p_K >= 0).all(), "nothing of it raises the end task's loss"


@pytest.mark.parametrize("seed", range(6))
def test_one_direction_is_one_sided_pcgrad(seed: int) -> None:
    """k = 1, V = g_E / ||g_E||, p from g_E, (1, 1, 0), against TorchJD, which projects both ways and adds up.

    By hand: g_E = (1, 0) and g = (-1, 1) conflict; g without its part along g_E is (0, 1), g_E without its part along
    g is (1/2, 1/2).
    """
    g_E, g_P = random(5, seed=seed), random(5, seed=seed + 100)

    def projected(gradient_P: Tensor, against_P: Tensor) -> Tensor:
        V_P1 = (against_P / against_P.norm()).unsqueeze(1)
        return reweighted(gradient_P, V_P1, V_P1.t() @ against_P, 1.0, 1.0, 0.0)[0]

    expected = PCGrad()(torch.stack((g_E, g_P)))
    torch.testing.assert_close(projected(g_P, g_E) + projected(g_E, g_P), expected)
    by_hand = torch.tensor([1.0, 0.0]), torch.tensor([-1.0, 1.0])
    assert projected(by_hand[1], by_hand[0]).tolist() == [0.0, 1.0]
    assert projected(*by_hand).tolist() == pytest.approx([0.5, 0.5])


def test_nothing_and_what_is_not_finite_pass_through() -> None:
    direction_P, shares_3 = reweighted(torch.zeros(4), torch.zeros(4, 2), torch.zeros(2), *FLIP)
    assert not direction_P.any()
    assert not shares_3.any()
    broken = torch.full((3, 8), torch.nan)
    assert span(of_matrix(broken), torch.ones(2, 3), rotate=True).shape == (8, 2)
