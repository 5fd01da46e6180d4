"""phi*: a fresh head fitted on a few examples, through which the dev loss is measured.

"Every step a fresh, seeded head is fitted: the body encodes the sample once, in eval mode, without
gradient; then at most 10 AdamW steps, lr 1e-2, weight decay 0.1, frozen once the loss moves less than
1e-3." (semantics section 3)
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
    """Linear, Tanh, Linear on cached features [N, H]; the same seed and features give the same head.

    It stops by a flag on the device: once |loss_t - loss_(t-1)| < 1e-3 updates are multiplied by 0, so
    that nothing waits for the device. `weights_C` weighs
    the classes as the end task's loss does. Draws from a generator of its own. Its parameters are frozen.
    """
    head = _fresh(features_NH, classes, seed)
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
        _adamw(parameters, gradients, means, squares, step, moving)
    return head.requires_grad_(False)


def _fresh(features_NH: Tensor, classes: int, seed: int) -> nn.Sequential:
    """PyTorch's default initialisation of linear layers, U(-1/sqrt(H), 1/sqrt(H)), from a generator of its own."""
    hidden = features_NH.shape[1]
    generator = torch.Generator().manual_seed(seed)
    layers = [_linear(hidden, hidden, generator, features_NH), _linear(hidden, classes, generator, features_NH)]
    return nn.Sequential(layers[0], nn.Tanh(), layers[1])


def _linear(inputs: int, outputs: int, generator: torch.Generator, like: Tensor) -> nn.Linear:
    # Made without storage: the default initialisation would draw from the global random stream.
    layer = nn.Linear(inputs, outputs, device="meta", dtype=like.dtype).to_empty(device=like.device)
    bound = inputs**-0.5
    with torch.no_grad():
        for parameter in layer.parameters():
            draw = (torch.rand(parameter.shape, generator=generator, dtype=torch.float32) * 2 - 1) * bound
            # Drawn on the host, so that every device has the same head; page-locked, so that none waits.
            parameter.copy_(draw.pin_memory() if like.is_cuda else draw, non_blocking=True)
    return layer


@torch.no_grad()
def _adamw(
    parameters: list[nn.Parameter],
    gradients: tuple[Tensor, ...],
    means: list[Tensor],
    squares: list[Tensor],
    step: int,
    moving: Tensor,
) -> None:
    """One step of AdamW (Loshchilov and Hutter 2019), multiplied by `moving`, which is 0 or 1."""
    first, second = BETAS
    torch._foreach_lerp_(means, list(gradients), 1 - first)
    torch._foreach_mul_(squares, second)
    torch._foreach_addcmul_(squares, list(gradients), list(gradients), 1 - second)
    denominators = torch._foreach_sqrt(squares)
    torch._foreach_div_(denominators, (1 - second**step) ** 0.5)
    torch._foreach_add_(denominators, EPSILON)
    updates = torch._foreach_div(means, denominators)
    torch._foreach_mul_(updates, LEARNING_RATE / (1 - first**step))
    torch._foreach_add_(updates, list(parameters), alpha=LEARNING_RATE * WEIGHT_DECAY)
    torch._foreach_mul_(updates, moving)
    torch._foreach_sub_(list(parameters), updates)
