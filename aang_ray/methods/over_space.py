"""A step's losses within vectors over the end task and the whole space, [K]: the end task's entry first."""

from __future__ import annotations

from torch import Tensor

from aang_ray.methods.base import Sampled, beside


def positions(sampled: Sampled, like: Tensor) -> Tensor:
    """Where the losses of the end task and the sampled objectives stand, [m]."""
    return beside([0, *(1 + objective for objective in sampled.objectives)], like)


def labelled(sampled: Sampled, like: Tensor) -> Tensor:
    """Which of them have labels, [m]: a loss without any teaches nothing."""
    return beside([True, *(count > 0 for count in sampled.labels)], like)
