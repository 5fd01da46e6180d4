"""Drive a method with gradients of one's own, as the loop does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from aang_ray.config import parse_config
from aang_ray.gradients.statistics import ExampleJacobian
from aang_ray.methods.base import Method, PrimaryMethod, Sampled
from aang_ray.methods.registry import make_method
from aang_ray.objectives.space import Space
from tests.methods.problem import OBJECTIVES, dense_answer

SPACE = Space("test", OBJECTIVES, {})


class Driven:
    """A method over a space of four objectives; the end task's gradient is row 1, the dev gradient row 0."""

    def __init__(self, name: str, seed: int = 0, n: int = 2, **settings: Any) -> None:
        config = parse_config({"method": {"name": name, **settings}, "n": n, "seed": seed}, "test")
        self.method: Method = make_method(config, SPACE, torch.device("cpu"))
        self.steps = 0

    def step(
        self,
        gradients_SP: Tensor,
        objectives: Sequence[int],
        losses_S: Tensor | None = None,
        labels: Sequence[float] | None = None,
    ) -> Tensor:
        """The body's update direction, [P]; the method learns from the step."""
        self.sampled = self.sampled_at(objectives, labels)
        if isinstance(self.method, PrimaryMethod):
            subspace = bool(self.method.primary_examples(self.steps)[0])
            examples = around(gradients_SP[1])
            self.method.measure(self.steps, examples if subspace else None, examples)
        request = self.method.request(self.sampled)
        answer = dense_answer(gradients_SP, request, losses_S)
        direction_P = self.method.direction(self.sampled, answer)
        self.method.observe(self.sampled, answer)
        self.steps += 1
        if direction_P is None:
            return request.coefficients_S.to(gradients_SP.dtype) @ gradients_SP
        return direction_P

    def sampled_at(self, objectives: Sequence[int], labels: Sequence[float] | None = None) -> Sampled:
        """The sample of the next step."""
        shares = (1.0,) * len(objectives)
        return Sampled(self.steps, tuple(objectives), shares, tuple(labels or (10.0,) * len(objectives)))

    def coefficients(self, *objectives: int) -> Tensor:
        """Of the next step's losses, from the end task's on."""
        return self.method.request(self.sampled_at(objectives)).coefficients_S[1:]


def around(gradient_P: Tensor) -> ExampleJacobian:
    """Four examples whose losses' gradients have this mean, whatever the parameters are."""
    noise_2P = torch.randn(2, len(gradient_P), generator=torch.Generator().manual_seed(0), dtype=gradient_P.dtype)
    noise_2P *= gradient_P.norm() / noise_2P.norm(dim=1, keepdim=True)
    J_MP = gradient_P + torch.cat((noise_2P, -noise_2P))
    body = nn.Module()
    body.theta = nn.Parameter(torch.zeros_like(gradient_P))
    return ExampleJacobian(body, (J_MP,), lambda part: part @ body.theta, len(J_MP))


def rows(*gradients: Sequence[float], dev: Sequence[float] | None = None) -> Tensor:
    """Gradients of the end task and of the objectives, after the dev gradient (0 unless given), [S, P]."""
    return torch.tensor([dev or [0.0] * len(gradients[0]), *gradients], dtype=torch.float64)
