"""AANG: learn the weights of the objectives and of the end task from the agreement of gradients with dev.

This is Algorithm 1 of Dery et al. 2023; with a space of one objective it is META-TARTAN (Dery et al. 2022). Equations
and switches: docs/semantics.md, sections 1 and 3.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from aang_ray.config.methods import AangConfig
from aang_ray.config.run import RunConfig
from aang_ray.errors import UserError
from aang_ray.gradients.engine import Request, StepGradients
from aang_ray.gradients.products import inner
from aang_ray.gradients.statistics import cosine
from aang_ray.methods.base import Method, Sampled, labelled, like_device, named_weights
from aang_ray.objectives.source import DEV, FIRST_OBJECTIVE
from aang_ray.objectives.space import Space
from aang_ray.store.schema import WeightRow

# 1. Factors: z_k = A_k + D_d + T_t + R_r + O_o for the objective k = (d, t, r, o).

LETTERS = ("A", "D", "T", "R", "O")


@dataclass(frozen=True)
class FactorIndex:
    """The entries of a flat vector of factors whose sum is each objective's logit."""

    names: Mapping[str, tuple[str, ...]]
    """Names of the entries by letter, in the order of the flat vector."""
    entries_K5: Tensor
    """For each objective the flat positions of its A, D, T, R and O, int64."""

    @classmethod
    def of(cls, names: Mapping[str, Sequence[str]], stages: Sequence[tuple[str, str, str, str]]) -> FactorIndex:
        """Return the index of a space from the `names` of the entries by letter and each objective's (d, t, r, o)."""
        ordered = {letter: tuple(names[letter]) for letter in LETTERS}
        offsets = dict(zip(LETTERS, np.cumsum([0] + [len(ordered[letter]) for letter in LETTERS])[:-1], strict=True))
        rows = [
            [int(offsets["A"]) + k]
            + [int(offsets[letter]) + ordered[letter].index(name) for letter, name in zip("DTRO", stage, strict=True)]
            for k, stage in enumerate(stages)
        ]
        return cls(ordered, torch.tensor(rows, dtype=torch.int64))

    @property
    def size(self) -> int:
        return sum(len(entries) for entries in self.names.values())


def logits(flat_F: Tensor, entries_n5: Tensor) -> Tensor:
    """Return z of the sampled objectives, [n], from all factors [F] and the sampled objectives' entries [n, 5]."""
    return flat_F[entries_n5].sum(dim=1)


def scatter(gradient_n: Tensor, entries_n5: Tensor, size: int) -> Tensor:
    """Return the gradient of all factors, [size], from that of the logits, [n], summed over those that use a factor."""
    flat_F = torch.zeros(size, dtype=gradient_n.dtype, device=gradient_n.device)
    return flat_F.index_add(0, entries_n5.flatten(), gradient_n[:, None].expand(-1, entries_n5.shape[1]).flatten())


# 2. Weights: w = softmax(z restricted to S), lambda = softmax(a_E, a_X)[E].


@dataclass
class Weighting:
    """Factors and (a_E, a_X) on the device, and the weights that follow from them.

    In `published` allocation an objective's coefficient is (b / B) * softmax_S(A_k + O_o), not renormalised
    (docs/semantics.md, section 2, point 3).
    """

    index: FactorIndex
    flat_F: Tensor
    lambda_logits_2: Tensor
    published: bool

    @classmethod
    def zeros(cls, index: FactorIndex, device: torch.device, published: bool) -> Weighting:
        """Return a weighting whose factors are all 0, so that w = 1/n and lambda = 1/2."""
        moved = FactorIndex(index.names, index.entries_K5.to(device))
        return cls(moved, torch.zeros(index.size, device=device), torch.zeros(2, device=device), published)

    @classmethod
    def initial(cls, config: RunConfig, space: Space | None, device: torch.device) -> Weighting:
        """Return the weighting of a run before its first step: all factors are 0, so that w = 1/n and lambda = 1/2.

        Raises:
            UserError: There is no space of objectives.
        """
        if space is None:
            raise UserError(f"method.name: {config.method.name} needs a space of auxiliary objectives")
        index = FactorIndex.of(space.factors(), [objective.stages for objective in space.objectives])
        return cls.zeros(index, device, config.objectives.allocation == "published")

    def with_lambda(self, weight: float) -> Weighting:
        """Return the same weighting with another weight of the end task, in (0, 1)."""
        logits_2 = self.lambda_logits_2.new_tensor([0.0, math.log(1 / weight - 1)])
        return replace(self, lambda_logits_2=logits_2)

    @property
    def lambda_(self) -> Tensor:
        """Weight of the end task, a scalar."""
        return torch.softmax(self.lambda_logits_2, dim=0)[0]

    def entries(self, sampled: Sampled) -> Tensor:
        """Return the flat positions of the sampled objectives' factors, [n, 5]."""
        return self.index.entries_K5.index_select(0, like_device(sampled.objectives, self.index.entries_K5))

    def weights(self, sampled: Sampled) -> Tensor:
        """Return w of the sampled objectives, [n]."""
        entries_n5 = self.entries(sampled)
        if not self.published:
            return torch.softmax(logits(self.flat_F, entries_n5), dim=0)
        shares_n = like_device(sampled.shares, self.flat_F)
        return shares_n * torch.softmax(logits(self.flat_F, entries_n5[:, ::4]), dim=0)  # columns 0 and 4: A and O

    def coefficients(self, sampled: Sampled) -> Tensor:
        """Return the segments' coefficients (0 for dev, lambda, (1 - lambda) w_1, ..., (1 - lambda) w_n), [2 + n]."""
        lambda_ = self.lambda_.reshape(1)
        return torch.cat((torch.zeros_like(lambda_), lambda_, (1 - lambda_) * self.weights(sampled)))

    def factors(self) -> Mapping[str, npt.NDArray[np.float64]]:
        """Return the factors in host memory, by letter."""
        flat = self.flat_F.double().cpu().numpy()
        ends = np.cumsum([len(self.index.names[letter]) for letter in LETTERS])[:-1]
        return dict(zip(LETTERS, np.split(flat, ends), strict=True))

    def row(self, sampled: Sampled, health: Mapping[str, float]) -> WeightRow:
        """Return the weights at this step for the store, with the given `health` values."""
        factors = {
            letter: dict(zip(self.index.names[letter], (float(v) for v in values), strict=True))
            for letter, values in self.factors().items()
        }
        weights = self.weights(sampled).tolist()
        return WeightRow(
            step=sampled.step + 1,
            end_task_weight=float(self.lambda_),
            weights=named_weights(sampled, self.index.names["A"], weights),
            factors=factors,
            health=dict(health),
        )


# 3. The meta-gradient: how the dev loss after a step changes with the weights of the step.
#
# With theta' = theta - beta d, d = lambda g_E + (1 - lambda) sum_k w_k g_k and v the dev gradient,
#
#     dL_dev/dz_k = -beta (1 - lambda) w_k (s_k - sum_j w_j s_j)
#     dL_dev/da_E = -beta lambda (1 - lambda) (s_E - s_X) = -dL_dev/da_X
#
# with s_k = <v, g_k>, s_E = <v, g_E> and s_X = <v, sum_k w_k g_k>. `jacobian: softmax` is this with beta folded into
# the learning rate. `identity`, as published, drops the Jacobians: dz_k = -s_k, da_E = -s_E, da_X = -s_X. `score:
# cosine` divides each inner product by both norms. (docs/semantics.md, section 3)


@dataclass(frozen=True)
class Scores:
    """Scores of a step's gradients: their cosines or inner products with the dev gradient."""

    objectives_n: Tensor
    end_task: Tensor
    auxiliary: Tensor
    """Score of the joint auxiliary gradient."""


def cosine_scores(dots_S: Tensor, norms2_S: Tensor, joint_norm2: Tensor, joint_dot: Tensor) -> Scores:
    """Return cosines with v, 0 where a norm is 0. `joint_*` are of the joint auxiliary gradient."""
    cosines_S = cosine(dots_S, norms2_S)
    joint = cosine(torch.stack((norms2_S[0], joint_dot)), torch.stack((norms2_S[0], joint_norm2)))[1]
    return Scores(cosines_S[FIRST_OBJECTIVE:], cosines_S[1], joint)


def identity_gradient(scores: Scores) -> tuple[Tensor, Tensor]:
    """Return (dz [n], da [2]) as published."""
    return -scores.objectives_n, -torch.stack((scores.end_task, scores.auxiliary))


def softmax_gradient(scores: Scores, weights_n: Tensor, lambda_: Tensor) -> tuple[Tensor, Tensor]:
    """Return (dz [n], da [2]), differentiated through w = softmax(z) and lambda = softmax(a), divided by beta."""
    centred_n = scores.objectives_n - (weights_n * scores.objectives_n).sum()
    end = -lambda_ * (1 - lambda_) * (scores.end_task - scores.auxiliary)
    return -(1 - lambda_) * weights_n * centred_n, torch.stack((end, -end))


# 4. Evidence: factors that follow the scores of all steps so far, and that noise cannot move far.
#
# At a step in which the factor f is used, x_f is the sum over the sampled objectives that use it of s_k - mean_j s_j:
# what all objectives share says nothing about any of them. Over the steps so far,
#
#     z_f = sum x_f / sqrt(sum x_f^2)
#
# and the factor is f = aux_lr * sign(z_f) max(|z_f| - 1, 0). If x_f is symmetric around 0, given the past, then
# P(|z_f| > u) <= 2 exp(-u^2 / 2) at every step, whatever its scale and its changes of scale (de la Pena 1999). If x_f
# has a mean, z_f grows with the square root of the number of steps. Numbers like |z_f| < 1 are what noise gives most of
# the time, so they count as 0.


ROUNDING = 1e-5
"""Relative size below which a sum of centred scores counts as 0."""


@dataclass
class Evidence:
    """The self-normalised sums z of a stream of numbers, for several quantities at once."""

    sums_F: Tensor
    squares_F: Tensor

    @classmethod
    def none(cls, like_F: Tensor) -> Evidence:
        """Return the evidence before the first step."""
        return cls(torch.zeros_like(like_F), torch.zeros_like(like_F))

    def add(self, values_F: Tensor) -> None:
        """Add the values of a step; 0 for a quantity that the step says nothing about."""
        self.sums_F += values_F
        self.squares_F += values_F.square()

    def state(self, name: str) -> dict[str, Tensor]:
        """Return the sums for a checkpoint."""
        return {f"{name}_sums": self.sums_F.clone().cpu(), f"{name}_squares": self.squares_F.clone().cpu()}

    def load(self, name: str, state: Mapping[str, Tensor]) -> None:
        """Restore what `state` returned."""
        self.sums_F.copy_(state[f"{name}_sums"])
        self.squares_F.copy_(state[f"{name}_squares"])

    @property
    def z_F(self) -> Tensor:
        """The sums, divided by the roots of the sums of squares; 0 without any value."""
        return torch.where(self.squares_F > 0, self.sums_F / self.squares_F.clamp_min(1e-30).sqrt(), 0.0)

    @property
    def beyond_noise_F(self) -> Tensor:
        """sign(z) max(|z| - 1, 0)."""
        z_F = self.z_F
        return z_F.sign() * (z_F.abs() - 1).clamp_min(0)


# 5. The method.

PUBLISHED_CLIP = 10.0
"""Norm at which the released code clips each objective's body gradient."""


class Aang(Method):
    """Plain SGD on the factors (`aux_lr`) and on (a_E, a_X) (`sopt_lr`), every `meta_every` steps.

    With both learning rates 0 this is static multitask, and no meta-gradients are computed.
    """

    def __init__(self, weighting: Weighting, config: AangConfig) -> None:
        self.weighting, self.config = weighting, config
        self.uses_dev = config.uses_dev
        self._gradient_F = torch.zeros_like(weighting.flat_F)
        self._gradient_2 = torch.zeros_like(weighting.lambda_logits_2)
        self._averaged = 0
        """Number of steps whose meta-gradients are in the two sums above."""
        self._evidence = Evidence.none(weighting.flat_F)
        self._evidence_end = Evidence.none(weighting.lambda_logits_2[:1])
        """Evidence of s_E - s_X."""
        self._dev_P: Tensor | None = None
        """The running mean of dev gradients, with `dev_memory`; None before the first step."""
        self._dev_batches = 0
        """Number of dev gradients in it."""
        self._health: list[tuple[int, Tensor]] = []
        """Pairs (steps done, [cos(v, g_E), ||v||] on the device) of all steps since the last call of `describe`."""

    @classmethod
    def build(cls, config: RunConfig, space: Space | None, device: torch.device) -> Self:
        assert isinstance(config.method, AangConfig)
        return cls(Weighting.initial(config, space, device), config.method)

    def request(self, sampled: Sampled) -> Request:
        coefficients_S = self.weighting.coefficients(sampled)
        if not self.uses_dev:
            return Request(coefficients_S)
        if self.config.auxiliary_score == "published":
            return Request(coefficients_S, scores=True, gram=True)
        joint_from = FIRST_OBJECTIVE if self.config.score == "cosine" else None
        if self.config.dev_memory == 0:
            return Request(coefficients_S, scores=True, joint_from=joint_from)
        keep = (DEV,) if self.samples_dev_at(sampled.step) else ()
        return Request(coefficients_S, scores=True, joint_from=joint_from, keep=keep, reference_P=self._dev_P)

    def samples_dev_at(self, step: int) -> bool:
        return self.uses_dev and step % self.config.dev_every == 0

    def observe(self, sampled: Sampled, gradients: StepGradients) -> None:
        if not self.uses_dev:
            return
        memory, weights_n = self.config.dev_memory, self.weighting.weights(sampled)
        scores = self._scores(sampled, gradients, weights_n)
        if memory == 0 or self._dev_P is not None:
            self._learn(sampled, scores, weights_n)
        if memory > 0 and self.samples_dev_at(sampled.step):
            # The running mean is for the scores of later steps: these are of examples that it has not seen. Its weights
            # are those of a mean of the last 1 / (1 - memory) dev gradients, and of a plain mean before that.
            dev_P = gradients.kept[DEV]
            self._dev_batches += 1
            share = (1 - memory) / (1 - memory**self._dev_batches)
            self._dev_P = dev_P.clone() if self._dev_P is None else self._dev_P.lerp_(dev_P, share)

    def _learn(self, sampled: Sampled, scores: Scores, weights_n: Tensor) -> None:
        """Move the factors and (a_E, a_X) by the scores of a step."""
        if self.config.update == "evidence":
            self._weigh_evidence(sampled, scores)
            return
        if self.config.jacobian == "identity":
            dz_n, da_2 = identity_gradient(scores)
        else:
            dz_n, da_2 = softmax_gradient(scores, weights_n, self.weighting.lambda_)
        # An objective without labels has g = 0, and its z must not change (with `softmax` it would).
        dz_n = torch.where(labelled(sampled, dz_n)[1:], dz_n, 0.0).to(self._gradient_F.dtype)
        self._gradient_F += scatter(dz_n, self.weighting.entries(sampled), self.weighting.index.size)
        self._gradient_2 += da_2.to(self._gradient_2.dtype)
        self._averaged += 1
        if self._averaged == self.config.meta_every:
            self.weighting.flat_F -= self.config.aux_lr * self._gradient_F / self._averaged
            self.weighting.lambda_logits_2 -= self.config.sopt_lr * self._gradient_2 / self._averaged
            self._gradient_F.zero_()
            self._gradient_2.zero_()
            self._averaged = 0

    def _weigh_evidence(self, sampled: Sampled, scores: Scores) -> None:
        """Add a step's scores to the evidence, and set the factors and (a_E, a_X) to what it says."""
        counts_n = labelled(sampled, scores.objectives_n)[1:]  # an objective without labels says nothing
        mean = (scores.objectives_n * counts_n).sum() / counts_n.sum().clamp_min(1)
        x_n = torch.where(counts_n, scores.objectives_n - mean, 0.0).to(self.weighting.flat_F.dtype)
        entries_n5, size = self.weighting.entries(sampled), self.weighting.index.size
        x_F, magnitude_F = scatter(x_n, entries_n5, size), scatter(x_n.abs(), entries_n5, size)
        # What all sampled objectives share sums to 0, but for rounding, which z would make as large as anything else.
        self._evidence.add(torch.where(x_F.abs() > ROUNDING * magnitude_F, x_F, 0.0))
        self._evidence_end.add((scores.end_task - scores.auxiliary).reshape(1).to(self.weighting.flat_F.dtype))
        self.weighting.flat_F.copy_(self.config.aux_lr * self._evidence.beyond_noise_F)
        z = self._evidence_end.beyond_noise_F
        self.weighting.lambda_logits_2.copy_(self.config.sopt_lr * torch.cat((z, -z)))

    def _scores(self, sampled: Sampled, gradients: StepGradients, weights_n: Tensor) -> Scores:
        dots_S, norms2_S = gradients.dots_S, gradients.norms2_S
        assert dots_S is not None
        assert norms2_S is not None
        if self._dev_P is not None:  # the inner products are with the running mean: so must be the norm
            norms2_S = torch.cat((inner(self._dev_P, self._dev_P).reshape(1).to(norms2_S.dtype), norms2_S[1:]))
        cosines_S = cosine(dots_S, norms2_S)
        self._health.append((sampled.step + 1, torch.stack((cosines_S[1], norms2_S[0].sqrt())).float()))
        if self.config.auxiliary_score == "published":
            return self._published_scores(sampled, gradients, dots_S, norms2_S)
        objectives_n = dots_S[FIRST_OBJECTIVE:]
        if self.config.score == "dot":
            return Scores(objectives_n, dots_S[1], (weights_n.to(dots_S.dtype) * objectives_n).sum())
        assert gradients.joint_norm2 is not None
        # The norm is that of (1 - lambda) sum w_k g_k, so the inner product must be of it too; the cosine is the same.
        joint_n = self.weighting.coefficients(sampled)[FIRST_OBJECTIVE:].to(dots_S.dtype)
        return cosine_scores(dots_S, norms2_S, gradients.joint_norm2, (joint_n * objectives_n).sum())

    def _published_scores(self, sampled: Sampled, gradients: StepGradients, dots_S: Tensor, norms2_S: Tensor) -> Scores:
        """Return scores in which s_X is that of sum (number of labels) g_k, with each g_k clipped to norm 10."""
        assert gradients.gram_SS is not None
        labels_n = like_device(sampled.labels, dots_S).to(dots_S.dtype)
        norms_n = norms2_S[FIRST_OBJECTIVE:].sqrt().clamp_min(1e-30)
        joint_n = labels_n * torch.clamp(PUBLISHED_CLIP / norms_n, max=1.0)
        dot = (joint_n * dots_S[FIRST_OBJECTIVE:]).sum()
        if self.config.score == "dot":
            return Scores(dots_S[FIRST_OBJECTIVE:], dots_S[1], dot)
        norm2 = joint_n @ gradients.gram_SS[FIRST_OBJECTIVE:, FIRST_OBJECTIVE:] @ joint_n
        return cosine_scores(dots_S, norms2_S, norm2, dot)

    def factors(self) -> Mapping[str, npt.NDArray[np.float64]]:
        return self.weighting.factors()

    def describe(self, sampled: Sampled) -> WeightRow:
        """Return the weights, and cos(v, g_E) since the last call: mean, standard deviation, and value at each step."""
        health: dict[str, float] = {}
        if self._health:
            values_K2 = torch.stack([values for _, values in self._health]).double().cpu()
            means = values_K2.mean(dim=0).tolist()
            deviation = float(values_K2[:, 0].std(correction=0))
            health = {"cos_dev_end_task": means[0], "cos_dev_end_task_sd": deviation, "dev_gradient_norm": means[1]}
            for (step, _), cos in zip(self._health, values_K2[:, 0].tolist(), strict=True):
                health[f"cos_dev_end_task/{step}"] = cos
        self._health.clear()
        return self.weighting.row(sampled, health)

    def state_dict(self) -> dict[str, Any]:
        return {
            "flat": self.weighting.flat_F.clone().cpu(),
            "lambda_logits": self.weighting.lambda_logits_2.clone().cpu(),
            "gradient": self._gradient_F.clone().cpu(),
            "lambda_gradient": self._gradient_2.clone().cpu(),
            "averaged": self._averaged,
            **self._evidence.state("evidence"),
            **self._evidence_end.state("lambda_evidence"),
            "dev_batches": self._dev_batches,
            "dev_gradient": None if self._dev_P is None else self._dev_P.clone().cpu(),
            "health": [(step, values.tolist()) for step, values in self._health],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.weighting.flat_F.copy_(state["flat"])
        self.weighting.lambda_logits_2.copy_(state["lambda_logits"])
        self._gradient_F.copy_(state["gradient"])
        self._gradient_2.copy_(state["lambda_gradient"])
        self._averaged = int(state["averaged"])
        device = self.weighting.flat_F.device
        if "evidence_sums" in state:  # checkpoints of release 0.1 have none
            self._evidence.load("evidence", state)
            self._evidence_end.load("lambda_evidence", state)
            self._dev_batches = int(state["dev_batches"])
            dev_P = state["dev_gradient"]
            self._dev_P = None if dev_P is None else dev_P.to(device, copy=True)
        self._health = [(int(step), torch.tensor(values, device=device)) for step, values in state["health"]]
