"""The interface between methods and the training loop, with default implementations.

A method's tensors are on the device of the run, and a step does not wait for the device unless the method's
documentation states it. docs/methods/README.md describes how to add a method.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from aang_ray.config.run import RunConfig
from aang_ray.gradients.engine import Request, StepGradients
from aang_ray.gradients.statistics import ExampleJacobian
from aang_ray.objectives import randomness
from aang_ray.objectives.space import Space
from aang_ray.store.schema import WeightRow


@dataclass(frozen=True)
class Sampled:
    """The auxiliary objectives of a step."""

    step: int
    objectives: tuple[int, ...]
    """Indices into the space, ascending."""
    shares: tuple[float, ...]
    """b / B of each objective in `published` allocation; 1 otherwise."""
    labels: tuple[float, ...]
    """Number of labels of each objective at this step."""


class Method(ABC):
    """Base class of methods, which determine the weights of a step's losses or the body's update.

    Segments are numbered: 0 is the dev batch, 1 the end task, and 2 ... n + 1 are the sampled objectives.
    """

    uses_dev: bool = False
    """Whether a step needs the dev batch and the dev head."""
    whole_gradients: bool = False
    """Whether statistics must include a tied decoder's part, because the update is computed from them."""
    state: dict[str, Tensor]
    """Tensors that checkpoints contain, by name; methods with other state extend `state_dict`."""

    @classmethod
    @abstractmethod
    def build(cls, config: RunConfig, space: Space | None, device: torch.device) -> Self:
        """Return the method of a run in its initial state.

        Args:
            config: The configuration of the run.
            space: The objectives; None for a method that trains on the end task alone.
            device: Device of the method's tensors.

        Raises:
            UserError: The method needs a space of objectives and there is none.
        """

    def samples_dev_at(self, step: int) -> bool:
        """Return whether a step needs the dev batch, a function of the step alone."""
        return self.uses_dev

    @abstractmethod
    def request(self, sampled: Sampled) -> Request:
        """Return the weight of every segment in the update, and the statistics that the method needs."""

    def direction(self, sampled: Sampled, gradients: StepGradients) -> Tensor | None:
        """Return the body's update direction, [P], before `observe`; None if it is the weighted sum of `request`."""
        return None

    def observe(self, sampled: Sampled, gradients: StepGradients) -> None:
        """Update the method's state from a step's gradients, before the optimiser moves the parameters."""
        return

    def factors(self) -> Mapping[str, npt.NDArray[np.float64]] | None:
        """Return the factors in host memory, for allocations that depend on them; None if the method has none."""
        return None

    def describe(self, sampled: Sampled) -> WeightRow | None:
        """Return the weights of the sampled objectives for the store, after `observe`; None if there are none.

        It waits for the device.
        """
        return None

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a resumed run: tensors, numbers, and lists and dicts of them."""
        return {name: value.clone().cpu() for name, value in self.state.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        for name, value in self.state.items():
            value.copy_(state[name])


class PrimaryMethod(Method):
    """A method that needs additional end-task gradients before a step, computed with dropout off."""

    @property
    def measures(self) -> bool:
        """Whether the method needs them with its settings."""
        return True

    @abstractmethod
    def primary_examples(self, step: int) -> tuple[int, int]:
        """Return how many train examples a step needs to estimate a subspace (0: it does not), and how many others."""

    @abstractmethod
    def measure(self, step: int, subspace: ExampleJacobian | None, primary: ExampleJacobian) -> Sequence[Tensor]:
        """Measure the end task's gradients. Called before `request`, and again with the same examples on a retry.

        Args:
            step: Index of the step.
            subspace: Jacobian of the subspace's examples; None at a step without them.
            primary: Jacobian of the examples for the mean gradient.

        Returns:
            The tensors that the method has computed and keeps. The caller makes them the same on all workers.
        """


def like_device(values: Sequence[float] | Sequence[int] | Sequence[bool], like: Tensor) -> Tensor:
    """Return numbers as a tensor on the device of `like`, without waiting for that device."""
    on_host = torch.tensor(values)
    if like.device.type == "cuda":
        on_host = on_host.pin_memory()
    return on_host.to(like.device, non_blocking=True)


def positions(sampled: Sampled, like: Tensor) -> Tensor:
    """Return the indices of the step's losses in vectors over end task (entry 0) and whole space, [m = 1 + n]."""
    return like_device([0, *(1 + objective for objective in sampled.objectives)], like)


def labelled(sampled: Sampled, like: Tensor) -> Tensor:
    """Return whether each of the step's losses has labels, [m]. A loss without labels must not change any state."""
    return like_device([True, *(count > 0 for count in sampled.labels)], like)


@contextmanager
def seeded(seed: int, step: int, device: torch.device) -> Iterator[None]:
    """Seed torch's random numbers with (seed, step) inside the block: resumed runs and all workers draw the same."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(int(randomness.keys(seed, step, randomness.METHOD)[0] >> 1))
        yield


def named_weights(sampled: Sampled, names: Sequence[str], weights: Sequence[float]) -> dict[str, float]:
    """Return the weights of the sampled objectives by name."""
    return {names[index]: float(weight) for index, weight in zip(sampled.objectives, weights, strict=True)}


def weight_row(sampled: Sampled, names: Sequence[str], weights_m: Tensor) -> WeightRow:
    """Return the store's row for weights that are not a softmax of factors, [1 + n]. Waits for the device.

    The row has the end task's share of the sum of all weights, and each objective's share of the objectives' sum (0 if
    the sum is 0). The weights themselves, which may be negative, are in `health` as `weight/<name>`.
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
