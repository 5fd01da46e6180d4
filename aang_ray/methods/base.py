"""What a method is: the protocol that the training loop knows, with the defaults that most methods keep.

A method states what it needs of a step's gradients, turns its state into the coefficients of the step's losses, and
updates its state from the gradients. Its tensors live on the device of the run, and no step waits for the device unless
the method's own page says so. docs/methods/README.md says how to add one.
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
    """b / B of each in `published` allocation; 1 each otherwise."""
    labels: tuple[float, ...]
    """Number of labels of each at this step."""


class Method(ABC):
    """How the losses of a step are weighed.

    Segments are numbered: 0 is the dev batch, 1 the end task, and 2 ... n + 1 are the sampled objectives.
    """

    uses_dev: bool = False
    """Whether a step needs the dev batch and the dev head."""
    whole_gradients: bool = False
    """Whether statistics must include a tied decoder's part, because the update is made from them."""
    state: dict[str, Tensor]
    """Tensors that go through checkpoints, by name; methods with other state extend `state_dict`."""

    @classmethod
    @abstractmethod
    def build(cls, config: RunConfig, space: Space | None, device: torch.device) -> Self:
        """The method of a run in its initial state.

        Raises:
            UserError: if the method needs a space of objectives and there is none.
        """

    @abstractmethod
    def request(self, sampled: Sampled) -> Request:
        """The weight of every segment in the update, and what else the step's gradients must provide."""

    def direction(self, sampled: Sampled, gradients: StepGradients) -> Tensor | None:
        """The body's update direction, [P], if it is not the weighted sum that `request` asked for; else None.

        It is called before `observe`.
        """
        return None

    def observe(self, sampled: Sampled, gradients: StepGradients) -> None:
        """Update the method's state from a step's gradients, before the optimiser moves the parameters."""
        return

    def factors(self) -> Mapping[str, npt.NDArray[np.float64]] | None:
        """Factor tensors in host memory, for allocations that follow them; None if the method has none."""
        return None

    def describe(self, sampled: Sampled) -> WeightRow | None:
        """The weights at this step for the store; waits for the device. None if the method weighs nothing."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs: tensors, numbers, and lists and dicts of them."""
        return {name: value.clone().cpu() for name, value in self.state.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        for name, value in self.state.items():
            value.copy_(state[name])


@dataclass(frozen=True)
class PrimaryExamples:
    """How many train examples of the end task a method measures before a step."""

    subspace: int
    """Examples for the estimate of a subspace; 0 if the step makes none."""
    mean: int
    """Other examples, for the mean gradient."""


class PrimaryMethod(Method):
    """A method that measures gradients of the end task apart from the step's own, with dropout off."""

    @abstractmethod
    def primary_examples(self, step: int) -> PrimaryExamples:
        """The examples that the method needs before a step: a function of the step alone."""

    @abstractmethod
    def measure(self, step: int, subspace: ExampleJacobian | None, primary: ExampleJacobian) -> Sequence[Tensor]:
        """Measure the end task's gradients. Called before `request`, and again with the same examples on a retry.

        Returns:
            The tensors that were measured and kept; the caller makes them the same on all workers.
        """


def like_device(values: Sequence[float] | Sequence[int] | Sequence[bool], like: Tensor) -> Tensor:
    """Host numbers as a tensor on the device of `like`, without waiting for that device."""
    on_host = torch.tensor(values)
    if like.device.type == "cuda":
        on_host = on_host.pin_memory()
    return on_host.to(like.device, non_blocking=True)


def positions(sampled: Sampled, like: Tensor) -> Tensor:
    """Positions of the step's losses in vectors over the end task (entry 0) and the whole space, [m = 1 + n]."""
    return like_device([0, *(1 + objective for objective in sampled.objectives)], like)


def labelled(sampled: Sampled, like: Tensor) -> Tensor:
    """Which of the step's losses have labels, [m]: a loss without labels must not move any state."""
    return like_device([True, *(count > 0 for count in sampled.labels)], like)


@contextmanager
def seeded(seed: int, step: int, device: torch.device) -> Iterator[None]:
    """Seed torch's random numbers with (seed, step) inside the block, and restore their state afterwards.

    So a resumed run, and every worker, draws what an uninterrupted single run draws.
    """
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(int(randomness.keys(seed, step, randomness.METHOD)[0] >> 1))
        yield


def named_weights(sampled: Sampled, names: Sequence[str], weights: Sequence[float]) -> dict[str, float]:
    """Weights of the sampled objectives by name."""
    return {names[index]: float(weight) for index, weight in zip(sampled.objectives, weights, strict=True)}


def weight_row(sampled: Sampled, names: Sequence[str], weights_m: Tensor) -> WeightRow:
    """The store's row for weights of the end task and the sampled objectives, [1 + n], that are no softmax of factors.

    The row holds the end task's share of the sum, and the objectives' shares of theirs (0 if the sum is 0). The weights
    themselves stand under `health` as `weight/<name>`: they may be negative, and need not sum to 1. Waits for the
    device.
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
