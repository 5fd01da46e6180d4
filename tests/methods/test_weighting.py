"""Weights and coefficients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aang_ray.methods.base import Sampled
from aang_ray.methods.plain import Finetune, Static
from tests.methods.problem import NAMES, sampled, weighting


@settings(deadline=None)
@given(
    st.lists(st.floats(-500, 500), min_size=14, max_size=14),
    st.floats(-500, 500),
    st.sets(st.integers(0, 3), min_size=1),
)
def test_weights_and_coefficients_sum_to_one(flat: list[float], lam: float, objectives: set[int]) -> None:
    made = weighting()
    made.flat_F = torch.tensor(flat, dtype=torch.float64)
    made.lambda_logits_2 = torch.tensor([lam, -lam], dtype=torch.float64)
    chosen = sampled(*sorted(objectives))
    assert made.weights(chosen).sum().item() == pytest.approx(1.0)
    coefficients = made.coefficients(chosen)
    assert coefficients.sum().item() == pytest.approx(1.0)
    assert coefficients[0] == 0
    assert torch.isfinite(coefficients).all()


def test_everything_starts_equal() -> None:
    coefficients = Static(weighting()).request(sampled(0, 1, 2, 3)).coefficients_S
    assert coefficients.tolist() == [0.0, 0.5, 0.125, 0.125, 0.125, 0.125]
    assert Finetune(torch.device("cpu")).request(sampled()).coefficients_S.tolist() == [0.0, 1.0]


def test_published_coefficients_are_not_renormalised() -> None:
    # A + O alone decide, and the share b / B multiplies: with A = (1, 0, ...) and O(end-task) = 2 for objective 2,
    # logits over S = {0, 2} are (1, 2): softmax = (0.268941, 0.731059); shares (0.5, 0.25) give (0.134471, 0.182765).
    made = weighting(published=True)
    entries = {letter: dict.fromkeys(names, 0.0) for letter, names in NAMES.items()}
    entries["A"][NAMES["A"][0]] = 1.0
    entries["O"]["end-task"] = 2.0
    entries["R"]["random-factorized"] = 100.0  # of objective 2; enters the batch sizes, not the coefficient
    flat = [value for letter in "ADTRO" for value in entries[letter].values()]
    made.flat_F = torch.tensor(flat, dtype=torch.float64)
    chosen = Sampled(0, (0, 2), (0.5, 0.25), (1.0, 1.0))
    assert made.weights(chosen).tolist() == pytest.approx([0.134471, 0.182765], abs=1e-6)
    assert made.coefficients(chosen).tolist() == pytest.approx([0.0, 0.5, 0.0672355, 0.0913825], abs=1e-6)
