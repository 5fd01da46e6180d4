"""The protocol of a method: the one thing that all methods share and the loop knows.

A method says what it needs of a step's gradients, turns its state into the coefficients of the
step's losses, and learns from what the gradients said. Its tensors live on the device; nothing in a
step waits for them. Adding a method is one file here and one line in the registry.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from aang_ray.gradients.engine import Request, StepGradients
from aang_ray.gradients.statistics import ExampleJacobian
from aang_ray.objectives import randomness
from aang_ray.store.schema import WeightRow


@dataclass(frozen=True)
class Sampled:
    """The auxiliary objectives of a step."""

    step: int
    objectives: tuple[int, ...]
    """Indices into the space, ascending."""
    shares: tuple[float, ...]
    """b / B of each in `published` allocation; 1 each otherwise."""
    labels: tuple[float, ...]
    """Labels of each at this step."""


class Method(Protocol):
    """How the losses of a step are weighed.

    Segments are numbered: 0 the dev batch, 1 the end task, 2 ... n + 1 the sampled objectives.
    """

    uses_dev: bool
    """Whether a step needs the dev batch and the dev head."""
    whole_gradients: bool
    """Whether the statistics must count a tied decoder's part, because the update is made of them."""

    def request(self, sampled: Sampled) -> Request:
        """The weight of every segment in the update, and what else is wanted of the step's gradients."""
        ...

    def direction(self, sampled: Sampled, gradients: StepGradients) -> Tensor | None:
        """The body's update direction, [P], where it is no sum that `request` could state; None: that sum stands.

        Called before `observe`, and with `separate` gradients only.
        """
        ...

    def observe(self, sampled: Sampled, gradients: StepGradients) -> None:
        """Learn from a step's gradients, before the optimiser moves the parameters."""
        ...

    def factors(self) -> Mapping[str, npt.NDArray[np.float64]] | None:
        """Factor tensors in host memory, for allocations that follow them; None where there are none."""
        ...

    def describe(self, sampled: Sampled) -> WeightRow | None:
        """The weights at this step for the store; waits for the device. None where nothing is weighed."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs: tensors and plain numbers."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        ...


@dataclass(frozen=True)
class PrimaryExamples:
    """How many train examples of the end task a method looks at before a step."""

    subspace: int
    """For the estimate of a subspace; 0 where the step makes none."""
    mean: int
    """Others, for the mean gradient."""


@runtime_checkable
class PrimaryMethod(Method, Protocol):
    """A method that measures the end task's own gradients apart from the step's, with dropout off."""

    def primary_examples(self, step: int) -> PrimaryExamples:
        """What it looks at before a step: a function of the step alone."""
        ...

    def look(self, step: int, subspace: ExampleJacobian | None, primary: ExampleJacobian) -> Sequence[Tensor]:
        """Measure, before `request`; once more with the same examples where a step is repeated.

        Returns what it has measured and holds, for the caller to make the same on all workers.
        """
        ...


def beside(values: Sequence[float] | Sequence[int] | Sequence[bool], like: Tensor) -> Tensor:
    """Host numbers as a tensor on the device of another one, without waiting for the device."""
    on_host = torch.tensor(values)
    if like.device.type == "cuda":
        on_host = on_host.pin_memory()
    return on_host.to(like.device, non_blocking=True)


def named_weights(sampled: Sampled, names: Sequence[str], weights: Sequence[float]) -> dict[str, float]:
    """Weights by the names of the sampled objectives."""
    return {names[index]: float(weight) for index, weight in zip(sampled.objectives, weights, strict=True)}


# --- methods.factors: Factored weights of the objectives, and the weight of the end task.
#
# z_k = A_k + D_d + T_t + R_r + O_o, w = softmax(z restricted to S), lambda = softmax(a_E, a_X)[E];
# everything starts at 0. (Dery et al. 2023, section 5; semantics section 1)


LETTERS = ("A", "D", "T", "R", "O")


@dataclass(frozen=True)
class FactorIndex:
    """Which entries of one flat vector of factors make up each objective's logit."""

    names: Mapping[str, tuple[str, ...]]
    """Entry names by letter, in the order of the flat vector."""
    entries_K5: Tensor
    """For each objective the flat positions of its A, D, T, R and O, int64."""

    @classmethod
    def of(cls, names: Mapping[str, Sequence[str]], stages: Sequence[tuple[str, str, str, str]]) -> FactorIndex:
        """Build from entry names by letter and each objective's (d, t, r, o), in the order of A."""
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

    def split(self, flat: npt.NDArray[np.float64]) -> dict[str, npt.NDArray[np.float64]]:
        """A flat vector by letter."""
        ends = np.cumsum([len(self.names[letter]) for letter in LETTERS])[:-1]
        return dict(zip(LETTERS, np.split(flat, ends), strict=True))


def logits(flat_F: Tensor, entries_n5: Tensor) -> Tensor:
    """z of the sampled objectives, [n]."""
    return flat_F[entries_n5].sum(dim=1)


def scatter(gradient_n: Tensor, entries_n5: Tensor, size: int) -> Tensor:
    """Gradient of the flat factors from the gradient of the sampled logits.

    A_k receives dz_k; D, T, R and O receive the sum over the sampled objectives that use them; what
    was not sampled receives 0. (semantics section 3)
    """
    flat_F = torch.zeros(size, dtype=gradient_n.dtype, device=gradient_n.device)
    return flat_F.index_add(0, entries_n5.flatten(), gradient_n[:, None].expand(-1, entries_n5.shape[1]).flatten())


# --- methods.weighting: From logits to the coefficients of a step, for every method with factored weights.


@dataclass
class Weighting:
    """Factors and (a_E, a_X) on the device, and the weights they stand for.

    In `published` allocation an objective's coefficient is (b / B) * softmax_S(A_k + O_o), neither
    renormalised nor bound to sum to one (semantics section 2.3).
    """

    index: FactorIndex
    flat_F: Tensor
    lambda_logits_2: Tensor
    published: bool

    @classmethod
    def zeros(cls, index: FactorIndex, device: torch.device, published: bool) -> Weighting:
        """Everything starts at 0: w = 1/n, lambda = 1/2."""
        moved = FactorIndex(index.names, index.entries_K5.to(device))
        return cls(moved, torch.zeros(index.size, device=device), torch.zeros(2, device=device), published)

    def with_lambda(self, weight: float) -> Weighting:
        """The same with another weight of the end task, in (0, 1)."""
        logits_2 = self.lambda_logits_2.new_tensor([0.0, math.log(1 / weight - 1)])
        return replace(self, lambda_logits_2=logits_2)

    @property
    def lambda_(self) -> Tensor:
        """Weight of the end task."""
        return torch.softmax(self.lambda_logits_2, dim=0)[0]

    def entries(self, sampled: Sampled) -> Tensor:
        """Flat factor positions of the sampled objectives, [n, 5]."""
        return self.index.entries_K5.index_select(0, beside(sampled.objectives, self.index.entries_K5))

    def weights(self, sampled: Sampled) -> Tensor:
        """w of the sampled objectives, [n]."""
        entries_n5 = self.entries(sampled)
        if not self.published:
            return torch.softmax(logits(self.flat_F, entries_n5), dim=0)
        shares_n = beside(sampled.shares, self.flat_F)
        return shares_n * torch.softmax(logits(self.flat_F, entries_n5[:, ::4]), dim=0)

    def coefficients(self, sampled: Sampled) -> Tensor:
        """(0, lambda, (1 - lambda) w_1, ..., (1 - lambda) w_n). (Algorithm 1 of Dery et al. 2023)"""
        lambda_ = self.lambda_.reshape(1)
        return torch.cat((torch.zeros_like(lambda_), lambda_, (1 - lambda_) * self.weights(sampled)))

    def factors(self) -> Mapping[str, npt.NDArray[np.float64]]:
        """Factor tensors in host memory by letter."""
        return self.index.split(self.flat_F.double().cpu().numpy())

    def row(self, sampled: Sampled, health: Mapping[str, float]) -> WeightRow:
        """The weights at this step for the store."""
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


# --- methods.unlearned: What methods without a state of their own have in common.


class Unlearned:
    """A step's weights depend on that step alone. `static` holds the coefficients of static multitask."""

    uses_dev = False
    whole_gradients = False

    def __init__(self, static: Weighting) -> None:
        self.static = static

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the space's objectives."""
        return self.static.index.names["A"]

    def direction(self, sampled: Sampled, gradients: StepGradients) -> Tensor | None:
        return None

    def observe(self, sampled: Sampled, gradients: StepGradients) -> None:
        """Nothing is learned about weights."""

    def factors(self) -> Mapping[str, npt.NDArray[np.float64]]:
        return self.static.factors()

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """There is no state."""


# --- methods.described: Rows for the store of methods whose weights are no softmax of factors.


def weight_row(sampled: Sampled, names: Sequence[str], weights_m: Tensor) -> WeightRow:
    """The weights of the end task and of the sampled objectives, [1 + n]; waits for the device.

    In the row the end task's share of the sum, and the objectives' shares of theirs (0 where the sum is 0); the
    weights as they are under `health`, as `weight/<name>`: they may be negative, and need not sum to 1.
    """
    weights = weights_m.tolist()
    total, objectives = sum(weights), sum(weights[1:])
    shares = [weight / objectives if objectives else 0.0 for weight in weights[1:]]
    health = {f"weight/{name}": weight for name, weight in named_weights(sampled, names, weights[1:]).items()}
    return WeightRow(
        step=sampled.step + 1,
        end_task_weight=weights[0] / total if total else 0.0,
        weights=named_weights(sampled, names, shares),
        factors={},
        health={"weight/end_task": weights[0], **health},
    )


# --- methods.over_space: A step's losses within vectors over the end task and the whole space, [K]: the end task's entry first.


def positions(sampled: Sampled, like: Tensor) -> Tensor:
    """Where the losses of the end task and the sampled objectives stand, [m]."""
    return beside([0, *(1 + objective for objective in sampled.objectives)], like)


def labelled(sampled: Sampled, like: Tensor) -> Tensor:
    """Which of them have labels, [m]: a loss without any teaches nothing."""
    return beside([True, *(count > 0 for count in sampled.labels)], like)


# --- methods.seeding: Chance inside a method, as a pure function of (seed, step).


@contextmanager
def seeded(seed: int, step: int, device: torch.device) -> Iterator[None]:
    """Torch's random numbers start anew from (seed, step) inside, and go on as before outside.

    So a resumed run, and every worker, draws what an uninterrupted single one draws.
    """
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(int(randomness.keys(seed, step, randomness.METHOD)[0] >> 1))
        yield
