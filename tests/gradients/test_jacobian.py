"""Products with the Jacobian equal those with the matrix, row by row differentiated."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from aang_ray.gradients.statistics import ExampleJacobian, called_at
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
