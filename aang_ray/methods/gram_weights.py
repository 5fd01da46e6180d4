"""TorchJD's weightings by the names of the configuration."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor
from torchjd import aggregation

from aang_ray.config.methods.aggregations import (
    AlignedMtlConfig,
    CagradConfig,
    DualProjConfig,
    GramSection,
    ImtlGConfig,
    MgdaConfig,
    NashMtlConfig,
    PcgradConfig,
    Preference,
    UpgradConfig,
)


def gram_weights(config: GramSection, gram_mm: Tensor) -> Tensor:
    """Weights [m] of the gradients in the update, from their Gram matrix in host memory, not all 0; a lone one's is 1.

    TorchJD has absolute thresholds (1e-4 on the squared Frobenius norm, 1e-12 on sums), so it is given the Gram
    matrix over its trace t, that of the gradients over sqrt t. The weights are the same; Nash-MTL's, whose update has
    the same length for gradients of any scale, are divided by sqrt t. It computes in fp64: roots of the eigenvalues of
    an fp32 matrix would lose gradients that are 1e-4 of the others' length.
    """
    if len(gram_mm) == 1:
        return torch.ones_like(gram_mm[0])
    trace = gram_mm.trace()
    relative_mm = (gram_mm / trace).double()
    match config:
        case PcgradConfig():
            weighting = aggregation.PCGradWeighting()
        case MgdaConfig():
            weighting = aggregation.MGDAWeighting(config.epsilon, config.max_iters)
        case CagradConfig(c=0.0):
            weighting = aggregation.MeanWeighting()
        case CagradConfig():
            # Its own 1e-4 takes gradients for stationary, and stops, where one is that much shorter than the others.
            weighting = aggregation.CAGradWeighting(config.c, norm_eps=1e-6)
        case ImtlGConfig():
            weighting = aggregation.IMTLGWeighting()
        case AlignedMtlConfig():
            weighting = aggregation.AlignedMTLWeighting(preference(config.preference, relative_mm), config.scale_mode)
        case UpgradConfig():
            weighting = aggregation.UPGradWeighting(preference(config.preference, relative_mm))
        case DualProjConfig():
            weighting = aggregation.DualProjWeighting(preference(config.preference, relative_mm))
        case NashMtlConfig():
            nash_m: Tensor = nash_mtl(config, len(gram_mm)).weighting(square_root(relative_mm))
            return nash_m.to(gram_mm.dtype) / trace.sqrt()
        case _:
            raise TypeError(f"{type(config).__name__} names no weighting")
    weights_m: Tensor = weighting(relative_mm)
    return weights_m.to(gram_mm.dtype)


def nash_mtl(config: NashMtlConfig, rows: int) -> aggregation.NashMTL:
    """TorchJD's, new at every step: the solver's last solution would belong to other objectives."""
    # TorchJD builds its problem anew for every such object, and cvxpy would say that this is slow (some 60 ms).
    warnings.filterwarnings("ignore", message="You are solving a parameterized problem", category=UserWarning)
    return aggregation.NashMTL(rows, config.max_norm, update_weights_every=1, optim_niter=config.optim_niter)


def preference(kind: Preference, like: Tensor) -> Tensor | None:
    """Weights to start from, [m]; None is TorchJD's 1/m."""
    if kind == "uniform":
        return None
    others = len(like) - 1
    return torch.tensor([0.5] + [0.5 / others] * others, dtype=like.dtype, device=like.device)


def square_root(gram_mm: Tensor) -> Tensor:
    """A matrix [m, m] whose rows have this Gram matrix: to what depends on norms and angles alone, the gradients."""
    values_m, vectors_mm = torch.linalg.eigh(gram_mm)
    root_mm: Tensor = vectors_mm * values_m.clamp_min(0).sqrt()
    return root_mm
