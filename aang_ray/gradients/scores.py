"""How far each segment's gradient agrees with the dev gradient."""

from __future__ import annotations

import torch
from torch import Tensor


def cosine(dots_S: Tensor, norms2_S: Tensor) -> Tensor:
    """cos(v, g_s) = <v, g_s> / (||v|| ||g_s||), [S]; 0 where a norm is 0. Segment 0 is v.

    The norms are multiplied as square roots, so that small and large ones neither vanish nor overflow.
    (semantics section 3)
    """
    norms_S = norms2_S.clamp_min(0).sqrt()
    product_S = norms_S[0] * norms_S
    defined_S = product_S > 0
    return torch.where(defined_S, dots_S / torch.where(defined_S, product_S, 1.0), 0.0).clamp(-1.0, 1.0)
