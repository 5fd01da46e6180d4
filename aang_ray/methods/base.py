"""The protocol of a method: the one thing that all methods share and the loop knows.

A method says what it needs of a step's gradients, turns its state into the coefficients of the
step's losses, and learns from what the gradients said. Its tensors live on the device; nothing in a
step waits for them. Adding a method is one file here and one line in the registry.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from aang_ray.gradients.engine import Request, StepGradients
from aang_ray.gradients.jacobian import ExampleJacobian
from aang_ray.store.rows import WeightRow


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
