"""The calibrated loss: its gradient, what it is blind to, and hard cases."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from aang_ray.model.segments import SegmentRows
from aang_ray.objectives.batch import Targets
from aang_ray.objectives.calibration import RIDGE, Calibrated, calibrated, fit
from aang_ray.objectives.losses import head_losses

EXAMPLES, HIDDEN, CLASSES = 12, 5, 3


def problem(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, nn.Module]:
    """Features, labels, weights (two of them 0) and a head, in fp64."""
    generator = torch.Generator().manual_seed(seed)
    features_KH = torch.randn(EXAMPLES, HIDDEN, generator=generator, dtype=torch.float64)
    labels_K = torch.randint(CLASSES, (EXAMPLES,), generator=generator)
    weights_K = torch.rand(EXAMPLES, generator=generator, dtype=torch.float64) + 0.2
    weights_K[-2:] = 0.0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = nn.Sequential(nn.Linear(HIDDEN, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, CLASSES)).double()
    return features_KH, labels_K, weights_K / weights_K.sum(), head


def cross_entropy(logits_KC: Tensor, labels_K: Tensor, weights_K: Tensor) -> Tensor:
    return (F.cross_entropy(logits_KC, labels_K, reduction="none") * weights_K).sum()


@pytest.mark.parametrize("scale", [0.3, 1.0, 5.0])
def test_the_gradient_is_that_of_the_minimum_over_scale_and_bias(scale: float) -> None:
    """Against central differences of min over (a, b) of the weighted loss, in fp64."""
    features_KH, labels_K, weights_K, head = problem()

    def smallest(features_KH: Tensor) -> Tensor:
        z_KC = scale * head(features_KH)
        factor, bias_C = fit(z_KC, labels_K, weights_K)
        ridge = RIDGE / 2 * (factor.log() ** 2 + bias_C.square().sum())
        return cross_entropy(factor * z_KC + bias_C, labels_K, weights_K) + ridge

    leaf_KH = features_KH.clone().requires_grad_()
    loss = cross_entropy(calibrated(scale * head(leaf_KH), labels_K, weights_K), labels_K, weights_K)
    (gradient_KH,) = torch.autograd.grad(loss, leaf_KH)
    step = 1e-5
    for k in range(EXAMPLES):
        for h in range(HIDDEN):
            moved_KH = torch.zeros_like(features_KH)
            moved_KH[k, h] = step
            with torch.no_grad():
                slope = (smallest(features_KH + moved_KH) - smallest(features_KH - moved_KH)) / (2 * step)
            assert float(gradient_KH[k, h]) == pytest.approx(float(slope), abs=1e-7)
    assert not gradient_KH[-2:].any(), "an example without weight has no part in it"


def test_a_larger_scale_and_another_bias_do_not_change_the_loss_to_first_order() -> None:
    features_KH, labels_K, weights_K, head = problem(1)
    scale, bias_C = torch.ones((), dtype=torch.float64), torch.zeros(CLASSES, dtype=torch.float64)
    scale.requires_grad_()
    bias_C.requires_grad_()
    z_KC = 7.0 * head(features_KH).detach() + torch.tensor([3.0, 0.0, -1.0])
    plain = torch.autograd.grad(cross_entropy(scale * z_KC + bias_C, labels_K, weights_K), (scale, bias_C))
    logits_KC = calibrated(scale * z_KC + bias_C, labels_K, weights_K)
    found = torch.autograd.grad(cross_entropy(logits_KC, labels_K, weights_K), (scale, bias_C))
    for one, other in zip(found, plain, strict=True):
        assert float(one.norm()) < 0.1 * float(other.norm())


@pytest.mark.parametrize("scale", [0.0, 1e-6, 1e3])
def test_hard_cases_stay_finite(scale: float) -> None:
    """Logits that are all 0, or that separate the classes, or one class only."""
    for labels_K in (torch.tensor([0, 1, 2, 0]), torch.zeros(4, dtype=torch.int64)):
        z_KC = scale * F.one_hot(torch.tensor([0, 1, 2, 0]), CLASSES).float()
        factor, bias_C = fit(z_KC, labels_K, torch.full((4,), 0.25))
        assert torch.isfinite(factor)
        assert torch.isfinite(bias_C).all()
        assert torch.isfinite(calibrated(z_KC, labels_K, torch.zeros(4))).all()


def test_a_calibrated_head_changes_the_loss_of_its_own_targets_alone() -> None:
    features_KH, labels_K, weights_K, head = problem()
    rows = SegmentRows((0, EXAMPLES, EXAMPLES))
    segment_K = torch.zeros(EXAMPLES, dtype=torch.int64)
    targets = Targets("dev", torch.arange(EXAMPLES), labels_K, weights_K, segment_K, rows)
    plain_S = head_losses({"dev": head}, features_KH, [targets], 2)
    found_S = head_losses({"dev": Calibrated(head)}, features_KH, [targets], 2)
    assert float(plain_S[0]) == pytest.approx(float(cross_entropy(head(features_KH), labels_K, weights_K)))
    assert float(found_S[0]) < float(plain_S[0])
    assert not found_S[1]
