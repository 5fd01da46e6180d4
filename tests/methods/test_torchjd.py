"""TorchJD's methods: exact values worked out by hand, state against TorchJD's own, and that none is forgotten."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from math import exp, sqrt
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torchjd import _mixins, aggregation, scalarization

from aang_ray.config.methods import method_sections
from aang_ray.errors import UserError
from tests.methods.driving import Driven, rows
from tests.methods.problem import NAMES, Problem

DOCS = Path(__file__).parents[2] / "docs"
CONFLICT = rows([1.0, 0.0], [-1.0, 1.0])
"""g_E = (1, 0) and g_1 = (-1, 1): <g_E, g_1> = -1."""
EVERY = range(len(NAMES["A"]))
"""All objectives of the space."""


def losses(*values: float) -> Tensor:
    """Losses of the end task and the objectives, after the dev loss."""
    return torch.tensor([0.0, *values])


VALUES: list[tuple[str, dict[str, Any], list[float]]] = [
    # Projections of each gradient on the other's normal plane, as PCGrad: averages of cosines start at 0.
    ("gradvac", {}, [0.5, 1.5]),
    # d u_1 = d u_2 = 1 for u_1 = (1, 0) and u_2 = (-1, 1) / sqrt 2: d = (1, 1 + sqrt 2), |d|^2 = 4 + 2 sqrt 2. As long
    # as the sum of the projections of g_E and g_1 on it, (1 + sqrt 2) / |d|.
    ("config", {}, [(1 + sqrt(2)) / (4 + 2 * sqrt(2)), (1 + sqrt(2)) ** 2 / (4 + 2 * sqrt(2))]),
    # The point of y >= x closest to g_E is (1/2, 1/2); it gets the length of g_E.
    ("pcd", {"tau": 0.0}, [sqrt(0.5), sqrt(0.5)]),
    # The first weights are those of MGDA.
    ("cr_mogm", {}, [0.2, 0.4]),
    # Fewer than three gradients: the mean; nothing can be trimmed from two.
    ("krum", {}, [0.0, 0.5]),
    ("trimmed_mean", {}, [0.0, 0.5]),
    # The update of FairGrad with alpha = 0 is the mean.
    ("fairgrad", {"alpha": 0.0}, [0.0, 0.5]),
    # Losses 1 and 4. Geometric mean 2: derivatives 2 / (2 L) = 1 and 1/4.
    ("geometric_mean", {}, [0.75, 0.25]),
    # lambda L / mu = (1/2, 2): derivatives (1/2) softmax.
    ("stch", {"mu": 1.0}, [0.5 * (exp(0.5) - exp(2)) / (exp(0.5) + exp(2)), 0.5 * exp(2) / (exp(0.5) + exp(2))]),
    # r = (1/2, 1/2); cos = (5/2) / sqrt(17/2), whose derivatives r / (|r| |L|) - cos L / |L|^2 are
    # (1/17, ...): with q = sqrt 34: (1/q)(1 - 5/17) = 12 / (17 q) and (1/q)(1 - 20/17) = -3 / (17 q).
    ("cosmos", {"penalty": 0.0}, [0.0, 0.5]),
    ("cosmos", {"penalty": 1.0}, [-15 / 17 / sqrt(34), 0.5 + 3 / 17 / sqrt(34)]),
    # w = (1, 1) / sqrt 2. Perpendicular to it (-3/2, 3/2), of length 3 / sqrt 2, with derivatives (-1, 1) / sqrt 2.
    ("pbi", {"theta": 0.0}, [0.0, sqrt(0.5)]),
    ("pbi", {"theta": 5.0}, [(-4 - 6) / sqrt(2), 6 / sqrt(2)]),
    # z = (1/2, 1/2): weights proportional to 1 and 1/4, with sum 1.
    ("famo", {}, [0.6, 0.2]),
    # Both weights start at 1.
    ("imtl_l", {}, [0.0, 1.0]),
    # Both weights start at 1/2, and stay there during the warm-up.
    ("excess_mtl", {}, [0.0, 0.5]),
]


@pytest.mark.parametrize(("name", "settings", "expected"), VALUES)
def test_one_objective_in_conflict(name: str, settings: dict[str, Any], expected: list[float]) -> None:
    found = Driven(name, n=1, **settings).step(CONFLICT, [2], losses(1.0, 4.0)).tolist()
    assert found == pytest.approx(expected, abs=3e-4)


def test_fairgrad() -> None:
    # G w = w^(-1/alpha) with G = diag(1, 4). alpha = 1: w = (1, 1/2), the update is (1, 1). alpha = 2: w_1 = 1 and
    # 4 w_2 = w_2^(-1/2), so w_2 = 4^(-2/3).
    gradients = rows([1.0, 0.0], [0.0, 2.0])
    for scale in (1e-6, 1.0, 1e6):
        found = Driven("fairgrad", n=1).step(scale * gradients, [0]).tolist()
        assert found == pytest.approx([1.0, 1.0], rel=1e-3)
    assert Driven("fairgrad", n=1, alpha=2.0).step(gradients, [0]).tolist() == pytest.approx(
        [1.0, 2 * 4 ** (-2 / 3)], rel=1e-3
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shorter", [1.0, 1e-2, 1e-4])
def test_config_has_equal_cosines_with_gradients_of_any_length(shorter: float, dtype: torch.dtype) -> None:
    gradients = torch.randn(5, 300, generator=torch.Generator().manual_seed(0), dtype=dtype)
    gradients[0] = 0.0
    gradients[2] *= shorter
    found = Driven("config", n=3).step(gradients, [0, 1, 2])
    cosines = torch.nn.functional.cosine_similarity(found[None], gradients[1:])
    torch.testing.assert_close(cosines, cosines[:1].expand(4), rtol=1e-3, atol=0.0)
    expected = aggregation.ConFIG()(gradients[1:])
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def test_config_counts_the_end_task_as_much_as_all_objectives() -> None:
    # Orthogonal gradients: cosines in the ratio of the preference, 1/2 : 1/4 : 1/4.
    found = Driven("config", preference="static").step(
        torch.cat((torch.zeros(1, 3), 2 * torch.eye(3))).double(), [0, 1]
    )
    assert (found / found[1]).tolist() == pytest.approx([2.0, 1.0, 1.0])


def test_krum_takes_the_gradient_closest_to_the_others() -> None:
    # Sums of distances: 0.5 + 1 + 9, 0.5 + 0.5 + 8.5, 1 + 0.5 + 8 and 26: the third.
    gradients = rows([0.0, 1.0], [0.5, 1.0], [1.0, 1.0], [9.0, 1.0])
    assert Driven("krum", n=3).step(gradients, [0, 1, 2]).tolist() in ([0.5, 1.0], [1.0, 1.0])
    # All four selected: the mean.
    assert Driven("krum", n=3, n_selected=9).step(gradients, [0, 1, 2]).tolist() == pytest.approx([10.5 / 4, 1.0])


def test_trimmed_mean_drops_the_extremes_of_labelled_gradients() -> None:
    gradients = rows([1.0, 5.0], [2.0, -1.0], [9.0, 0.0], [0.0, 0.0])
    made = Driven("trimmed_mean", n=3)
    assert made.step(gradients, [0, 1, 2], labels=[5.0, 5.0, 0.0]).tolist() == [2.0, 0.0]
    assert made.step(gradients, [0, 1, 2]).tolist() == [1.5, 0.0]
    assert made.method.describe(made.sampled) is None


def test_cr_mogm_averages_weights_and_keeps_those_that_are_not_sampled() -> None:
    # MGDA's weights are (3/5, 2/5), then (1/2, 1/2) on orthogonal gradients of one length.
    made = Driven("cr_mogm", n=1, alpha=0.5)
    made.step(CONFLICT, [2])
    orthogonal = rows([1.0, 0.0], [0.0, 1.0])
    assert made.step(orthogonal, [2]).tolist() == pytest.approx([0.55, 0.45], abs=1e-3)
    # Objective 0 is new and takes its first weight; the end task's is (0.55 + 0.5) / 2.
    assert made.step(orthogonal, [0]).tolist() == pytest.approx([0.525, 0.5], abs=1e-3)
    assert made.step(orthogonal, [2]).tolist() == pytest.approx([0.5125, 0.475], abs=1e-3)


def test_imtl_l() -> None:
    # L = sum exp(s_i) L_i - s_i: dL/ds_i = L_i - 1 at s = 0. With losses 2 and 4 and rate 0.1: s = (-0.1, -0.3).
    made = Driven("imtl_l", n=1, lr=0.1)
    made.step(CONFLICT, [2], losses(2.0, 4.0))
    assert made.coefficients(2).tolist() == pytest.approx([exp(-0.1), exp(-0.3)])
    made.step(CONFLICT, [2], losses(1 / exp(-0.1), 0.0), labels=[0.0])
    assert made.coefficients(2).tolist() == pytest.approx([exp(-0.1), exp(-0.3)]), "settled, and without labels"


def test_losses_of_zero_have_weights() -> None:
    for name in ("geometric_mean", "famo", "stch", "pbi", "cosmos"):
        made = Driven(name, n=1)
        for _ in range(3):
            assert made.step(CONFLICT, [2], losses(0.0, 1.0)).isfinite().all()


# State: the same numbers as TorchJD's own objects where every objective is sampled at every step.

Step = Callable[[Tensor, Tensor], Tensor]
"""From the Jacobian [m, P] and the losses [m] of a step to the update."""


def jacobian_step(aggregator: Any) -> Step:
    return lambda jacobian_mP, losses_m: aggregator(jacobian_mP)


def excess_step(unit: list[Tensor]) -> Step:
    """ExcessMTL on gradients relative to the root mean square of the first one's entries."""
    weighting = aggregation.ExcessMTLWeighting(0.5, 2)

    def step(jacobian_mP: Tensor, losses_m: Tensor) -> Tensor:
        if not unit:
            unit.append(jacobian_mP[0].square().mean().sqrt())
        weights_m: Tensor = weighting(jacobian_mP / unit[0])
        return weights_m @ jacobian_mP

    return step


def famo_step(scalarizer: Any) -> Step:
    """FAMO with the losses of the next step in the place of those after the step."""

    def step(jacobian_mP: Tensor, losses_m: Tensor) -> Tensor:
        if scalarizer._prev_losses is not None:
            scalarizer.update(losses_m)
        leaf_m = losses_m.clone().requires_grad_()
        return torch.autograd.grad(scalarizer(leaf_m), leaf_m)[0].to(jacobian_mP) @ jacobian_mP

    return step


def learned_step(scalarizer: Any, lr: float) -> Step:
    optimizer = torch.optim.SGD(scalarizer.parameters(), lr=lr)

    def step(jacobian_mP: Tensor, losses_m: Tensor) -> Tensor:
        leaf_m = losses_m.clone().requires_grad_()
        optimizer.zero_grad()
        scalarizer(leaf_m).backward()
        optimizer.step()
        assert leaf_m.grad is not None
        return leaf_m.grad.to(jacobian_mP) @ jacobian_mP

    return step


def mogm() -> Any:
    weighting = aggregation.CRMOGMWeighting(aggregation.MGDAWeighting(), 0.7)
    return aggregation.GramianWeightedAggregator(weighting)


STATEFUL: dict[str, tuple[dict[str, Any], Callable[[], Step]]] = {
    "pcd": ({"tau": 0.1, "beta": 0.9}, lambda: jacobian_step(aggregation.PCD(0.1, 0.9, eps=0.0))),
    "cr_mogm": ({"alpha": 0.7}, lambda: jacobian_step(mogm())),
    "excess_mtl": (
        {"robust_step_size": 0.5, "warmup_steps": 2},
        lambda: excess_step([]),
    ),
    "famo": ({"lr": 0.3}, lambda: famo_step(scalarization.FAMO(5, lr=0.3))),
    "uncertainty": ({"lr": 0.2}, lambda: learned_step(scalarization.UW(5), 0.2)),
    "imtl_l": ({"lr": 0.2}, lambda: learned_step(scalarization.IMTLL(5), 0.2)),
}


@pytest.mark.parametrize("name", STATEFUL)
def test_state_is_that_of_torchjd(name: str) -> None:
    settings, make = STATEFUL[name]
    made, step = Driven(name, n=len(EVERY), **settings), make()
    for seed in range(5):
        gradients_SP = Problem.random(2 + len(EVERY), seed).gradients_SP()
        losses_S = torch.rand(2 + len(EVERY), generator=torch.Generator().manual_seed(seed)) + 0.5
        found_P = made.step(gradients_SP, EVERY, losses_S)
        torch.testing.assert_close(found_P, step(gradients_SP[1:], losses_S[1:]), rtol=1e-4, atol=1e-5)


def test_gradvac_is_torchjd_s_with_the_draws_of_each_step() -> None:
    from aang_ray.methods.base import seeded

    made, aggregator = Driven("gradvac", n=len(EVERY), seed=3), aggregation.GradVac()
    for step in range(4):
        gradients_SP = Problem.random(2 + len(EVERY), step).gradients_SP()
        found_P = made.step(gradients_SP, EVERY)
        with seeded(3, step, torch.device("cpu")):
            expected_P = aggregator(gradients_SP[1:])
        torch.testing.assert_close(found_P, expected_P, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", [*STATEFUL, "gradvac", "dwa", "gradnorm"])
def test_what_is_not_sampled_keeps_its_state(name: str) -> None:
    torch.manual_seed(0)
    before = {}
    made = Driven(name, n=len(EVERY), **STATEFUL.get(name, ({}, None))[0])
    for step in range(4):
        if step == 3:
            before = {key: value.clone() for key, value in made.method.state.items()}
        objectives = [1] if step == 3 else EVERY
        count = 2 + len(objectives)
        made.step(Problem.random(count, step).gradients_SP(), objectives, torch.rand(count) + 0.5)
    untouched = torch.tensor([1, 3, 4])  # objectives 0, 2 and 3 in vectors that begin with the end task
    moved = False
    for key, value in made.method.state.items():
        vector = value if value.ndim == 1 else value[-1] if value.ndim == 2 else None
        if vector is not None and len(vector) == 5:
            assert torch.equal(vector[untouched], (before[key] if value.ndim == 1 else before[key][-1])[untouched])
        moved = moved or not torch.equal(value, before[key])
    assert moved


# Nothing is forgotten.


def torchjd_classes(module: Any) -> set[str]:
    """Public aggregators and scalarizers, without base classes; a weighting without an aggregator counts."""
    names = {name for name in module.__all__ if not name.startswith(("Aggregator", "Scalarizer"))}
    names -= {"Weighting", "WeightedAggregator", "GramianWeightedAggregator"}
    return {name for name in names if name.removesuffix("Weighting") not in names - {name}}


@pytest.mark.parametrize(
    ("module", "page"),
    [(aggregation, "aggregations.md"), (scalarization, "loss-weights.md")],
    ids=["gradients", "losses"],
)
def test_every_class_of_torchjd_is_in_the_docs(module: Any, page: str) -> None:
    """Served by a method, or named with the reason why not."""
    text = (DOCS / "methods" / page).read_text()
    assert not {name for name in torchjd_classes(module) if f"`{name}`" not in text}


@pytest.mark.parametrize("name", method_sections())
def test_every_method_is_in_the_docs(name: str) -> None:
    for page in ("methods/README.md", "semantics.md"):
        assert f"`{name}`" in (DOCS / page).read_text(), f"docs/{page} does not name `{name}`"


def test_every_method_of_torchjd_has_exact_values_or_is_compared_with_torchjd() -> None:
    from tests.methods.test_aggregation_values import VALUES as OTHERS
    from tests.train.test_aggregations import AGGREGATORS

    shown = {name for name, _, _ in [*VALUES, *OTHERS]} | {*STATEFUL, "gradvac", "random", "dwa"}
    modules = ("torchjd:", "scalarizations:")
    served = {name for name, section in method_sections().items() if section.implementation.startswith(modules)}
    aggregations = {name for name in served if method_sections()[name].implementation.startswith("torchjd:")}
    assert served <= shown | set(AGGREGATORS)
    assert aggregations - {"cr_mogm", "excess_mtl", "pcd", "gradvac"} <= set(AGGREGATORS), "stateful ones are above"


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("upgrad", "quadprog"),
        ("dualproj", "qpsolvers"),
        ("cagrad", "clarabel"),
        ("nash_mtl", "ecos"),
        ("cr_mogm", "cvxpy"),
    ],
)
def test_a_missing_solver_is_one_line(name: str, missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        _mixins, "find_spec", lambda found: None if found == missing else importlib.util.find_spec(found)
    )
    settings = {"weighting": "cagrad"} if name == "cr_mogm" else {}
    with pytest.raises(UserError) as caught:
        Driven(name, n=1, **settings).step(CONFLICT, [2])
    assert str(caught.value) == (
        f"method.name: {name} needs {missing}, not installed here; run: pip install 'aang-ray[solvers]'"
    )
