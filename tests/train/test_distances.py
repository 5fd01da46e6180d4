"""Local distances between gradients, compared with autograd's gradients of each half."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from aang_ray.errors import UserError
from aang_ray.train.distances import _estimates, local_distances
from aang_ray.train.run import run_cell
from aang_ray.train.step import Stepper
from tests.train.running import parameters, stepper, tiny_config

NO_DROPOUT = ("encoder.dropout=0.0", "encoder.head_dropout=0.0")
FLAG = "gradients.local_distances=true"


def half_gradients(made: Stepper, step: int) -> dict[str, list[Tensor]]:
    """Gradients of the mean losses of both halves of every segment, each from a separate pass."""
    domain = made.setup.domain
    batch: Any = domain.batch(step, False, None)
    body = list(made.setup.encoder.parameters())
    found: dict[str, list[Tensor]] = {}
    for number, segment in enumerate(batch.segments[1:], start=1):
        middle = segment.examples // 2
        for start, stop in ((0, middle), (middle, segment.examples)):
            segments = [s.part(0, 0) for s in batch.segments]
            half = segments[number] = segment.part(start, stop)
            labels = half.examples if half.classes_E is not None else len(half.labelled_M)
            (piece,) = domain.pieces(type(batch)(step, batch.sampled, tuple(segments), batch.shares), 1000, False)
            loss = made.losses(piece)[number] * segment.normaliser / labels
            gradients = torch.autograd.grad(loss, body, allow_unused=True)
            flat = [torch.zeros_like(p) if g is None else g for p, g in zip(body, gradients, strict=True)]
            found.setdefault(segment.name, []).append(torch.cat([g.flatten() for g in flat]))
    return found


@pytest.mark.parametrize("micro", ["auto", "4"])
def test_they_are_inner_products_of_differences_of_halves(tiny: dict[str, Any], micro: str) -> None:
    made = stepper(
        tiny_config(tiny, "gradients.tied_in_scores=true", f"batch.micro={micro}", *NO_DROPOUT), torch.float64
    )
    found = local_distances(made, 3)
    made.setup.encoder.train()
    halves = half_gradients(made, 3)
    end_a, end_b = halves["end-task"]
    for name, (a, b) in halves.items():
        assert found[f"norm2/{name}"] == pytest.approx(float(a @ b), rel=1e-8, abs=1e-12)
        if name != "end-task":
            expected = float((a - end_a) @ (b - end_b))
            assert found[f"distance2/{name}"] == pytest.approx(expected, rel=1e-8, abs=1e-12)
    assert len(found) == 2 * len(halves) - 1


def test_the_estimate_is_unbiased_and_the_plain_norm_is_not() -> None:
    """All ways to draw two halves of one example each, with replacement, from {0, 2} and from {1, 5} (p = 1/4 each).

    g_E = 1 and g_k = 3: ||g_k - g_E||^2 = 4. The plain norm of the difference of the drawn means, 4 + variances,
    is 4 + 1/2 + 4/2 = 6.5 on average.
    """
    estimates, plain = [], []
    for end_a, end_b, k_a, k_b in itertools.product((0.0, 2.0), (0.0, 2.0), (1.0, 5.0), (1.0, 5.0)):
        halves = torch.tensor([end_a, end_b, k_a, k_b], dtype=torch.float64)
        estimates.append(_estimates(["E", "k"], torch.outer(halves, halves))["distance2/k"])
        plain.append(((k_a + k_b) / 2 - (end_a + end_b) / 2) ** 2)
    assert np.mean(estimates) == 4.0
    assert np.mean(plain) == 6.5


def test_looking_changes_nothing(tiny: dict[str, Any]) -> None:
    """With dropout, estimating the distances between steps does not change the parameters of a run."""
    one, other = (stepper(tiny_config(tiny)) for _ in range(2))
    for step in range(3):
        one.step(one.prepare(step))
        other.step(other.prepare(step))
        local_distances(other, step + 1)
    assert torch.equal(parameters(one), parameters(other))
    assert tiny_config(tiny).cell == tiny_config(tiny, FLAG).cell


def test_they_are_logged_beside_the_weights(tiny: dict[str, Any]) -> None:
    record = run_cell(tiny_config(tiny, "method=static", "schedule.steps=10", FLAG))
    health = record.weights[-1].health
    assert math.isfinite(health["norm2/end-task"])
    assert sum(name.startswith("distance2/") for name in health) == tiny_config(tiny).n


@pytest.mark.parametrize("method", ["alphavil", "diw"])
def test_rounds_log_those_of_the_objectives_that_they_train(tiny: dict[str, Any], method: str) -> None:
    """The run trains two objectives of the space."""
    settings = f"method={{name: {method}, round_steps: 1}}"
    record = run_cell(tiny_config(tiny, settings, "n=2", "schedule.steps=20", FLAG))
    assert len(record.weights) >= 2
    for row in record.weights:
        logged = {name.removeprefix("distance2/") for name in row.health if name.startswith("distance2/")}
        assert logged == set(row.weights)


@pytest.mark.parametrize("method", ["graddrop", "finetune", "tapt"])
def test_without_weights_there_is_no_place_for_them(tiny: dict[str, Any], method: str) -> None:
    with pytest.raises(UserError, match=rf"gradients\.local_distances: .* {method} has none"):
        tiny_config(tiny, f"method={method}", FLAG)
