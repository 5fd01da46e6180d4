"""How far each objective's gradient is from the end task's, at the parameters as they are. (semantics section 9)

With every segment's examples split into halves a and b,

    <g_k^a - g_E^a, g_k^b - g_E^b>

is unbiased for ||g_k - g_E||^2, because the halves' batch noise is independent; the plain norm of the difference is
inflated by it. Assumption A.1 of Dery et al. 2023 bounds the same norm over all parameters, so this is a local estimate
of Delta_k^2. A mean over labels whose number is random is unbiased for given numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from aang_ray.gradients.engine import Request
from aang_ray.objectives import randomness
from aang_ray.train.domain import DomainPiece
from aang_ray.train.step import Stepper

DISTANCE, NORM = "distance2", "norm2"
"""Prefixes of the logged names: estimates of ||g_k - g_E||^2 and of ||g||^2. An estimate may be below 0."""


def local_distances(stepper: Stepper, step: int) -> dict[str, float]:
    """The estimates on the batch of a step that is still to come, by `distance2/<objective>` and `norm2/<segment>`.

    One forward and one backward pass, or one for each objective where the batch does not fit in one piece. Parameters,
    their `.grad` and the following steps stay what they are. A segment with fewer than two examples, or a half without
    labels, is left out. Waits for the device.
    """
    domain = stepper.setup.domain
    batch: Any = stepper.look_ahead(step)
    weights = domain.label_weights
    parts = [(segment.name, _halves(segment)) for segment in batch.segments[1:]]
    usable = [(name, halves) for name, halves in parts if all(weights([half])[0] > 0 for half in halves)]
    if len(usable) < 2 or usable[0][0] != parts[0][0]:
        return {}
    groups = [usable]
    nothing = batch.segments[0].part(0, 0)
    if len(_pieces(stepper, batch, nothing, usable)) > 1:
        groups = [[usable[0], one] for one in usable[1:]]
    estimates: dict[str, float] = {}
    torch.manual_seed(int(randomness.keys(stepper.setup.config.seed, step)[0] >> 1))
    for group in groups:
        segments = [half for _, halves in group for half in halves]
        gram_SS = _gram(stepper, _pieces(stepper, batch, nothing, group))
        # A half's loss is its share of the whole segment's mean: undo that.
        scale_S = gram_SS.new_tensor(
            [half.normaliser / weight for half, weight in zip(segments, weights(segments), strict=True)]
        )
        estimates |= _estimates([name for name, _ in group], gram_SS * scale_S[:, None] * scale_S)
    return estimates


def _estimates(names: Sequence[str], gram_SS: Tensor) -> dict[str, float]:
    """From inner products of half gradients, in the order E^a, E^b, 1^a, 1^b, ..."""
    a_n = torch.arange(0, len(gram_SS), 2, device=gram_SS.device)
    between_nn = gram_SS[a_n][:, a_n + 1]
    """<g_i^a, g_j^b>."""
    norms_n = between_nn.diagonal()
    distances_n = norms_n - between_nn[:, 0] - between_nn[0] + norms_n[0]
    norms, distances = norms_n.tolist(), distances_n.tolist()
    found = {f"{NORM}/{name}": norm for name, norm in zip(names, norms, strict=True)}
    return found | {f"{DISTANCE}/{name}": distance for name, distance in zip(names[1:], distances[1:], strict=True)}


def _halves(segment: Any) -> tuple[Any, Any]:
    middle = segment.texts // 2
    return segment.part(0, middle), segment.part(middle, segment.texts)


def _pieces(stepper: Stepper, batch: Any, nothing: Any, group: Sequence[tuple[str, tuple[Any, Any]]]) -> Sequence[Any]:
    segments = (nothing, *(half for _, halves in group for half in halves))
    halved = replace(batch, segments=segments)
    return stepper.setup.domain.pieces(halved, stepper.micro.texts, stepper.engine.per_segment)


def _gram(stepper: Stepper, pieces: Sequence[DomainPiece]) -> Tensor:
    """<h_s, h_t> of the halves' shares of their losses, without the empty dev segment, in fp64."""
    setup = stepper.setup
    kept = {p: p.grad for p in (*setup.encoder.parameters(), *setup.heads.parameters())}
    for parameter in kept:
        parameter.grad = None
    segments = pieces[0].tokens.count
    setup.encoder.train()
    setup.heads.train()
    request = Request(torch.zeros(segments, device=setup.compute.device), gram=True)
    gradients = stepper.engine(pieces, stepper.losses, request)
    for parameter, gradient in kept.items():
        parameter.grad = gradient
    assert gradients.gram_SS is not None
    return gradients.gram_SS[1:, 1:].double()
