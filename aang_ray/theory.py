"""Bound on the generalisation error of training with an auxiliary objective: Theorem E.5 of Dery et al. 2023.

End task e and auxiliary objective a have losses in [0, 1] that are L-Lipschitz and beta_e-, beta_a-smooth, with
||grad f_a - grad f_e|| <= Delta everywhere (Assumption A.1). SGD takes T steps with step sizes of at most c/t. Each
step uses an example of e with probability lambda_e, else of a. Let N' = N_e + N_a and gamma = lambda_e N' / N_e. Then
the generalisation error is at most

    (1 + 1/q) (2 gamma L^2 c / (N' - gamma) + rho L c)^(1/(q+1)) (gamma T / N')^(q/(q+1)),   q = c beta_bar,

for two pairs (beta_bar, rho), so the smaller bound holds:

- `dissimilarity`: (lambda* beta*, (1 - lambda*)(Delta + 2L)), where beta* = min(beta_e, beta_a) and lambda* is the
  probability of the smoother function (of either function if both are equally smooth);
- `smoothness`: (lambda_e beta_e + lambda_a beta_a, 0).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from aang_ray.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Branch = Literal["dissimilarity", "smoothness"]
_LARGEST = 1e30
"""Upper limit of every quantity, so that powers and quotients stay finite."""


@dataclass(frozen=True)
class Problem:
    """The quantities of the theorem. With the defaults, each branch gives the smaller bound for some Delta."""

    lipschitz: float = 0.2
    """L."""
    smooth_end: float = 100.0
    """beta_e."""
    smooth_auxiliary: float = 1.0
    """beta_a."""
    dissimilarity: float = 0.1
    """Delta; for two L-Lipschitz functions it is at most 2L."""
    examples_end: float = 500
    """N_e."""
    examples_auxiliary: float = 5_000
    """N_a."""
    end_task_weight: float = 0.5
    """lambda_e, the probability that a step uses an end-task example."""
    step_size: float = 0.1
    """c; the step size at step t is at most c/t."""
    steps: float = 1_000
    """T."""

    def __post_init__(self) -> None:
        for name in (field.name for field in fields(self)):
            value = getattr(self, name)
            match name:
                case "dissimilarity" | "examples_auxiliary":
                    wrong, allowed = value < 0, "must be 0 or more"
                case "end_task_weight":
                    wrong, allowed = not 0 < value <= 1, "must lie in (0, 1]"
                case "examples_end":  # then gamma < N' whatever lambda_e is
                    wrong, allowed = value <= 1, "must be above 1"
                case _:
                    wrong, allowed = value <= 0, "must be above 0"
            if not value < _LARGEST:  # neither is NaN
                wrong, allowed = True, f"must be below {_LARGEST:g}"
            if wrong:
                raise UserError(f"--{name.replace('_', '-')}: {allowed}, not {value:g}")

    @property
    def examples(self) -> float:
        """Return N' = N_e + N_a."""
        return self.examples_end + self.examples_auxiliary

    @property
    def gamma(self) -> float:
        """Return lambda_e N' / N_e."""
        return self.end_task_weight * self.examples / self.examples_end


@dataclass(frozen=True)
class Bound:
    """The bound, and the pair (beta_bar, rho) that gives it."""

    value: float
    branch: Branch
    beta_bar: float
    rho: float

    @property
    def vacuous(self) -> bool:
        """Whether the bound is trivial, because losses lie in [0, 1]."""
        return self.value >= 1


def bound_of(problem: Problem, branch: Branch) -> Bound:
    """Return the bound of equation 12 of the paper with one of the two pairs (beta_bar, rho)."""
    end, auxiliary = problem.end_task_weight, 1 - problem.end_task_weight
    if branch == "smoothness":
        return _bound(problem, branch, end * problem.smooth_end + auxiliary * problem.smooth_auxiliary, 0.0)
    smoothest = min(problem.smooth_end, problem.smooth_auxiliary)
    both = ((end, problem.smooth_end), (auxiliary, problem.smooth_auxiliary))
    found = (
        _bound(problem, branch, drawn * smoothest, (1 - drawn) * (problem.dissimilarity + 2 * problem.lipschitz))
        for drawn, smooth in both
        if smooth == smoothest
    )
    return min(found, key=lambda bound: bound.value)


def _bound(problem: Problem, branch: Branch, beta_bar: float, rho: float) -> Bound:
    q = problem.step_size * beta_bar
    if q == 0:  # the smoother function is never drawn
        return Bound(float("inf"), branch, beta_bar, rho)
    spread = 2 * problem.gamma * problem.lipschitz / (problem.examples - problem.gamma) + rho
    scale = (problem.lipschitz * problem.step_size * spread) ** (1 / (q + 1))
    growth = (problem.gamma * problem.steps / problem.examples) ** (q / (q + 1))
    return Bound((1 + 1 / q) * scale * growth, branch, beta_bar, rho)


def generalisation_bound(problem: Problem) -> Bound:
    """Return the smaller bound of the two branches (Theorem E.5)."""
    found = (bound_of(problem, "dissimilarity"), bound_of(problem, "smoothness"))
    return min(found, key=lambda bound: bound.value)


def default_ranges(problem: Problem) -> tuple[list[float], list[float]]:
    """Return values of Delta and N' for a plot: Delta from 0 to max(2L, its value), N' from N_e to 100 N_e."""
    largest = max(2 * problem.lipschitz, problem.dissimilarity)
    deltas = [largest * step / 40 for step in range(41)]
    sizes = [problem.examples_end * 10 ** (step / 20) for step in range(41)]
    return deltas, sizes


def plot_bound(problem: Problem, dissimilarities: Sequence[float], sizes: Sequence[float], path: Path) -> None:
    """Plot the bound as a function of Delta and of N', with all other quantities as in `problem`.

    Only the number of auxiliary examples changes with N'. With a fixed lambda_e they do not lower the bound (appendix
    F.1, point 2: gamma / N' = lambda_e / N_e is constant), so another curve uses lambda_e = N_e / N'.

    Args:
        problem: The quantities of the theorem.
        dissimilarities: Values of Delta.
        sizes: Values of N', each at least N_e.
        path: Output file; its suffix gives the format.

    Raises:
        UserError: if matplotlib is missing, or if the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("--plot needs matplotlib: pip install 'aang-ray[figures]'") from error

    if not path.suffix:
        raise UserError(f"{path}: cannot be written as a picture: give it an ending such as .png")
    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    by_delta = [replace(problem, dissimilarity=value) for value in dissimilarities]
    _curves(left, dissimilarities, by_delta, "dissimilarity Δ")
    grown = [replace(problem, examples_auxiliary=size - problem.examples_end) for size in sizes]
    _curves(right, sizes, grown, "all examples N′")
    shares = [replace(one, end_task_weight=one.examples_end / one.examples) for one in grown]
    right.plot(sizes, [generalisation_bound(one).value for one in shares], "--", label="tighter, with λₑ = Nₑ/N′")
    right.set_xscale("log")
    for axes in (left, right):
        axes.set_yscale("log")
        axes.axhline(1, color="grey", linewidth=0.8, label="1 or more says nothing")
        axes.set_ylabel("bound on the generalisation error")
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be written as a picture ({str(error).splitlines()[0]})") from error


def _curves(axes: Axes, values: Sequence[float], problems: Sequence[Problem], label: str) -> None:
    axes.plot(values, [bound_of(problem, "dissimilarity").value for problem in problems], label="with Δ")
    axes.plot(values, [bound_of(problem, "smoothness").value for problem in problems], label="without Δ")
    axes.set_xlabel(label)
