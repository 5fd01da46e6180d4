"""Theorem E.5 against its own proof: the closed form is the least value of equation 11."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar

from aang_ray.errors import UserError
from aang_ray.theory import Branch, Problem, bound_of, default_ranges, generalisation_bound, plot_bound

problems = st.builds(
    Problem,
    lipschitz=st.floats(0.1, 10),
    smooth_end=st.floats(0.1, 50),
    smooth_auxiliary=st.floats(0.1, 50),
    dissimilarity=st.floats(0, 20),
    examples_end=st.floats(10, 1e4),
    examples_auxiliary=st.floats(0, 1e6),
    end_task_weight=st.floats(0.01, 0.99),
    step_size=st.floats(0.01, 1),
    steps=st.floats(1, 1e6),
)
branches = st.sampled_from(["dissimilarity", "smoothness"])


@given(problems, branches)
def test_it_is_the_least_value_of_equation_11(problem: Problem, branch: Branch) -> None:
    found = bound_of(problem, branch)
    size, gamma, lipschitz = problem.examples, problem.gamma, problem.lipschitz
    rho_bar = 2 * gamma * lipschitz + (size - gamma) * found.rho

    def equation_11(log_t0: float) -> float:
        """Its logarithm."""
        growth = problem.step_size * found.beta_bar * (math.log(problem.steps) - log_t0)
        first = math.log(gamma / size) + log_t0
        return float(np.logaddexp(first, math.log(lipschitz * rho_bar / (found.beta_bar * (size - gamma))) + growth))

    least = minimize_scalar(equation_11, bounds=(-60, 60), method="bounded", options={"xatol": 1e-9})
    assert math.log(found.value) == pytest.approx(least.fun, abs=1e-6)


def test_a_worked_example() -> None:
    # lambda_e = 1/2, N_e = 100, N_a = 300: N' = 400, gamma = 2. beta_a = 2 < beta_e = 4: lambda* = 1/2, beta_bar = 1,
    # rho = (Delta + 2L)/2 = 3/2. c = 1: q = 1. 2 gamma L^2 c/(N' - gamma) = 4/398.
    # (1 + 1) sqrt(4/398 + 3/2) sqrt(2 * 50 / 400)  =  sqrt(4/398 + 3/2).
    problem = Problem(1.0, 4.0, 2.0, 1.0, 100, 300, 0.5, 1.0, 50)
    found = bound_of(problem, "dissimilarity")
    assert (found.beta_bar, found.rho) == (1.0, 1.5)
    assert found.value == pytest.approx(math.sqrt(4 / 398 + 1.5))
    # The other branch: beta_bar = 3, q = 3: (4/3) (4/398)^(1/4) (1/4)^(3/4).
    other = bound_of(problem, "smoothness")
    assert other.value == pytest.approx(4 / 3 * (4 / 398) ** 0.25 * 0.25**0.75)
    assert generalisation_bound(problem) == min((found, other), key=lambda bound: bound.value)


@pytest.mark.parametrize(("end_task_weight", "smoother"), [(0.25, 0.75), (0.75, 0.75), (0.5, 0.5)])
def test_of_two_equally_smooth_functions_the_better_one_counts(end_task_weight: float, smoother: float) -> None:
    # beta = 2, Delta + 2L = 3, N' = 400, c = 1, and T such that gamma T / N' = 1: (1 + 1/q) (2 gamma / (N' - gamma) +
    # 3 (1 - lambda*))^(1/(q+1)) with q = 2 lambda*. For lambda_e = 1/4 and gamma = 1 that is
    # 5/3 (2/399 + 3/4)^(2/5) = 1.49 with lambda* = 3/4, and 3 (2/399 + 9/4)^(2/3) = 5.16 with lambda* = 1/4.
    gamma = 4 * end_task_weight
    problem = Problem(1.0, 2.0, 2.0, 1.0, 100, 300, end_task_weight, 1.0, 400 / gamma)
    found, q = bound_of(problem, "dissimilarity"), 2 * smoother
    assert (found.beta_bar, found.rho) == pytest.approx((q, 3 * (1 - smoother)))
    expected = (1 + 1 / q) * (2 * gamma / (400 - gamma) + 3 * (1 - smoother)) ** (1 / (q + 1))
    assert found.value == pytest.approx(expected)


@given(problems)
def test_at_a_tie_the_bound_is_the_smaller_of_its_limits(problem: Problem) -> None:
    """From one side the end task is the smoother one, from the other the objective: the bound jumps, but never up."""
    at, below, above = (
        bound_of(replace(problem, smooth_auxiliary=problem.smooth_end * factor), "dissimilarity").value
        for factor in (1, 1 - 1e-9, 1 + 1e-9)
    )
    assert at == pytest.approx(min(below, above), rel=1e-5)


@given(problems, st.floats(0, 10))
def test_a_closer_objective_is_never_worse(problem: Problem, more: float) -> None:
    further = replace(problem, dissimilarity=problem.dissimilarity + more)
    assert generalisation_bound(problem).value <= generalisation_bound(further).value * (1 + 1e-12)
    assert bound_of(problem, "smoothness") == bound_of(further, "smoothness")


def test_the_end_task_alone_is_theorem_e2() -> None:
    # lambda_e = 1 and N_a = 0: gamma = 1, rho = 0, q = beta_e c, and the bound of Hardt et al. 2016, Theorem 3.12:
    # (1 + 1/q) / (N - 1) (2 c L^2)^(1/(q+1)) T^(q/(q+1)), where their N - 1 is N here but for the first factor.
    problem = Problem(2.0, 3.0, 3.0, 0.0, 1000, 0, 1.0, 0.5, 400)
    q = 1.5
    expected = (1 + 1 / q) * (2 * 0.5 * 4 / 999) ** (1 / (q + 1)) * (400 / 1000) ** (q / (q + 1))
    assert generalisation_bound(problem).value == pytest.approx(expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lipschitz": 0.0}, "--lipschitz: must be above 0, not 0"),
        ({"dissimilarity": -1.0}, "--dissimilarity: must be 0 or more, not -1"),
        ({"end_task_weight": 1.5}, "--end-task-weight: must lie in"),
        ({"examples_end": 1.0}, "--examples-end: must be above 1, not 1"),
        ({"steps": math.inf}, "--steps: must be below .*, not inf"),
        ({"lipschitz": math.inf}, "--lipschitz: must be below .*, not inf"),
        ({"dissimilarity": math.nan}, "--dissimilarity: must be below .*, not nan"),
        ({"examples_auxiliary": math.inf}, "--examples-auxiliary: must be below .*, not inf"),
        ({"examples_end": math.inf}, "--examples-end: must be below .*, not inf"),
        ({"step_size": 1e300}, "--step-size: must be below .*, not 1e"),
    ],
)
def test_what_makes_no_sense_is_refused(change: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}"):
        replace(Problem(), **change)


def test_the_default_picture_shows_both_branches_to_be_the_tighter_one_below_1() -> None:
    deltas, _ = default_ranges(Problem())
    assert (deltas[0], deltas[-1]) == (0.0, 2 * Problem().lipschitz)
    found = [generalisation_bound(replace(Problem(), dissimilarity=delta)) for delta in deltas]
    tighter = [bound.branch for bound in found]
    assert (tighter[0], tighter[-1]) == ("dissimilarity", "smoothness")
    assert 0.25 < tighter.count("dissimilarity") / len(deltas) < 0.75
    assert not any(bound.vacuous for bound in found)


def test_every_problem_can_be_drawn(tmp_path: Path) -> None:
    """The picture's other values of Delta, N' and lambda_e are no new problem."""
    for number, change in enumerate(({"examples_end": 1.01}, {"dissimilarity": 1e29}, {"end_task_weight": 1.0})):
        problem = replace(Problem(), **change)
        deltas, sizes = default_ranges(problem)
        plot_bound(problem, deltas, sizes, tmp_path / f"{number}.svg")
        assert deltas[-1] >= problem.dissimilarity


def test_it_can_be_drawn(tmp_path: Path) -> None:
    path = tmp_path / "bound.svg"
    plot_bound(Problem(), *default_ranges(Problem()), path)
    drawn = path.read_text()
    assert drawn.lstrip().startswith("<?xml")
    for name in ("bound.xyz", "bound", "nowhere/bound.png"):
        with pytest.raises(UserError, match="cannot be written as a picture"):
            plot_bound(Problem(), [0.0, 1.0], [600.0], tmp_path / name)
    assert [file.name for file in tmp_path.iterdir()] == ["bound.svg"]


def test_a_function_that_is_never_drawn_or_steps_of_no_length_bound_nothing() -> None:
    assert bound_of(Problem(end_task_weight=1.0), "dissimilarity").value == math.inf
    assert bound_of(Problem(step_size=1e-300, smooth_end=1e-300), "dissimilarity").vacuous


def test_without_matplotlib_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match=r"^--plot needs matplotlib: pip install 'aang-ray\[figures\]'$"):
        plot_bound(Problem(), *default_ranges(Problem()), tmp_path / "bound.png")
