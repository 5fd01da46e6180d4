"""What each aggregation promises, for any gradients."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from qpsolvers import solve_qp
from torch import Tensor

from aang_ray.errors import RunFailure
from aang_ray.methods.torchjd import square_root
from tests.methods.driving import Driven
from tests.methods.problem import NAMES

SIZE = 12
SEEDS = st.integers(0, 2**31)


def draw(seed: int, objectives: int = 3) -> Tensor:
    """Gradients of the end task and the objectives, of scales from 0.1 to 10, after a dev gradient of 0, [S, P]."""
    generator = torch.Generator().manual_seed(seed)
    found_SP = torch.randn(2 + objectives, SIZE, generator=generator, dtype=torch.float64)
    found_SP *= 10 ** (2 * torch.rand(2 + objectives, 1, generator=generator, dtype=torch.float64) - 1)
    found_SP[0] = 0.0
    return found_SP


def update(name: str, gradients_SP: Tensor, **changes: Any) -> Tensor:
    objectives = range(len(gradients_SP) - 2)
    return Driven(name, n=len(objectives), **changes).step(gradients_SP, objectives)


def weights(made: Driven) -> Tensor:
    """alpha of the last step, [m]."""
    row = made.method.describe(made.sampled)
    assert row is not None
    return torch.tensor(list(row.health.values()), dtype=torch.float64)


def cosines(update_P: Tensor, gradients_SP: Tensor) -> Tensor:
    return torch.nn.functional.cosine_similarity(update_P[None], gradients_SP[1:])


@settings(deadline=None, max_examples=40)
@given(seed=SEEDS, name=st.sampled_from(["upgrad", "dualproj"]), preference=st.sampled_from(["uniform", "static"]))
def test_projections_harm_nobody(seed: int, name: str, preference: str) -> None:
    gradients_SP = draw(seed)
    made = Driven(name, n=3, preference=preference)
    d_P = made.step(gradients_SP, [0, 1, 2])
    # TorchJD adds 1e-4 of the trace t to the diagonal of G: for weights v it is (G + 1e-4 t) v that is not negative.
    allowed_m = 1.001e-4 * gradients_SP.square().sum() * weights(made)
    assert bool((gradients_SP[1:] @ d_P >= -allowed_m).all())


@settings(deadline=None, max_examples=40)
@given(seed=SEEDS)
def test_mgda_is_the_shortest_convex_combination(seed: int) -> None:
    """Against a solver of quadratic programs."""
    gradients_SP = draw(seed)
    made = Driven("mgda", n=3, epsilon=1e-9, max_iters=100)
    d_P = made.step(gradients_SP, [0, 1, 2])
    rows = gradients_SP[1:].numpy()
    ones, zeros = np.ones(len(rows)), np.zeros(len(rows))
    alpha = solve_qp(rows @ rows.T, zeros, A=ones[None], b=ones[:1], lb=zeros, solver="quadprog")
    # After k steps of Frank-Wolfe half the squared length exceeds the least by 2 D^2 / (k + 2) at most, D the diameter.
    diameter = float(torch.cdist(gradients_SP[1:], gradients_SP[1:]).max())
    assert float(d_P @ d_P) / 2 - float(np.square(alpha @ rows).sum()) / 2 <= 2 * diameter**2 / 102
    assert float(weights(made).min()) >= 0
    assert float(weights(made).sum()) == pytest.approx(1.0)


@settings(deadline=None, max_examples=40)
@given(seed=SEEDS)
def test_imtl_g_projects_alike_on_all(seed: int) -> None:
    gradients_SP = draw(seed)
    units_mP = torch.nn.functional.normalize(gradients_SP[1:])
    projections_m = units_mP @ update("imtl_g", gradients_SP)
    torch.testing.assert_close(projections_m, projections_m.mean().expand(len(projections_m)), rtol=1e-6, atol=1e-9)


@settings(deadline=None, max_examples=40)
@given(seed=SEEDS, scale_mode=st.sampled_from(["min", "median", "rmse"]))
def test_aligned_mtl_averages_the_polar_factor(seed: int, scale_mode: str) -> None:
    gradients_SP = draw(seed, objectives=4)
    u, sigma_m, v = torch.linalg.svd(gradients_SP[1:], full_matrices=False)
    scale = {"min": sigma_m[-1], "median": sigma_m.median(), "rmse": sigma_m.square().mean().sqrt()}[scale_mode]
    torch.testing.assert_close(update("aligned_mtl", gradients_SP, scale_mode=scale_mode), scale * (u @ v).mean(0))


@settings(deadline=None, max_examples=25)
@given(seed=SEEDS, c=st.sampled_from([0.1, 0.5, 0.9]))
def test_cagrad_is_in_its_ball_and_its_worst_case_is_no_worse_than_the_mean_s(seed: int, c: float) -> None:
    gradients_SP = draw(seed)
    mean_P, d_P = gradients_SP[1:].mean(0), update("cagrad", gradients_SP, c=c)
    assert float((d_P - mean_P).norm()) <= c * float(mean_P.norm()) * (1 + 1e-3)
    worst = [float((gradients_SP[1:] @ vector_P).min()) for vector_P in (d_P, mean_P)]
    assert worst[0] >= worst[1] - 1e-3 * abs(worst[1])


@pytest.mark.parametrize("shorter", [1e-2, 1e-3, 1e-4, 1e-5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cagrad_goes_on_beside_a_gradient_that_is_much_shorter_than_the_others(
    shorter: float, dtype: torch.dtype
) -> None:
    """Four nearly orthogonal gradients: the update is on the rim of its ball, and helps each."""
    gradients_SP = torch.randn(5, 200, generator=torch.Generator().manual_seed(0), dtype=dtype)
    gradients_SP[0] = 0.0
    gradients_SP[3] *= shorter
    mean_P, d_P = gradients_SP[1:].mean(0), update("cagrad", gradients_SP)
    assert float((d_P - mean_P).norm()) == pytest.approx(0.5 * float(mean_P.norm()), rel=1e-3)
    assert float(cosines(d_P, gradients_SP).min()) > 0.1


@settings(deadline=None, max_examples=25)
@given(seed=SEEDS)
def test_pcgrad_of_two_harms_neither(seed: int) -> None:
    gradients_SP = draw(seed, objectives=1)
    assert float(cosines(update("pcgrad", gradients_SP), gradients_SP).min()) > -1e-9


@settings(deadline=None, max_examples=25)
@given(seed=SEEDS, mode=st.sampled_from(["gate", "weigh"]))
def test_cosine_gating_never_turns_against_the_end_task(seed: int, mode: str) -> None:
    gradients_SP = draw(seed)
    d_P = update("cosine_gating", gradients_SP, mode=mode)
    assert float(d_P @ gradients_SP[1]) >= 0.5 * float(gradients_SP[1] @ gradients_SP[1])


@settings(deadline=None, max_examples=25)
@given(seed=SEEDS)
def test_graddrop_takes_one_sign_in_every_coordinate(seed: int) -> None:
    gradients_SP = draw(seed)
    positive_P, negative_P = gradients_SP[1:].clamp_min(0).sum(0), gradients_SP[1:].clamp_max(0).sum(0)
    d_P = update("graddrop", gradients_SP)
    torch.testing.assert_close(d_P, torch.where(d_P > 0, positive_P, negative_P))


@pytest.mark.parametrize("seed", range(3))
def test_nash_mtl_solves_its_equation(seed: int) -> None:
    # Gradients of like lengths with mild conflicts, where the solver that TorchJD calls does not fail.
    generator = torch.Generator().manual_seed(seed)
    gradients_SP = torch.randn(5, 60, generator=generator, dtype=torch.float64)
    gradients_SP[0] = 0.0
    made = Driven("nash_mtl", n=3, max_norm=0.0)
    d_P = made.step(gradients_SP, [0, 1, 2])
    alpha_m = weights(made)
    torch.testing.assert_close(alpha_m @ gradients_SP[1:], d_P, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(alpha_m * (gradients_SP[1:] @ d_P), torch.ones(4).double(), rtol=1e-3, atol=1e-3)


@settings(deadline=None, max_examples=25)
@given(seed=SEEDS, objectives=st.integers(0, 4))
def test_square_root_has_the_gram_matrix(seed: int, objectives: int) -> None:
    rows_mP = draw(seed, objectives)[1:]
    root_mm = square_root(rows_mP @ rows_mP.t())
    torch.testing.assert_close(root_mm @ root_mm.t(), rows_mP @ rows_mP.t())


@pytest.mark.parametrize(("row", "name"), [(1, "the end task"), (3, NAMES["A"][2])])
def test_a_gradient_that_is_not_finite_ends_the_run_with_its_name(row: int, name: str) -> None:
    gradients_SP = draw(0, objectives=2)
    gradients_SP[row, 0] = float("nan")
    with pytest.raises(RunFailure) as failure:
        Driven("upgrad").step(gradients_SP, [0, 2])
    assert str(failure.value).startswith(f"step 1: the gradient of {name} is not finite; lower optim.body_lr")
