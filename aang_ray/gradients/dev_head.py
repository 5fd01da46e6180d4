"""The dev head phi*, through whose loss the dev gradient v is computed (docs/semantics.md, section 3).

A new head is fitted on cached features with at most 10 steps of AdamW (lr 1e-2, weight decay 0.1), until the loss
changes by less than 1e-3. To avoid waiting for the device, a 0/1 flag on the device multiplies all later updates.

Shape suffixes: N examples, H hidden size, C classes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

STEPS, LEARNING_RATE, WEIGHT_DECAY, TOLERANCE = 10, 1e-2, 0.1, 1e-3
BETAS, EPSILON = (0.9, 0.999), 1e-8


def fit_dev_head(
    features_NH: Tensor, labels_N: Tensor, classes: int, seed: int, weights_C: Tensor | None = None
) -> nn.Sequential:
    """Fit Linear, Tanh, Linear on cached features, and return the head, whose parameters require no gradient.

    Args:
        features_NH: The examples' pooled vectors.
        labels_N: The examples' classes.
        classes: Number of classes C.
        seed: Seed of the initial weights; the global random state is neither used nor changed.
        weights_C: Weights of the classes in the loss; None for equal weights.
    """
    head = _fresh_head(features_NH, classes, seed)
    parameters = list(head.parameters())
    means, squares = [torch.zeros_like(p) for p in parameters], [torch.zeros_like(p) for p in parameters]
    previous = torch.full((), torch.inf, device=features_NH.device, dtype=features_NH.dtype)
    moving = torch.ones((), device=features_NH.device, dtype=features_NH.dtype)
    for step in range(1, STEPS + 1):
        with torch.enable_grad():
            loss = F.cross_entropy(head(features_NH), labels_N, weight=weights_C)
            gradients = torch.autograd.grad(loss, parameters)
        loss = loss.detach()
        moving = moving * ((previous - loss).abs() >= TOLERANCE)
        previous = loss
        _adamw(parameters, list(gradients), means, squares, step, moving)
    return head.requires_grad_(False)


def _fresh_head(features_NH: Tensor, classes: int, seed: int) -> nn.Sequential:
    """Return a head with weights from U(-1/sqrt(H), 1/sqrt(H)), PyTorch's default, drawn from a separate generator."""
    hidden = features_NH.shape[1]
    generator, bound = torch.Generator().manual_seed(seed), hidden**-0.5

    def linear(outputs: int) -> nn.Linear:
        # Created on the meta device, because the default initialisation would use the global random state.
        layer = nn.Linear(hidden, outputs, device="meta", dtype=features_NH.dtype).to_empty(device=features_NH.device)
        with torch.no_grad():
            for parameter in layer.parameters():
                draw = (torch.rand(parameter.shape, generator=generator, dtype=torch.float32) * 2 - 1) * bound
                # Drawn on the host, so that every device gets the same head; pinned, so that the copy is asynchronous.
                parameter.copy_(draw.pin_memory() if features_NH.is_cuda else draw, non_blocking=True)
        return layer

    return nn.Sequential(linear(hidden), nn.Tanh(), linear(classes))


@torch.no_grad()
def _adamw(
    parameters: list[nn.Parameter],
    gradients: list[Tensor],
    means: list[Tensor],
    squares: list[Tensor],
    step: int,
    moving: Tensor,
) -> None:
    """Make one step of AdamW (Loshchilov and Hutter 2019), multiplied by `moving`, which is 0 or 1."""
    first, second = BETAS
    torch._foreach_lerp_(means, gradients, 1 - first)
    torch._foreach_mul_(squares, second)
    torch._foreach_addcmul_(squares, gradients, gradients, 1 - second)
    denominators = torch._foreach_sqrt(squares)
    torch._foreach_div_(denominators, (1 - second**step) ** 0.5)
    torch._foreach_add_(denominators, EPSILON)
    updates = torch._foreach_div(means, denominators)
    torch._foreach_mul_(updates, LEARNING_RATE / (1 - first**step))
    torch._foreach_add_(updates, list(parameters), alpha=LEARNING_RATE * WEIGHT_DECAY)
    torch._foreach_mul_(updates, moving)
    torch._foreach_sub_(list(parameters), updates)
