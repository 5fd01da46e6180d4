"""Aggregations of the separate gradients that TorchJD computes. (docs/methods/aggregations.md)

Most are entries of `GRAM_WEIGHTS` (weights of the gradients from their Gram matrix) or `COORDINATEWISE`. Four have a
state, with entries for the end task and the whole space, [1 + K], because objectives change from step to step. Entries
of losses that are not sampled or have no labels do not change.

TorchJD's solvers take seconds to import, so this file is imported only when a run uses it.
"""

from __future__ import annotations

import re
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torchjd import aggregation

from aang_ray.config import methods as settings
from aang_ray.errors import RunFailure, UserError
from aang_ray.gradients.engine import StepGradients, check_memory
from aang_ray.gradients.products import products
from aang_ray.methods.base import Sampled, seeded
from aang_ray.methods.plain import SeparateGradients
from aang_ray.objectives.source import END_TASK, FIRST_OBJECTIVE

# 1. Weights from the Gram matrix. Each function takes the method's settings, the Gram matrix over its trace in fp64,
# [m, m] with the end task first, and the trace; it returns the weights, [m].


def preference(kind: settings.Preference, like: Tensor) -> Tensor | None:
    """Return the preference weights, [m]; None selects TorchJD's equal weights."""
    if kind == "uniform":
        return None
    others = len(like) - 1
    return torch.tensor([0.5] + [0.5 / others] * others, dtype=like.dtype, device=like.device)


def cagrad(config: settings.CagradConfig, gram_mm: Tensor, trace: Tensor) -> Tensor:
    """CAGrad; the mean with c = 0, which TorchJD's solver does not reach at stationary points."""
    if config.c == 0:
        return cast(Tensor, aggregation.MeanWeighting()(gram_mm))
    # With TorchJD's default of 1e-4, the solver stops if one gradient is shorter than the others by that factor.
    return cast(Tensor, aggregation.CAGradWeighting(config.c, norm_eps=1e-6)(gram_mm))


def nash_mtl(config: settings.NashMtlConfig, gram_mm: Tensor, trace: Tensor) -> Tensor:
    """Nash-MTL. Its update has the same length for gradients of any scale, so the weights are divided by sqrt(trace).

    The TorchJD object is new at every step: the solver's last solution would belong to other objectives.
    """
    # cvxpy would warn that TorchJD builds its problem anew for every such object (some 60 ms).
    warnings.filterwarnings("ignore", message="You are solving a parameterized problem", category=UserWarning)
    solver = aggregation.NashMTL(len(gram_mm), config.max_norm, update_weights_every=1, optim_niter=config.optim_niter)
    weights_m: Tensor = solver.weighting(square_root(gram_mm))
    return weights_m.to(trace.dtype) / trace.sqrt()


def square_root(gram_mm: Tensor) -> Tensor:
    """Return a matrix [m, m] whose rows have this Gram matrix, for methods that depend only on norms and angles."""
    values_m, vectors_mm = torch.linalg.eigh(gram_mm)
    root_mm: Tensor = vectors_mm * values_m.clamp_min(0).sqrt()
    return root_mm


def fairgrad(config: settings.FairgradConfig, gram_mm: Tensor, trace: Tensor) -> Tensor:
    """FairGrad: G w = w^(-1/alpha), so that weights for G / t must be multiplied by t^(-alpha / (1 + alpha))."""
    weights_m: Tensor = aggregation.FairGradWeighting(config.alpha, config.max_iters)(gram_mm)
    return weights_m * trace.double() ** (-config.alpha / (1 + config.alpha))


def config_(config: Any, gram_mm: Tensor, trace: Tensor) -> Tensor:
    """ConFIG, on rows that have this Gram matrix; the weights are those that make its update of the rows.

    Directly on 10^7 entries in fp32, the pseudo-inverse's tolerance would take all gradients for 0. Here the rank is
    decided on their cosines, with a tolerance from the precision of the Gram matrix, so that short gradients count.
    """
    lengths_m = gram_mm.diagonal().sqrt()
    inverse_m = torch.where(lengths_m > 0, 1 / lengths_m, 0.0)
    values_m, vectors_mm = torch.linalg.eigh(inverse_m[:, None] * gram_mm * inverse_m)
    tolerance = 8 * len(gram_mm) * torch.finfo(trace.dtype).eps * values_m[-1]
    units_mm = vectors_mm * torch.where(values_m > tolerance, values_m, 0.0).sqrt() * (lengths_m > 0)[:, None]
    root_mm = lengths_m[:, None] * units_mm
    update_m = aggregation.ConFIG(preference(config.preference, gram_mm))(root_mm)
    # update = root^T w, with w = inverse_m * (weights of the unit rows), which is well conditioned.
    unit_weights_m: Tensor = torch.linalg.pinv(units_mm.t(), rtol=tolerance.sqrt()) @ update_m
    return inverse_m * unit_weights_m


def krum(config: settings.KrumConfig, gram_mm: Tensor, trace: Tensor) -> Tensor:
    """Multi-Krum; the mean if there are too few gradients to detect outliers."""
    rows = len(gram_mm)
    if rows < config.n_byzantine + 3:
        return cast(Tensor, aggregation.MeanWeighting()(gram_mm))
    return cast(Tensor, aggregation.KrumWeighting(config.n_byzantine, min(config.n_selected, rows))(gram_mm))


GRAM_WEIGHTS: Mapping[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "pcgrad": lambda c, gram_mm, _: aggregation.PCGradWeighting()(gram_mm),
    "mgda": lambda c, gram_mm, _: aggregation.MGDAWeighting(c.epsilon, c.max_iters)(gram_mm),
    "cagrad": cagrad,
    "nash_mtl": nash_mtl,
    "fairgrad": fairgrad,
    "imtl_g": lambda c, gram_mm, _: aggregation.IMTLGWeighting()(gram_mm),
    "aligned_mtl": lambda c, gram_mm, _: aggregation.AlignedMTLWeighting(
        preference(c.preference, gram_mm), c.scale_mode
    )(gram_mm),
    "config": config_,
    "upgrad": lambda c, gram_mm, _: aggregation.UPGradWeighting(preference(c.preference, gram_mm))(gram_mm),
    "dualproj": lambda c, gram_mm, _: aggregation.DualProjWeighting(preference(c.preference, gram_mm))(gram_mm),
    "krum": krum,
}


# 2. Updates that are weighted sums of the separate gradients.


class Aggregation(SeparateGradients):
    """d = sum_i alpha_i g_i over the end task and the sampled objectives with labels; subclasses compute alpha."""

    def combined(self, sampled: Sampled, gradients: StepGradients, separate_SP: Tensor) -> Tensor:
        rows = [END_TASK, *(FIRST_OBJECTIVE + i for i, count in enumerate(sampled.labels) if count > 0)]
        weights_S = self.weights(sampled, gradients, separate_SP, rows)
        self._weights_m = weights_S[END_TASK:]
        return weights_S.to(separate_SP) @ separate_SP

    @abstractmethod
    def weights(self, sampled: Sampled, gradients: StepGradients, separate_SP: Tensor, rows: list[int]) -> Tensor:
        """Return alpha, [S]. It is 0 for dev and all segments that are not in `rows`, the segments with labels."""


def places(sampled: Sampled, rows: Sequence[int], like: Tensor) -> Tensor:
    """Return the indices of segments in vectors over end task and space, int64, on the device of `like`."""
    found = [0 if row == END_TASK else 1 + sampled.objectives[row - FIRST_OBJECTIVE] for row in rows]
    return torch.tensor(found, device=like.device)


@contextmanager
def named_solvers(method: str) -> Iterator[None]:
    """Replace TorchJD's error about missing solvers by a `UserError` that names the extra to install."""
    try:
        yield
    except ImportError as error:
        packages = ", ".join(re.findall(r"'([\w-]+)'", str(error).partition(". ")[0])) or str(error.name)
        raise UserError(
            f"method.name: {method} needs {packages}, not installed here; run: pip install 'aang-ray[solvers]'"
        ) from error


class GramAggregation(Aggregation):
    """Weights from the Gram matrix, by `GRAM_WEIGHTS`. TorchJD computes on the host, so each step waits for the device.

    TorchJD has absolute thresholds, so it gets the Gram matrix divided by its trace; in fp64, because fp32 eigenvalues
    would not resolve gradients 1e-4 times as long as the others.
    """

    def weights(self, sampled: Sampled, gradients: StepGradients, separate_SP: Tensor, rows: list[int]) -> Tensor:
        gram_SS = products(separate_SP, separate_SP).cpu()
        self._check(sampled, gram_SS)
        gram_mm = gram_SS[rows][:, rows]
        weights_S = torch.zeros(len(gram_SS), dtype=gram_SS.dtype)
        if len(rows) == 1 and gram_mm.trace() > 0:  # a lone gradient is the update
            weights_S[rows] = 1.0
        elif gram_mm.trace() > 0:  # without a gradient there is no update
            with seeded(self.seed, sampled.step, gram_mm.device), named_solvers(self.config.name):
                weights_S[rows] = self.from_gram(gram_mm, places(sampled, rows, gram_mm)).to(weights_S.dtype)
        return weights_S

    def from_gram(self, gram_mm: Tensor, places_m: Tensor) -> Tensor:
        """Return alpha, [m], from the Gram matrix of m >= 2 gradients that are not all 0. Subclasses override it."""
        return gram_weights(self.config.name, self.config, gram_mm)

    def _check(self, sampled: Sampled, gram_SS: Tensor) -> None:
        finite = gram_SS.diagonal().isfinite().tolist()
        if all(finite):
            return
        objective = finite.index(False) - FIRST_OBJECTIVE
        name = "the end task" if objective < 0 else self.names[sampled.objectives[objective]]
        raise RunFailure(
            f"step {sampled.step + 1}: the gradient of {name} is not finite; lower optim.body_lr or optim.head_lr, "
            "or set precision=fp32 if it is another"
        )


def gram_weights(name: str, config: Any, gram_mm: Tensor) -> Tensor:
    """Return the weights of a method of `GRAM_WEIGHTS`, [m], in the type of the Gram matrix."""
    trace = gram_mm.trace()
    return GRAM_WEIGHTS[name](config, (gram_mm / trace).double(), trace).to(gram_mm.dtype)


class GradVac(GramAggregation):
    """GradVac; the averages of cosines are kept for all pairs of losses. The order is drawn from (seed, step)."""

    config: settings.GradvacConfig

    def initial_state(self) -> dict[str, Tensor]:
        return {"cosines": torch.zeros(self.losses, self.losses, dtype=torch.float64)}  # row i: turns of gradient i

    def from_gram(self, gram_mm: Tensor, places_m: Tensor) -> Tensor:
        grid = (places_m[:, None], places_m)
        weighting = aggregation.GradVacWeighting(self.config.beta)
        # TorchJD has no public way to set its state.
        weighting._phi_t, weighting._state_key = self.state["cosines"][grid], (len(gram_mm), torch.float64)
        weights_m: Tensor = weighting((gram_mm / gram_mm.trace()).double())
        self.state["cosines"][grid] = weighting._phi_t
        return weights_m


class PriorityConstrainedDescent(GramAggregation):
    """PCD; the averages of squared norms are kept for every loss. The end task is the primary objective.

    The average of a loss that is sampled for the first time starts at its current squared norm, so TorchJD's eps is 0.
    """

    config: settings.PcdConfig

    def initial_state(self) -> dict[str, Tensor]:
        # Averages of ||g||^2, corrected for their start at 0, and the number of steps that are in them.
        return {"squares": torch.zeros(self.losses, dtype=torch.float64), "steps": torch.tensor(0)}

    def from_gram(self, gram_mm: Tensor, places_m: Tensor) -> Tensor:
        squares_K, steps, beta = self.state["squares"], self.state["steps"], self.config.beta
        known_m, squares_m = squares_K[places_m], gram_mm.diagonal().double()
        weighting = aggregation.PCDWeighting(self.config.tau, beta, eps=0.0)
        # TorchJD has no public way to set its state: the averages before their correction.
        weighting._sq_norm_ema = torch.where(known_m > 0, known_m, squares_m) * (1 - beta ** int(steps))
        weighting._n_steps, weighting._state_key = steps.clone(), len(gram_mm)
        weights_m: Tensor = weighting(gram_mm)
        steps += 1
        squares_K[places_m] = weighting._sq_norm_ema / (1 - beta ** int(steps))
        return weights_m


class CrMogm(GramAggregation):
    """CR-MOGM: alpha <- a alpha + (1 - a) (weights of another aggregation); the first weights are taken as they are."""

    config: settings.CrMogmConfig

    def initial_state(self) -> dict[str, Tensor]:
        return {"averages": torch.full((self.losses,), torch.nan, dtype=torch.float64)}  # nan until it has been sampled

    def from_gram(self, gram_mm: Tensor, places_m: Tensor) -> Tensor:
        averages_K, name = self.state["averages"], self.config.weighting
        found_m = gram_weights(name, settings.method_sections()[name](), gram_mm.double())
        before_m = torch.where(averages_K[places_m].isnan(), found_m, averages_K[places_m])
        smooth = aggregation.CRMOGMWeighting(aggregation.ConstantWeighting(found_m), self.config.alpha, before_m)
        averages_K[places_m] = smooth(gram_mm)
        return averages_K[places_m]


class ExcessMtl(Aggregation):
    """ExcessMTL: alpha_i <- alpha_i exp(eta e_i / e_i(0)), normalised, with the excess risks e_i = sum_p g_ip^2 / h_ip.

    h_ip = sqrt(sum over steps of g_ip^2 + 1e-7), with gradients relative to the root mean square of the first one's
    entries. e_i(0) is the mean over the first `warmup_steps` samples of a loss, whose weight does not move meanwhile.
    Stores K + 1 more body-sized vectors, also in checkpoints. TorchJD has one warm-up for all losses together; if every
    step has all objectives, both give the same result.
    """

    config: settings.ExcessMtlConfig
    _squares_KP: Tensor | None = None
    """Sums of squared gradients; None before the first step."""

    def initial_state(self) -> dict[str, Tensor]:
        zeros_K = self.weighting.flat_F.new_zeros(self.losses, dtype=torch.float64)
        return {
            "log_weights": zeros_K.clone(),
            "excess": zeros_K.clone(),  # sums over the warm-up
            "samples": zeros_K.clone(),
            "unit": zeros_K.new_zeros(()),  # root mean square of the first gradients' entries
        }

    def weights(self, sampled: Sampled, gradients: StepGradients, separate_SP: Tensor, rows: list[int]) -> Tensor:
        weights_S = separate_SP.new_zeros(len(separate_SP), dtype=torch.float64)
        if len(rows) == 1:
            weights_S[rows] = 1.0
            return weights_S
        places_m, state = places(sampled, rows, separate_SP), self.state
        excess_m = torch.stack(
            [self._excess(separate_SP[row], int(at)) for row, at in zip(rows, places_m, strict=True)]
        )
        warming_m = state["samples"][places_m] < self.config.warmup_steps
        state["excess"][places_m] += torch.where(warming_m, excess_m, 0.0)
        state["samples"][places_m] += 1
        initial_m = state["excess"][places_m] / self.config.warmup_steps
        before_m = state["log_weights"][places_m]
        after_m = before_m + self.config.robust_step_size * excess_m / (initial_m + 1e-7)
        sums = [torch.where(warming_m, -torch.inf, log_m).logsumexp(0) for log_m in (before_m, after_m)]
        state["log_weights"][places_m] = torch.where(warming_m, before_m, after_m + sums[0] - sums[1])
        weights_S[rows] = torch.softmax(state["log_weights"][places_m], dim=0)
        return weights_S

    def _excess(self, gradient_P: Tensor, place: int) -> Tensor:
        """Return e of one loss, a scalar in fp64, and update the loss's sums of squares."""
        if self._squares_KP is None:
            check_memory([nn.Parameter(gradient_P, requires_grad=False)], self.losses, "the size of the space")
            self._squares_KP = gradient_P.new_zeros(self.losses, len(gradient_P))
        unit = self.state["unit"]
        unit.copy_(torch.where(unit > 0, unit, gradient_P.double().square().mean().sqrt()))
        squares_P = (gradient_P / torch.where(unit > 0, unit, 1.0).to(gradient_P.dtype)).square()
        self._squares_KP[place] += squares_P
        return (squares_P / (self._squares_KP[place] + 1e-7).sqrt()).sum(dtype=torch.float64)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "squares": None if self._squares_KP is None else self._squares_KP.clone().cpu()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        squares_KP = state["squares"]
        self._squares_KP = None if squares_KP is None else squares_KP.to(self.weighting.flat_F.device)


# 3. Updates from the gradients' coordinates, in which no gradient has one weight.

COLUMNS = 2**20
"""Number of coordinates that are sorted at once."""


def graddrop(config: settings.GraddropConfig, rows_mP: Tensor, counted: list[int]) -> Tensor:
    """In each coordinate the sum of the gradients that have the sign that was drawn for it. (Chen et al. 2020)

    Positive with probability 1/2 (1 + sum_i g_ip / sum_i |g_ip|); the share `end_task_leak` of g_E always passes.
    """
    leak_m = rows_mP.new_zeros(len(rows_mP))
    leak_m[0] = config.end_task_leak
    return cast(Tensor, aggregation.GradDrop(leak=leak_m)(rows_mP))


def trimmed_mean(config: settings.TrimmedMeanConfig, rows_mP: Tensor, counted: list[int]) -> Tensor:
    """In each coordinate the mean without the largest and the smallest values, of losses with labels."""
    trim = aggregation.TrimmedMean(min(config.trim_number, (len(counted) - 1) // 2))
    return torch.cat([trim(columns_mC[counted]) for columns_mC in torch.split(rows_mP, COLUMNS, dim=1)])


COORDINATEWISE: Mapping[str, Callable[[Any, Tensor, list[int]], Tensor]] = {
    "graddrop": graddrop,
    "trimmed_mean": trimmed_mean,
}
"""Functions that return the update, [P], from settings, separate gradients [m, P], and the rows with labels."""


class Coordinatewise(SeparateGradients):
    """Aggregations of `COORDINATEWISE`. Nothing waits for the device, and draws are a function of (seed, step)."""

    def combined(self, sampled: Sampled, gradients: StepGradients, separate_SP: Tensor) -> Tensor:
        rows_mP = separate_SP[END_TASK:]
        counted = [0, *(1 + i for i, count in enumerate(sampled.labels) if count > 0)]
        with seeded(self.seed, sampled.step, rows_mP.device):
            return COORDINATEWISE[self.config.name](self.config, rows_mP, counted)
