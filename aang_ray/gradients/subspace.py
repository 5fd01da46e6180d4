"""The subspace that the end task's per-example gradients span, and a gradient seen from it.

Shape suffixes: M examples, P entries of the body's parameters, K directions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aang_ray.gradients.jacobian import ExampleJacobian
from aang_ray.gradients.products import inner


def span(jacobian: ExampleJacobian, omega_KM: Tensor, rotate: bool) -> Tensor:
    """V, [P, K]: an orthonormal basis of about the K leading right singular directions of J.

    Randomised SVD (Halko, Martinsson, Tropp 2011) without J (semantics section 6, line 1):

        Y = (Omega J)^T,  Q = orth(Y),  B = J Q = U S W^T,  V = Q W

    With `rotate` false it stops at Q. A direction that no example's gradient has (J of lower rank than K, or 0)
    becomes a column of zeros: orthonormalising would put an arbitrary one there. Memory: three times V.
    """
    Q_PK: Tensor = torch.linalg.qr(jacobian.left(omega_KM).t()).Q
    B_MK = jacobian.right(Q_PK)
    # A loss that is not finite fails the step by its own check; the decomposition must not fail before that.
    _, S_K, W_KK = torch.linalg.svd(B_MK.nan_to_num(), full_matrices=False)
    smallest = S_K[0] * max(B_MK.shape) * torch.finfo(B_MK.dtype).eps
    V_PK = Q_PK @ W_KK.t() if rotate else Q_PK
    sizes_K = S_K if rotate else torch.linalg.vector_norm(B_MK, dim=0)
    return V_PK.mul_(sizes_K.gt(smallest)).contiguous()


def reweighted(g_P: Tensor, V_PK: Tensor, p_K: Tensor, perp: float, plus: float, minus: float) -> tuple[Tensor, Tensor]:
    """eta_perp g_perp + eta_plus g_plus + eta_minus g_minus, [P], and the three parts' shares of ||g||^2, [3].

    With a = V^T g and p = V^T (the end task's mean gradient):

        g_plus = V (a where a p > 0),  g_minus = V (a where a p <= 0),  g_perp = g - g_plus - g_minus

    (semantics section 6, lines 2 and 3). Shares are in the order perp, plus, minus; all 0 where g is.
    """
    a_K = V_PK.t() @ g_P
    helps_K = a_K.sign() * p_K.sign() > 0  # the product of two small numbers could be rounded to 0
    weight_K = torch.where(helps_K, plus - perp, minus - perp)
    direction_P = torch.addmv(g_P, V_PK, weight_K.to(a_K.dtype) * a_K, beta=perp)
    norm2 = inner(g_P, g_P)
    inside = torch.stack(((a_K * helps_K).square().sum(), (a_K * ~helps_K).square().sum()))
    shares_2 = torch.where(norm2 > 0, inside / torch.where(norm2 > 0, norm2, 1.0), 0.0)
    rest = torch.where(norm2 > 0, (1 - shares_2.sum()).clamp_min(0), 0.0)
    return direction_P, torch.cat((rest.reshape(1), shares_2))
