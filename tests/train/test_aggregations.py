"""The update of a whole step against TorchJD's aggregators on its own Jacobian of the step's losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torchjd import aggregation
from torchjd.autojac import jac

from aang_ray.config import parse_config
from aang_ray.gradients.engine import StepGradients
from aang_ray.methods.base import Sampled, seeded
from aang_ray.methods.registry import make_method
from aang_ray.objectives.space import Space
from aang_ray.train.step import Stepper
from tests.train.running import stepper, tiny_config

CPU = torch.device("cpu")
SEED = 5
AGGREGATORS: dict[str, tuple[dict[str, Any], Callable[[int], Callable[[Tensor], Tensor]]]] = {
    "pcgrad": ({}, lambda rows: aggregation.PCGrad()),
    "mgda": ({"epsilon": 1e-5}, lambda rows: aggregation.MGDA(epsilon=1e-5)),
    "cagrad": ({"c": 0.3}, lambda rows: aggregation.CAGrad(0.3)),
    "nash_mtl": ({}, lambda rows: aggregation.NashMTL(rows)),
    "imtl_g": ({}, lambda rows: aggregation.IMTLG()),
    "aligned_mtl": ({"scale_mode": "median"}, lambda rows: aggregation.AlignedMTL(scale_mode="median")),
    "upgrad": ({"preference": "static"}, lambda rows: aggregation.UPGrad(torch.tensor([1 / 2] + [1 / 6] * 3).double())),
    "dualproj": ({}, lambda rows: aggregation.DualProj()),
    "graddrop": ({}, lambda rows: aggregation.GradDrop()),
    "fairgrad": ({"alpha": 2.0}, lambda rows: aggregation.FairGrad(2.0)),
    "config": ({}, lambda rows: aggregation.ConFIG()),
    "gradvac": ({}, lambda rows: aggregation.GradVac()),
    "pcd": ({}, lambda rows: aggregation.PCD()),
    "krum": ({"n_selected": 2}, lambda rows: aggregation.Krum(0, 2)),
    "trimmed_mean": ({}, lambda rows: aggregation.TrimmedMean(1)),
}


@pytest.fixture(scope="module")
def seen(tiny: dict[str, Any]) -> tuple[Sampled, StepGradients, Space, Tensor]:
    """What the engine gave the method at the first step, and TorchJD's Jacobian of the same losses, [m, P]."""
    made: Stepper = stepper(
        tiny_config(tiny, "method=upgrad", "n=3", f"seed={SEED}", "encoder.dropout=0.0", "encoder.head_dropout=0.0"),
        torch.float64,
    )
    given: list[tuple[Sampled, StepGradients]] = []
    method, prepared = made.setup.method, made.prepare(0)
    direction = method.direction

    def record(sampled: Sampled, gradients: StepGradients) -> Tensor | None:
        given.append((sampled, gradients))
        return direction(sampled, gradients)

    (piece,) = prepared.pieces
    made.setup.encoder.train()
    losses_S = made.setup.domain.losses(piece, made.setup.head_of)
    parameters = [p for p in made.setup.encoder.parameters() if p.requires_grad]
    jacobians = jac(losses_S[1:], parameters, parallel_chunk_size=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(method, "direction", record)
        made.step(prepared)
    assert made.setup.space is not None
    return (*given[0], made.setup.space, torch.cat([j.flatten(1) for j in jacobians], dim=1))


def test_the_separate_gradients_are_the_jacobian(seen: tuple[Sampled, StepGradients, Space, Tensor]) -> None:
    _, gradients, _, jacobian_mP = seen
    assert gradients.separate_SP is not None
    torch.testing.assert_close(gradients.separate_SP[1:], jacobian_mP, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", AGGREGATORS)
def test_update_of_a_step(seen: tuple[Sampled, StepGradients, Space, Tensor], name: str) -> None:
    sampled, gradients, space, jacobian_mP = seen
    settings, aggregator = AGGREGATORS[name]
    config = parse_config({"method": {"name": name, **settings}, "n": 3, "seed": SEED}, "test")
    found_P = make_method(config, space, CPU).direction(sampled, gradients)
    with seeded(SEED, 0, CPU):
        expected_P = aggregator(len(jacobian_mP))(jacobian_mP)
    assert found_P is not None
    # What the iterative solvers stop at.
    assert float((found_P - expected_P).norm()) < 1e-3 * float(expected_P.norm())
