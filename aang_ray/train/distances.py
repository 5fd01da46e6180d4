"""Squared distance between each objective's gradient and the end task's, at the current parameters.

See docs/semantics.md, section 9. Split every segment's examples into halves a and b. Then

    <g_k^a - g_E^a, g_k^b - g_E^b>

is an unbiased estimate of ||g_k - g_E||^2, the norm that assumption A.1 of Dery et al. 2023 bounds: the batch noise of
the halves is independent.

Shape suffixes: S half segments (E^a, E^b, 1^a, 1^b, ...), N segments.
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
    """Estimate the distances on the batch of step `step` at the current parameters. Waits for the device.

    This makes one forward and one backward pass, or one for each objective if the batch does not fit into one piece. It
    does not change parameters, their `.grad` or later steps.

    Returns:
        Estimates by name: `distance2/<objective>` and `norm2/<segment>`. A segment is left out if it has fewer than two
        examples or a half without labels. The result is empty if the end task is left out.
    """
    domain = stepper.setup.domain
    batch: Any = stepper.batch(step)
    weights = domain.label_weights
    parts = [(segment.name, _halves(segment)) for segment in batch.segments[1:]]
    usable = [(name, halves) for name, halves in parts if all(weights([half])[0] > 0 for half in halves)]
    if len(usable) < 2 or usable[0][0] != parts[0][0]:
        return {}
    no_dev = batch.segments[0].part(0, 0)

    def pieces(group: Sequence[tuple[str, tuple[Any, Any]]]) -> Sequence[DomainPiece]:
        halved = replace(batch, segments=(no_dev, *(half for _, halves in group for half in halves)))
        made: Sequence[DomainPiece] = domain.pieces(halved, stepper.micro.texts, stepper.engine.per_segment)
        return made

    groups = [usable] if len(pieces(usable)) == 1 else [[usable[0], one] for one in usable[1:]]
    estimates: dict[str, float] = {}
    torch.manual_seed(int(randomness.keys(stepper.setup.config.seed, step)[0] >> 1))
    for group in groups:
        halves = [half for _, halves in group for half in halves]
        gram_SS = _gram(stepper, pieces(group))
        # The loss of a half is normalised by the labels of the whole segment: scale it to the half's own mean.
        scale_S = gram_SS.new_tensor([h.normaliser / weight for h, weight in zip(halves, weights(halves), strict=True)])
        estimates |= _estimates([name for name, _ in group], gram_SS * scale_S[:, None] * scale_S)
    return estimates


def _estimates(names: Sequence[str], gram_SS: Tensor) -> dict[str, float]:
    """Return the estimates from the inner products of half gradients, in the order E^a, E^b, 1^a, 1^b, ..."""
    between_NN = gram_SS[0::2, 1::2]  # <g_i^a, g_j^b>
    norms_N = between_NN.diagonal()
    distances_N = norms_N - between_NN[:, 0] - between_NN[0] + norms_N[0]
    norms, distances = norms_N.tolist(), distances_N.tolist()
    found = {f"{NORM}/{name}": norm for name, norm in zip(names, norms, strict=True)}
    return found | {f"{DISTANCE}/{name}": distance for name, distance in zip(names[1:], distances[1:], strict=True)}


def _halves(segment: Any) -> tuple[Any, Any]:
    middle = segment.examples // 2
    return segment.part(0, middle), segment.part(middle, segment.examples)


def _gram(stepper: Stepper, pieces: Sequence[DomainPiece]) -> Tensor:
    """Return the inner products of the half segments' gradients, [S, S], in fp64; `.grad` stays as it was."""
    setup = stepper.setup
    gradient_of = {p: p.grad for p in (*setup.encoder.parameters(), *setup.heads.parameters())}
    for parameter in gradient_of:
        parameter.grad = None
    setup.encoder.train()
    setup.heads.train()
    request = Request(torch.zeros(pieces[0].tokens.count, device=setup.compute.device), gram=True)
    gradients = stepper.engine(pieces, stepper.losses, request)
    for parameter, gradient in gradient_of.items():
        parameter.grad = gradient
    assert gradients.gram_SS is not None
    return gradients.gram_SS[1:, 1:].double()  # without the empty dev segment
