"""The methods that TorchJD computes, apart from the others: with it comes cvxpy, which takes seconds to import."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torchjd import aggregation, scalarization

from aang_ray.config.methods import (
    AggregationConfig,
    AlignedMtlConfig,
    CagradConfig,
    DualProjConfig,
    DwaConfig,
    GraddropConfig,
    GramSection,
    ImtlGConfig,
    MgdaConfig,
    NashMtlConfig,
    PcgradConfig,
    Preference,
    RandomConfig,
    ScalarizationConfig,
    UncertaintyConfig,
    UpgradConfig,
)
from aang_ray.errors import RunFailure
from aang_ray.gradients.engine import Request, StepGradients
from aang_ray.gradients.products import products
from aang_ray.methods.base import Method, Sampled, Unlearned, Weighting, labelled, positions, seeded, weight_row
from aang_ray.objectives.source import FIRST_OBJECTIVE
from aang_ray.store.schema import WeightRow

# --- methods.gram_weights: TorchJD's weightings by the names of the configuration.


def gram_weights(config: GramSection, gram_mm: Tensor) -> Tensor:
    """Weights [m] of the gradients in the update, from their Gram matrix in host memory, not all 0; a lone one's is 1.

    TorchJD has absolute thresholds (1e-4 on the squared Frobenius norm, 1e-12 on sums), so it is given the Gram
    matrix over its trace t, that of the gradients over sqrt t. The weights are the same; Nash-MTL's, whose update has
    the same length for gradients of any scale, are divided by sqrt t. It computes in fp64: roots of the eigenvalues of
    an fp32 matrix would lose gradients that are 1e-4 of the others' length.
    """
    if len(gram_mm) == 1:
        return torch.ones_like(gram_mm[0])
    trace = gram_mm.trace()
    relative_mm = (gram_mm / trace).double()
    match config:
        case PcgradConfig():
            weighting = aggregation.PCGradWeighting()
        case MgdaConfig():
            weighting = aggregation.MGDAWeighting(config.epsilon, config.max_iters)
        case CagradConfig(c=0.0):
            weighting = aggregation.MeanWeighting()
        case CagradConfig():
            # Its own 1e-4 takes gradients for stationary, and stops, where one is that much shorter than the others.
            weighting = aggregation.CAGradWeighting(config.c, norm_eps=1e-6)
        case ImtlGConfig():
            weighting = aggregation.IMTLGWeighting()
        case AlignedMtlConfig():
            weighting = aggregation.AlignedMTLWeighting(preference(config.preference, relative_mm), config.scale_mode)
        case UpgradConfig():
            weighting = aggregation.UPGradWeighting(preference(config.preference, relative_mm))
        case DualProjConfig():
            weighting = aggregation.DualProjWeighting(preference(config.preference, relative_mm))
        case NashMtlConfig():
            nash_m: Tensor = nash_mtl(config, len(gram_mm)).weighting(square_root(relative_mm))
            return nash_m.to(gram_mm.dtype) / trace.sqrt()
        case _:
            raise TypeError(f"{type(config).__name__} names no weighting")
    weights_m: Tensor = weighting(relative_mm)
    return weights_m.to(gram_mm.dtype)


def nash_mtl(config: NashMtlConfig, rows: int) -> aggregation.NashMTL:
    """TorchJD's, new at every step: the solver's last solution would belong to other objectives."""
    # TorchJD builds its problem anew for every such object, and cvxpy would say that this is slow (some 60 ms).
    warnings.filterwarnings("ignore", message="You are solving a parameterized problem", category=UserWarning)
    return aggregation.NashMTL(rows, config.max_norm, update_weights_every=1, optim_niter=config.optim_niter)


def preference(kind: Preference, like: Tensor) -> Tensor | None:
    """Weights to start from, [m]; None is TorchJD's 1/m."""
    if kind == "uniform":
        return None
    others = len(like) - 1
    return torch.tensor([0.5] + [0.5 / others] * others, dtype=like.dtype, device=like.device)


def square_root(gram_mm: Tensor) -> Tensor:
    """A matrix [m, m] whose rows have this Gram matrix: to what depends on norms and angles alone, the gradients."""
    values_m, vectors_mm = torch.linalg.eigh(gram_mm)
    root_mm: Tensor = vectors_mm * values_m.clamp_min(0).sqrt()
    return root_mm


# --- methods.aggregation: The body's update as an aggregation of the rows of the Jacobian: g_E and the objectives' gradients.


class GramAggregation(Unlearned):
    """d = sum_i alpha_i g_i over the end task and the sampled objectives, alpha from their Gram matrix.

    The weights come from TorchJD (`gram_weights`), which computes on the host: each step waits for the device once.
    Objectives without labels at a step are left out. Heads get the coefficients of static multitask: a head belongs to
    one loss, or to losses of one kind. Holds n + 2 body-sized vectors.
    """

    whole_gradients = True

    def __init__(self, static: Weighting, config: GramSection, seed: int) -> None:
        super().__init__(static)
        self._config, self._seed = config, seed
        self._weights_m: Tensor | None = None
        """alpha of the last step."""

    def request(self, sampled: Sampled) -> Request:
        return Request(self.static.coefficients(sampled), separate=True)

    def direction(self, sampled: Sampled, gradients: StepGradients) -> Tensor:
        """The aggregation, [P].

        Raises:
            RunFailure: for a gradient that is not finite.
        """
        separate_SP = gradients.separate_SP
        if separate_SP is None:
            raise ValueError("an aggregation needs the separate gradients")
        gram_SS = products(separate_SP, separate_SP).cpu()
        self._check(sampled, gram_SS)
        rows = [1, *(FIRST_OBJECTIVE + i for i, count in enumerate(sampled.labels) if count > 0)]
        gram_mm = gram_SS[rows][:, rows]
        weights_S = torch.zeros(len(gram_SS), dtype=gram_SS.dtype)
        if gram_mm.trace() > 0:  # without a gradient there is no update
            with seeded(self._seed, sampled.step, gram_mm.device):
                weights_S[rows] = gram_weights(self._config, gram_mm).to(weights_S.dtype)
        self._weights_m = weights_S[1:]
        return weights_S.to(separate_SP) @ separate_SP

    def describe(self, sampled: Sampled) -> WeightRow | None:
        return None if self._weights_m is None else weight_row(sampled, self.names, self._weights_m)

    def _check(self, sampled: Sampled, gram_SS: Tensor) -> None:
        finite = gram_SS.diagonal().isfinite().tolist()
        if all(finite):
            return
        objective = finite.index(False) - FIRST_OBJECTIVE
        name = "the end task" if objective < 0 else self.names[sampled.objectives[objective]]
        raise RunFailure(
            f"step {sampled.step + 1}: the gradient of {name} is not finite; lower optim.body_lr or optim.head_lr, "
            "or set precision=fp32"
        )


# --- methods.scalarization: Weights of the losses by TorchJD's scalarizations.
#
# A scalarization is a function of the losses L_i of the end task and the sampled objectives. The coefficient of L_i in
# the update, of body and heads alike, is the derivative by L_i: one plain backward pass does, and nothing waits.


class Scalarization(Unlearned, ABC):
    """Base of the methods that are one: `weights` is what they differ in."""

    @abstractmethod
    def weights(self, sampled: Sampled) -> Tensor:
        """Coefficients of the end task and the sampled objectives, [m]."""

    def request(self, sampled: Sampled) -> Request:
        weights_m = self.weights(sampled)
        return Request(torch.cat((weights_m.new_zeros(1), weights_m)))

    def describe(self, sampled: Sampled) -> WeightRow:
        return weight_row(sampled, self.names, self.weights(sampled))


class RandomWeights(Scalarization):
    """Softmax of standard normal numbers, drawn anew at every step as a function of (seed, step).

    (Lin et al. 2022, Algorithm 2)
    """

    def __init__(self, static: Weighting, seed: int) -> None:
        super().__init__(static)
        self._seed = seed

    def weights(self, sampled: Sampled) -> Tensor:
        like = self.static.flat_F
        with seeded(self._seed, sampled.step, like.device):
            return derivative(scalarization.Random(), like.new_zeros(1 + len(sampled.objectives)))


def derivative(scalarizer: scalarization.Scalarizer, losses_m: Tensor) -> Tensor:
    """Derivative of a scalarizer by the losses, [m]."""
    with torch.enable_grad():
        leaf_m = losses_m.detach().clone().requires_grad_()
        weights_m: Tensor = torch.autograd.grad(scalarizer(leaf_m), leaf_m)[0]
    return weights_m


# --- methods.graddrop: GradDrop: in every coordinate of the body one sign survives. (Chen et al. 2020, Algorithm 1)


class GradDrop(Unlearned):
    """d_p = the sum of the gradients that have in coordinate p the sign that was drawn for p.

    Positive with probability 1/2 (1 + sum_i g_ip / sum_i |g_ip|). TorchJD computes it on the separate gradients,
    without waiting for the device; the draw is a function of (seed, step). The share `end_task_leak` of g_E always
    passes. Heads get the coefficients of static multitask. Holds n + 2 body-sized vectors.
    """

    whole_gradients = True

    def __init__(self, static: Weighting, config: GraddropConfig, seed: int) -> None:
        super().__init__(static)
        self._end_task_leak, self._seed = config.end_task_leak, seed

    def request(self, sampled: Sampled) -> Request:
        return Request(self.static.coefficients(sampled), separate=True)

    def direction(self, sampled: Sampled, gradients: StepGradients) -> Tensor:
        if gradients.separate_SP is None:
            raise ValueError("GradDrop needs the separate gradients")
        rows_mP = gradients.separate_SP[1:]
        leak_m = rows_mP.new_zeros(len(rows_mP))
        leak_m[0] = self._end_task_leak
        with seeded(self._seed, sampled.step, rows_mP.device):
            direction_P: Tensor = aggregation.GradDrop(leak=leak_m)(rows_mP)
        return direction_P

    def describe(self, sampled: Sampled) -> None:
        """No gradient has one weight."""


# --- methods.dwa: Dynamic weight average: what falls more slowly weighs more. (Liu, Johns and Davison 2019)


class DynamicWeightAverage(Scalarization):
    """w = softmax(r / T) with r_i = (mean L_i of the last epoch) / (of the epoch before), computed by TorchJD.

    The source multiplies by the number of losses; here weights sum to 1. An epoch is `epoch_steps` steps. An objective
    counts in the epochs in which it was sampled; until there are two of them r_i = 1.
    """

    def __init__(self, static: Weighting, config: DwaConfig) -> None:
        super().__init__(static)
        self._config = config
        losses = 1 + len(self.names)
        self._sums_2K = static.flat_F.new_zeros(2, losses)
        """Sum and number of the losses of the epoch at hand: the end task's, then every objective's."""
        self._epochs_3K = static.flat_F.new_zeros(3, losses)
        """Mean losses of the two latest epochs, the older one first, and how many epochs there were."""
        self._steps = 0

    def weights(self, sampled: Sampled) -> Tensor:
        older_m, newer_m, epochs_m = self._epochs_3K[:, positions(sampled, self._epochs_3K)]
        known_m = (epochs_m >= 2) & (older_m > 0)
        scalarizer = scalarization.DWA(self._config.temperature)
        for means_m in (older_m, newer_m):
            scalarizer(torch.where(known_m, means_m, 1.0))
            scalarizer.step()
        return derivative(scalarizer, older_m) / len(older_m)

    def observe(self, sampled: Sampled, gradients: StepGradients) -> None:
        losses_m = gradients.losses_S[1:].to(self._sums_2K.dtype)
        counted_m = labelled(sampled, losses_m)
        added_2m = torch.stack((torch.where(counted_m, losses_m, 0.0), counted_m.to(losses_m.dtype)))
        self._sums_2K.index_add_(1, positions(sampled, losses_m), added_2m)
        self._steps += 1
        if self._steps % self._config.epoch_steps == 0:
            self._end_epoch()

    def state_dict(self) -> dict[str, Any]:
        return {
            "sums": self._sums_2K.clone().cpu(),
            "epochs": self._epochs_3K.clone().cpu(),
            "steps": self._steps,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._sums_2K.copy_(state["sums"])
        self._epochs_3K.copy_(state["epochs"])
        self._steps = int(state["steps"])

    def _end_epoch(self) -> None:
        total_K, count_K = self._sums_2K
        _, newer_K, epochs_K = self._epochs_3K
        rolled_3K = torch.stack((newer_K, total_K / count_K.clamp_min(1), epochs_K + 1))
        self._epochs_3K = torch.where(count_K > 0, rolled_3K, self._epochs_3K)
        self._sums_2K.zero_()


# --- methods.uncertainty: Uncertainty weighting: a learned log-variance for each loss. (Kendall et al. 2018)


class Uncertainty(Scalarization):
    """L = sum_i (1/2 exp(-s_i) L_i + 1/2 s_i), computed by TorchJD; s by plain SGD with rate `lr`.

    s starts at 0, so every weight at 1/2: weights do not sum to 1. What is not sampled, or has no labels, keeps its s.
    """

    def __init__(self, static: Weighting, lr: float) -> None:
        super().__init__(static)
        self._lr = lr
        self._log_variances_K = static.flat_F.new_zeros(1 + len(self.names))
        """Of the end task, then of every objective of the space."""

    def weights(self, sampled: Sampled) -> Tensor:
        scalarizer = self._scalarizer(sampled)
        return derivative(scalarizer, scalarizer.log_var)

    def observe(self, sampled: Sampled, gradients: StepGradients) -> None:
        scalarizer = self._scalarizer(sampled)
        with torch.enable_grad():
            loss = scalarizer(gradients.losses_S[1:].to(self._log_variances_K.dtype))
            (gradient_m,) = torch.autograd.grad(loss, scalarizer.log_var)
        gradient_m = torch.where(labelled(sampled, gradient_m), gradient_m, 0.0)
        self._log_variances_K.index_add_(0, positions(sampled, gradient_m), gradient_m, alpha=-self._lr)

    def state_dict(self) -> dict[str, Any]:
        return {"log_variances": self._log_variances_K.clone().cpu()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._log_variances_K.copy_(state["log_variances"])

    def _scalarizer(self, sampled: Sampled) -> scalarization.UW:
        """TorchJD's, over the losses of one step."""
        selected_m = self._log_variances_K[positions(sampled, self._log_variances_K)]
        scalarizer = scalarization.UW(len(selected_m)).to(selected_m)
        scalarizer.log_var.data.copy_(selected_m)
        return scalarizer


def make_torchjd_method(config: AggregationConfig | ScalarizationConfig, weighting: Weighting, seed: int) -> Method:
    """The method that a configuration names; `weighting` holds static multitask's weights."""
    match config:
        case GramSection():
            return GramAggregation(weighting, config, seed)
        case GraddropConfig():
            return GradDrop(weighting, config, seed)
        case RandomConfig():
            return RandomWeights(weighting, seed)
        case UncertaintyConfig():
            return Uncertainty(weighting, config.lr)
        case DwaConfig():
            return DynamicWeightAverage(weighting, config)
