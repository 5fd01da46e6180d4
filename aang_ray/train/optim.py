"""The optimiser of body and heads, its schedule, clipping, and the state that it changes (semantics, sections 2, 4)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from aang_ray.config.sections import OptimConfig, ScheduleConfig
from aang_ray.gradients.engine import split_vector
from aang_ray.methods.aang import PUBLISHED_CLIP
from aang_ray.objectives.source import FIRST_OBJECTIVE


def make_optimizer(body: nn.Module, heads: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """Return AdamW or SGD with separate rates for body and heads. Weight decay applies to biases and norms, too."""
    groups: list[dict[str, Any]] = [
        {"params": _trained(body), "lr": config.body_lr, "weight_decay": config.body_weight_decay},
        {"params": list(heads.parameters()), "lr": config.head_lr, "weight_decay": config.head_weight_decay},
    ]
    if config.algorithm == "sgd":
        return torch.optim.SGD(groups, momentum=config.momentum)
    return torch.optim.AdamW(groups, betas=config.betas, eps=config.eps, fused=True)


def warmup_steps(schedule: ScheduleConfig) -> int:
    """Return the number of warm-up steps: min(fraction of all steps, cap)."""
    return min(round(schedule.warmup_fraction * (schedule.steps or 0)), schedule.warmup_cap)


def rate_factor(schedule: ScheduleConfig) -> Callable[[int], float]:
    """Return a function of the step that gives the learning-rate factor: linear warm-up, then linear decay to 0.

    With `until: converged` the factor stays 1 after the warm-up.
    """
    total, warmup = schedule.steps or 0, warmup_steps(schedule)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if schedule.until == "converged":
            return 1.0
        return max(0.0, (total - step) / max(1, total - warmup))

    return factor


def clip(body: nn.Module, heads: Mapping[str, nn.Module], config: OptimConfig) -> None:
    """Clip the body's gradient and each head's (`published`: all heads' together) to norm `config.clip`."""
    nn.utils.clip_grad_norm_(body.parameters(), config.clip)
    if config.clipping == "published":
        nn.utils.clip_grad_norm_([p for head in heads.values() for p in head.parameters()], config.clip)
        return
    for head in heads.values():
        nn.utils.clip_grad_norm_(head.parameters(), config.clip)


def trained_state(module: nn.Module) -> dict[str, Tensor]:
    """Return what training changes of a module: its `state_dict` without frozen parameters."""
    frozen = _frozen(module)
    return {name: value for name, value in module.state_dict().items() if name not in frozen}


def load_trained_state(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Restore what `trained_state` returned of a module that was made in the same way.

    Raises:
        ValueError: The state holds other names.
    """
    found = module.load_state_dict(state, strict=False)
    wrong = [*found.unexpected_keys, *(set(found.missing_keys) - _frozen(module))]
    if wrong:
        raise ValueError(f"{len(wrong)} names are of another model, {min(wrong)} first")


def _frozen(module: nn.Module) -> set[str]:
    return {name for name, p in module.named_parameters(remove_duplicate=False) if not p.requires_grad}


def clip_objectives(body: nn.Module, separate_SP: Tensor, coefficients_S: Tensor) -> None:
    """Clip each objective's gradient g_k to norm 10 in the body's update (`clipping: published`).

    This adds the correction c_k (min(1, 10 / ||g_k||) - 1) g_k to `.grad`, which also holds the gradient of a tied
    decoder, which is not in `separate_SP` and stays unclipped.
    """
    norms_S = torch.linalg.vector_norm(separate_SP, dim=1)
    scale_S = torch.clamp(PUBLISHED_CLIP / norms_S.clamp_min(1e-30), max=1.0)
    scale_S[:FIRST_OBJECTIVE] = 1.0
    correction_P = (coefficients_S.to(separate_SP.dtype) * (scale_S - 1)) @ separate_SP
    for parameter, part in split_vector(correction_P, _trained(body)):
        part = part.to(parameter.dtype)
        parameter.grad = part if parameter.grad is None else parameter.grad + part


def get_gradient(body: nn.Module) -> Tensor:
    """Return the body's gradients as one vector [P], fp64 for an fp64 body, else fp32."""
    flat_P = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in _trained(body)])
    return flat_P.to(torch.promote_types(flat_P.dtype, torch.float32))


def set_gradient(body: nn.Module, direction_P: Tensor) -> None:
    """Replace the body's gradients by an update direction, [P]."""
    for parameter, part in split_vector(direction_P, _trained(body)):
        parameter.grad = part.to(parameter.dtype)


def _trained(body: nn.Module) -> list[nn.Parameter]:
    return [p for p in body.parameters() if p.requires_grad]
