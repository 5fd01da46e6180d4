"""The dev loss without the scale and the bias of the logits (docs/semantics.md, section 3).

How large a head's logits are, and how often it says each class, are two nuisances of the cross-entropy on dev. All
classification objectives share them, and they change sign as training over- and undershoots, so that most of the dev
gradient is about them. The calibrated loss is

    L = min over a, b of  CE(exp(a) z + b, y) + ridge/2 (a^2 + |b|^2)

and its gradient with respect to the body is that of CE(exp(a*) z + b*, y) with a* and b* constant (envelope theorem).
The derivative in the direction of a larger scale or of another bias is 0, except for the ridge.

Shape suffixes: K examples, C classes, Q = 1 + C calibration parameters (a, then b).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

RIDGE = 1e-2
"""Keeps a* finite for examples that the head separates, and makes b* unique."""
ITERATIONS, LONGEST = 12, 2.0
"""Steps of Newton's method, and the largest norm of a step."""
LENGTHS = (1.0, 0.5, 0.25, 0.0625)
"""Parts of a step that are tried."""


class Calibrated(nn.Module):
    """A head whose loss is calibrated on the examples that it is computed on.

    Args:
        head: the head, whose logits this module returns unchanged.
    """

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, features_KH: Tensor) -> Tensor:
        """Return the head's logits, [K, C]."""
        logits_KC: Tensor = self.head(features_KH)
        return logits_KC


def calibrated(logits_KC: Tensor, labels_K: Tensor, weights_K: Tensor) -> Tensor:
    """Return exp(a*) z + b*, [K, C], differentiable with respect to z alone.

    Args:
        logits_KC: the head's logits z.
        labels_K: the classes.
        weights_K: weights of the examples in the loss; they need not sum to 1, and may be 0.
    """
    scale, bias_C = fit(logits_KC.detach(), labels_K, weights_K)
    return scale.to(logits_KC.dtype) * logits_KC + bias_C.to(logits_KC.dtype)


@torch.no_grad()
def fit(logits_KC: Tensor, labels_K: Tensor, weights_K: Tensor) -> tuple[Tensor, Tensor]:
    """Return exp(a*), a scalar, and b*, [C].

    Newton's method. Of each step the best of four lengths is taken: where the logits say nothing, a* is far below 0 and
    whole steps jump to and fro around it. All lengths are computed, so nothing waits for a GPU.
    """
    z_KC = logits_KC.double()
    examples, classes = z_KC.shape
    share_K = weights_K.double() / weights_K.double().sum().clamp_min(1e-30)
    target_KC = F.one_hot(labels_K, classes).double()
    eye_CC = torch.eye(classes, dtype=z_KC.dtype, device=z_KC.device)
    ridge_QQ = RIDGE * torch.eye(1 + classes, dtype=z_KC.dtype, device=z_KC.device)
    lengths_L1 = torch.tensor(LENGTHS, dtype=z_KC.dtype, device=z_KC.device)[:, None]
    found_Q = z_KC.new_zeros(1 + classes)
    for _ in range(ITERATIONS):
        scaled_KC = found_Q[0].exp() * z_KC
        p_KC = (scaled_KC + found_Q[1:]).softmax(1)
        # The derivatives of the logits with respect to (a, b), and the same less their means over the classes.
        jacobian_KCQ = torch.cat((scaled_KC[:, :, None], eye_CC.expand(examples, -1, -1)), dim=2)
        centred_KCQ = jacobian_KCQ - torch.einsum("kc,kcq->kq", p_KC, jacobian_KCQ)[:, None]
        gradient_Q = torch.einsum("k,kc,kcq->q", share_K, p_KC - target_KC, jacobian_KCQ)
        hessian_QQ = torch.einsum("k,kc,kcq,kcr->qr", share_K, p_KC, centred_KCQ, centred_KCQ) + ridge_QQ
        # exp(a) is its own second derivative. Half of what is positive is kept, so that steps go downhill.
        hessian_QQ[0, 0] += torch.maximum(gradient_Q[0], -hessian_QQ[0, 0] / 2)
        step_Q, _ = torch.linalg.solve_ex(hessian_QQ, gradient_Q + RIDGE * found_Q)
        tried_LQ = found_Q - lengths_L1 * (step_Q * (LONGEST / step_Q.norm().clamp_min(LONGEST)))
        logits_LKC = tried_LQ[:, 0].exp()[:, None, None] * z_KC + tried_LQ[:, None, 1:]
        losses_L = -torch.einsum("k,kc,lkc->l", share_K, target_KC, logits_LKC.log_softmax(2))
        best = (losses_L + RIDGE / 2 * tried_LQ.square().sum(1)).argmin(keepdim=True)
        found_Q = tried_LQ.index_select(0, best)[0]
    return found_Q[0].exp(), found_Q[1:]
