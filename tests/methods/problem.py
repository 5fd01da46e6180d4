"""A small differentiable problem with known gradients, for all tests of methods."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from aang_ray.gradients.engine import Request, StepGradients
from aang_ray.methods.aang import FactorIndex, Weighting
from aang_ray.methods.base import Sampled
from aang_ray.objectives.objective import Objective

OBJECTIVES = (
    Objective("end-task", "mask", "bidirectional", "denoise"),
    Objective("end-task", "replace", "left-to-right", "denoise"),
    Objective("end-task", "mask", "random-factorized", "end-task"),
    Objective("in-domain", "no-op", "left-to-right", "denoise"),
)
NAMES = {
    "A": tuple(k.key for k in OBJECTIVES),
    "D": ("end-task", "in-domain"),
    "T": ("mask", "replace", "no-op"),
    "R": ("bidirectional", "left-to-right", "random-factorized"),
    "O": ("denoise", "end-task"),
}


def weighting(published: bool = False) -> Weighting:
    """Factors of the four objectives, in float64."""
    index = FactorIndex.of(NAMES, [k.stages for k in OBJECTIVES])
    made = Weighting.zeros(index, torch.device("cpu"), published)
    made.flat_F = made.flat_F.double()
    made.lambda_logits_2 = made.lambda_logits_2.double()
    return made


def sampled(*objectives: int, labels: float = 10.0) -> Sampled:
    return Sampled(0, objectives, (1.0,) * len(objectives), (labels,) * len(objectives))


@dataclass
class Problem:
    """Smooth losses of theta: segment s has L_s(theta) = sum softplus(M_s theta) + 0.1 theta · theta."""

    theta_P: Tensor
    matrices_SPP: Tensor

    @classmethod
    def random(cls, segments: int, seed: int, size: int = 7) -> Problem:
        generator = torch.Generator().manual_seed(seed)
        draw = torch.randn(segments + 1, size, size, generator=generator, dtype=torch.float64)
        return cls(draw[0, 0], draw[1:])

    def loss(self, segment: int, theta_P: Tensor) -> Tensor:
        return torch.nn.functional.softplus(self.matrices_SPP[segment] @ theta_P).sum() + 0.1 * theta_P.square().sum()

    def gradients_SP(self) -> Tensor:
        theta_P = self.theta_P.clone().requires_grad_()
        return torch.stack(
            [torch.autograd.grad(self.loss(s, theta_P), theta_P)[0] for s in range(len(self.matrices_SPP))]
        )

    def answer(self, request: Request) -> StepGradients:
        """What an engine returns for this problem, computed densely."""
        return dense_answer(self.gradients_SP(), request)


def dense_answer(gradients_SP: Tensor, request: Request, losses_S: Tensor | None = None) -> StepGradients:
    """Statistics of given gradients."""
    gram_SS = gradients_SP @ gradients_SP.T
    dots_S = gram_SS[0] if request.reference_P is None else gradients_SP @ request.reference_P.to(gradients_SP)
    joint = None
    if request.joint_from is not None:
        parts_SP = request.coefficients_S.to(gradients_SP)[:, None] * gradients_SP
        joint = parts_SP[request.joint_from :].sum(0).square().sum()
    return StepGradients(
        losses_S=torch.zeros(len(gradients_SP)) if losses_S is None else losses_S,
        dots_S=dots_S if request.scores else None,
        norms2_S=gram_SS.diagonal() if request.scores else None,
        joint_norm2=joint,
        gram_SS=gram_SS if request.gram else None,
        separate_SP=gradients_SP if request.separate else None,
        kept={segment: gradients_SP[segment] for segment in request.keep},
        update_P=request.coefficients_S.to(gradients_SP) @ gradients_SP if request.keep else None,
    )
