"""The optimiser of body and heads, its schedule, and clipping."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from aang_ray.config.run import RunConfig
from aang_ray.config.sections import OptimConfig, ScheduleConfig
from aang_ray.objectives.source import FIRST_OBJECTIVE

PUBLISHED_OBJECTIVE_CLIP = 10.0


def make_optimizer(body: nn.Module, heads: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """AdamW or SGD, rates and weight decays of their own for body and heads (semantics section 4: no exemptions)."""
    groups: list[dict[str, Any]] = [
        {"params": list(body.parameters()), "lr": config.body_lr, "weight_decay": config.body_weight_decay},
        {"params": list(heads.parameters()), "lr": config.head_lr, "weight_decay": config.head_weight_decay},
    ]
    if config.algorithm == "sgd":
        return torch.optim.SGD(groups, momentum=config.momentum)
    return torch.optim.AdamW(groups, betas=config.betas, eps=config.eps, fused=True)


def warmup_steps(schedule: ScheduleConfig) -> int:
    """min(fraction of all steps, cap)."""
    return min(round(schedule.warmup_fraction * (schedule.steps or 0)), schedule.warmup_cap)


def make_schedule(optimizer: torch.optim.Optimizer, schedule: ScheduleConfig) -> LambdaLR:
    """The learning rates times `rate_factor` of the steps that the optimiser has made."""
    return LambdaLR(optimizer, rate_factor(schedule))


def rate_factor(schedule: ScheduleConfig) -> Callable[[int], float]:
    """By step: linear warm-up, then linear decay to 0 at the last step."""
    total, warmup = schedule.steps or 0, warmup_steps(schedule)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return max(0.0, (total - step) / max(1, total - warmup))

    return factor


def clip(body: nn.Module, heads: Mapping[str, nn.Module], config: OptimConfig) -> None:
    """Scale the update direction to norm `clip` at most, and each head's gradient (`published`: all heads' jointly)."""
    nn.utils.clip_grad_norm_(body.parameters(), config.clip)
    if config.clipping == "published":
        nn.utils.clip_grad_norm_([p for head in heads.values() for p in head.parameters()], config.clip)
        return
    for head in heads.values():
        nn.utils.clip_grad_norm_(head.parameters(), config.clip)


def clipped_sum(body: nn.Module, separate_SP: Tensor, coefficients_S: Tensor) -> None:
    """`clipping: published`: weigh g_k by min(1, 10 / ||g_k||) in the update, for each objective k.

    Added as a correction, c_k (min(1, 10 / ||g_k||) - 1) g_k: a tied decoder's part of the gradient is in
    `.grad` and not in `separate_SP`, and stays.
    """
    norms_S = torch.linalg.vector_norm(separate_SP, dim=1)
    scale_S = torch.clamp(PUBLISHED_OBJECTIVE_CLIP / norms_S.clamp_min(1e-30), max=1.0)
    scale_S[:FIRST_OBJECTIVE] = 1.0
    flat_P = (coefficients_S.to(separate_SP.dtype) * (scale_S - 1)) @ separate_SP
    start = 0
    for parameter in (p for p in body.parameters() if p.requires_grad):
        part = flat_P[start : start + parameter.numel()].view_as(parameter).to(parameter.dtype)
        parameter.grad = part if parameter.grad is None else parameter.grad + part
        start += parameter.numel()


def get_gradient(body: nn.Module) -> Tensor:
    """The body's gradients as one vector, zeros where there is none; in fp32, in fp64 for an fp64 body."""
    parameters = [p for p in body.parameters() if p.requires_grad]
    flat_P = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
    return flat_P.to(torch.promote_types(flat_P.dtype, torch.float32))


def set_gradient(body: nn.Module, direction_P: Tensor) -> None:
    """Put a flattened update direction in the place of the body's gradients."""
    start = 0
    for parameter in (p for p in body.parameters() if p.requires_grad):
        parameter.grad = direction_P[start : start + parameter.numel()].view_as(parameter).to(parameter.dtype)
        start += parameter.numel()


def wants_separate(config: RunConfig) -> bool:
    """Published clipping acts on each objective's gradient, so they are needed one by one."""
    return config.optim.clipping == "published" and config.method.auxiliary
