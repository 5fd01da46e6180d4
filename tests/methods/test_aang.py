"""AANG's meta-gradient, its factors, and what it leaves alone."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from aang_ray.config.methods import AangConfig
from aang_ray.methods.aang import Aang, Evidence, logits
from tests.methods.problem import NAMES, Problem, dense_answer, sampled, weighting


def paper(**changes: Any) -> AangConfig:
    """The search of the paper, with changes."""
    settings = {"aux_lr": 0.1, "update": "sgd", "dev_head": "refit", "dev_calibration": False, "dev_memory": 0.0}
    return AangConfig.model_validate(settings | changes)


def observe_once(config: AangConfig, gradients_SP: Tensor, objectives: tuple[int, ...]) -> Aang:
    method = Aang(weighting(), config)
    chosen = sampled(*objectives)
    method.observe(chosen, dense_answer(gradients_SP, method.request(chosen)))
    return method


def test_worked_example_with_two_parameters() -> None:
    # v = (1, 0); g_E = (3, 4); g_0 = (0, 2); g_1 = (-5, 0). Cosines: s_E = 3/5, s_0 = 0, s_1 = -1.
    # At the start w = (1/2, 1/2): gbar = (-5/2, 1), s_X = -(5/2) / sqrt(25/4 + 1) = -2.5 / 2.692582 = -0.928477.
    # Identity: dz = (0, 1), da = (-0.6, 0.928477). One step of SGD with aux_lr = 2 and sopt_lr = 0.5:
    # objective 0 (mask, bidirectional, denoise) gets 0; objective 1 (replace, left-to-right, denoise) gets -2
    # in each of its factors; they share D = end-task and O = denoise, which get 0 + -2.
    gradients = torch.tensor([[1.0, 0.0], [3.0, 4.0], [0.0, 2.0], [-5.0, 0.0]], dtype=torch.float64)
    config = paper(aux_lr=2.0, sopt_lr=0.5, meta_every=1)
    method = observe_once(config, gradients, (0, 1))
    factors = method.factors()
    assert factors["A"].tolist() == [0.0, -2.0, 0.0, 0.0]
    assert factors["D"].tolist() == [-2.0, 0.0]
    assert factors["T"].tolist() == [0.0, -2.0, 0.0]
    assert factors["R"].tolist() == [0.0, -2.0, 0.0]
    assert factors["O"].tolist() == [-2.0, 0.0]
    assert method.weighting.lambda_logits_2.tolist() == pytest.approx([0.3, -0.4642385], abs=1e-6)
    # Afterwards z = (0 - 2 + 0 + 0 - 2, 5 * -2) = (-4, -10).
    chosen = sampled(0, 1)
    z = logits(method.weighting.flat_F, method.weighting.entries(chosen))
    assert z.tolist() == [-4.0, -10.0]
    expected = torch.softmax(torch.tensor([-4.0, -10.0], dtype=torch.float64), 0)
    torch.testing.assert_close(method.weighting.weights(chosen), expected)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 1000), state=st.integers(0, 1000))
def test_dot_softmax_is_the_derivative_of_the_dev_loss(seed: int, state: int) -> None:
    """dL_dev(theta - beta d)/d(z, a) / beta as beta -> 0, against central differences in float64."""
    problem = Problem.random(6, seed)
    chosen = sampled(0, 1, 2, 3)
    method = Aang(weighting(), paper(score="dot", jacobian="softmax", aux_lr=1.0, sopt_lr=1.0, meta_every=100))
    generator = torch.Generator().manual_seed(state)
    w = method.weighting
    w.flat_F = 0.5 * torch.randn(w.index.size, generator=generator, dtype=torch.float64)
    w.lambda_logits_2 = torch.randn(2, generator=generator, dtype=torch.float64)
    gradients_SP = problem.gradients_SP()
    method.observe(chosen, dense_answer(gradients_SP, method.request(chosen)))

    def dev_loss_after(flat_F: Tensor, lambda_logits_2: Tensor, beta: float) -> Tensor:
        z = logits(flat_F, w.entries(chosen))
        weight = torch.softmax(z, 0)
        lam = torch.softmax(lambda_logits_2, 0)[0]
        d = lam * gradients_SP[1] + (1 - lam) * (weight @ gradients_SP[2:])
        return problem.loss(0, problem.theta_P - beta * d)

    beta, h = 1e-5, 1e-3
    for index in range(w.index.size + 2):
        step_F, step_2 = torch.zeros_like(w.flat_F), torch.zeros(2, dtype=torch.float64)
        (step_F if index < w.index.size else step_2)[index if index < w.index.size else index - w.index.size] = h
        plus = dev_loss_after(w.flat_F + step_F, w.lambda_logits_2 + step_2, beta)
        minus = dev_loss_after(w.flat_F - step_F, w.lambda_logits_2 - step_2, beta)
        numeric = float((plus - minus) / (2 * h * beta))
        analytic = method._gradient_F[index] if index < w.index.size else method._gradient_2[index - w.index.size]
        assert float(analytic) == pytest.approx(numeric, rel=2e-3, abs=2e-3)


@pytest.mark.parametrize("score", ["dot", "cosine"])
def test_one_objective_has_nothing_to_learn_about_its_weight_under_softmax(score: str) -> None:
    config = paper(score=score, jacobian="softmax", meta_every=1)
    method = observe_once(config, Problem.random(3, 1).gradients_SP(), (2,))
    assert method.weighting.flat_F.abs().max() < 1e-12
    assert method.weighting.lambda_logits_2.abs().max() > 0


def test_with_both_rates_zero_no_statistics_are_asked_for() -> None:
    method = Aang(weighting(), paper(aux_lr=0.0, sopt_lr=0.0))
    request = method.request(sampled(0, 1))
    assert not method.uses_dev
    assert (request.scores, request.gram, request.separate, request.joint_from) == (False, False, False, None)
    torch.testing.assert_close(request.coefficients_S, torch.tensor([0.0, 0.5, 0.25, 0.25]).double())
    method.observe(sampled(0, 1), dense_answer(torch.randn(4, 3), request))
    assert method.weighting.flat_F.abs().max() == 0


def test_averaging_over_meta_every_steps() -> None:
    problems = [Problem.random(4, seed) for seed in range(3)]
    averaged = Aang(weighting(), paper(meta_every=3, score="dot", aux_lr=1.0))
    total = torch.zeros_like(averaged.weighting.flat_F)
    for problem in problems:
        assert averaged.weighting.flat_F.abs().max() == 0
        chosen = sampled(0, 3)
        averaged.observe(chosen, problem.answer(averaged.request(chosen)))
        single = observe_once(paper(meta_every=1, score="dot", aux_lr=1.0), problem.gradients_SP(), (0, 3))
        total += single.weighting.flat_F
    torch.testing.assert_close(averaged.weighting.flat_F, total / 3)


def test_an_objective_without_labels_does_not_move() -> None:
    gradients = Problem.random(4, 0).gradients_SP()
    gradients[2] = 0.0
    method = Aang(weighting(), paper(meta_every=1, jacobian="softmax"))
    chosen = sampled(0, 1)
    chosen = type(chosen)(chosen.step, chosen.objectives, chosen.shares, (0.0, 5.0))
    method.observe(chosen, dense_answer(gradients, method.request(chosen)))
    assert method.factors()["A"][0] == 0.0
    assert method.factors()["A"][1] != 0.0


@settings(deadline=None, max_examples=30)
@given(scale=st.sampled_from([0.0, 1e-30, 1e-12, 1.0, 1e12]), seed=st.integers(0, 50))
def test_everything_stays_finite(scale: float, seed: int) -> None:
    gradients = Problem.random(5, seed).gradients_SP() * scale
    for score in ("cosine", "dot"):
        for jacobian in ("identity", "softmax"):
            config = paper(score=score, jacobian=jacobian, meta_every=1)
            method = observe_once(config, gradients, (0, 1, 2))
            assert torch.isfinite(method.weighting.flat_F).all()
            assert torch.isfinite(method.weighting.lambda_logits_2).all()


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 50), factor=st.floats(0.01, 100))
def test_cosine_ignores_the_scale_of_a_gradient_and_dot_follows_it(seed: int, factor: float) -> None:
    gradients = Problem.random(4, seed).gradients_SP()
    scaled = gradients.clone()
    scaled[0] *= factor
    for score, ratio in (("cosine", 1.0), ("dot", factor)):
        config = paper(score=score, meta_every=1)
        one, other = observe_once(config, gradients, (0, 1)), observe_once(config, scaled, (0, 1))
        torch.testing.assert_close(other.weighting.flat_F, one.weighting.flat_F * ratio, rtol=1e-4, atol=1e-7)


def test_the_order_of_objectives_does_not_matter() -> None:
    gradients = Problem.random(5, 3).gradients_SP()
    forward = observe_once(paper(meta_every=1), gradients, (0, 1, 3))
    swapped = observe_once(paper(meta_every=1), gradients[[0, 1, 4, 3, 2]], (3, 1, 0))
    torch.testing.assert_close(forward.weighting.flat_F, swapped.weighting.flat_F)
    torch.testing.assert_close(forward.weighting.lambda_logits_2, swapped.weighting.lambda_logits_2)


def test_published_joint_score_uses_label_counts_and_clipped_gradients() -> None:
    # v = (1, 0); g_0 = (20, 0) with 3 labels, clipped to (10, 0); g_1 = (0, 5) with 8 labels.
    # Joint = 3 (10, 0) + 8 (0, 5) = (30, 40): s_X = 30 / 50 = 0.6.
    gradients = torch.tensor([[1.0, 0.0], [1.0, 1.0], [20.0, 0.0], [0.0, 5.0]], dtype=torch.float64)
    method = Aang(weighting(), paper(auxiliary_score="published", sopt_lr=1.0, meta_every=1))
    chosen = sampled(0, 1)
    chosen = type(chosen)(chosen.step, chosen.objectives, chosen.shares, (3.0, 8.0))
    method.observe(chosen, dense_answer(gradients, method.request(chosen)))
    assert method.weighting.lambda_logits_2[1].item() == pytest.approx(0.6)


def test_state_round_trip() -> None:
    method = observe_once(paper(meta_every=2), Problem.random(4, 0).gradients_SP(), (0, 1))
    fresh = Aang(weighting(), paper(meta_every=2))
    fresh.load_state_dict(method.state_dict())
    chosen = sampled(1, 2)
    for either in (method, fresh):
        either.observe(chosen, Problem.random(4, 1).answer(either.request(chosen)))
    assert torch.equal(method.weighting.flat_F, fresh.weighting.flat_F)
    assert method.weighting.flat_F.abs().max() > 0


def test_the_row_for_the_store() -> None:
    method = observe_once(paper(meta_every=1), Problem.random(4, 0).gradients_SP(), (0, 1))
    row = method.describe(sampled(0, 1))
    assert sum(row.weights.values()) == pytest.approx(1.0)
    assert set(row.weights) == set(NAMES["A"][:2])
    assert set(row.factors) == {"A", "D", "T", "R", "O"}
    assert -1 <= row.health["cos_dev_end_task"] <= 1


def evidence() -> Aang:
    return Aang(weighting(), paper(update="evidence", aux_lr=1.0, sopt_lr=1.0))


def test_evidence_is_a_self_normalised_sum_of_centred_scores() -> None:
    # v = (1, 0); g_E = (1, 0). First: g_0 = (1, 0), g_1 = (0, 1): cosines 1, 0, x = (1/2, -1/2). After t such steps
    # z of A_0 is sqrt(t), and A_0 = aux_lr (sqrt(t) - 1). T and R are as A. D and O are used by both: x = 0.
    # s_E = 1 and s_X = cos((1, 0), (1, 1)) = 0.7071 at both first steps: z of lambda is sqrt(2) after the second.
    method, chosen = evidence(), sampled(0, 1)
    first = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    for step in range(1, 4):
        method.observe(chosen, dense_answer(first, method.request(chosen)))
        for letter, used in (("A", 0), ("T", 1), ("R", 0)):
            assert abs(method.factors()[letter][used]) == pytest.approx(math.sqrt(step) - 1, abs=1e-9)
        assert method.factors()["A"][1] == -method.factors()["A"][0]
        if step == 2:
            expected = [math.sqrt(2) - 1, 1 - math.sqrt(2)]
            assert method.weighting.lambda_logits_2.tolist() == pytest.approx(expected)
    # Then g_0 = (3, 4), g_1 = (2, 0): cosines 0.6, 1, x = (-0.2, 0.2); z = (1.5 - 0.2) / sqrt(0.75 + 0.04) = 1.46261.
    second = torch.tensor([[1.0, 0.0], [1.0, 0.0], [3.0, 4.0], [2.0, 0.0]], dtype=torch.float64)
    method.observe(chosen, dense_answer(second, method.request(chosen)))
    assert method.factors()["A"].tolist() == pytest.approx([0.46261, -0.46261, 0.0, 0.0], abs=1e-5)
    assert not method.factors()["D"].any()
    assert not method.factors()["O"].any()


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10_000))
def test_noise_moves_evidence_by_a_few_units_only_and_a_mean_moves_it_without_bound(seed: int) -> None:
    """P(|z| > 6) <= 2 exp(-18) for symmetric noise, also if its scale changes."""
    generator = torch.Generator().manual_seed(seed)
    noise, signal = Evidence.none(torch.zeros(50)), Evidence.none(torch.zeros(50))
    for step in range(400):
        values = torch.randn(50, generator=generator) * 10 ** (step / 100)
        noise.add(values)
        signal.add(torch.randn(50, generator=generator) + 0.7)
        assert float(noise.z_F.abs().max()) < 6
    assert float(signal.z_F.min()) > 6


def test_an_objective_without_labels_is_no_evidence() -> None:
    gradients = Problem.random(5, 0).gradients_SP()
    gradients[3] = 0.0
    method = evidence()
    chosen = sampled(0, 1, 2)
    chosen = type(chosen)(chosen.step, chosen.objectives, chosen.shares, (5.0, 0.0, 5.0))
    for _ in range(2):
        method.observe(chosen, dense_answer(gradients, method.request(chosen)))
    found = method.factors()["A"]
    assert found[1] == 0.0
    assert found[0] == pytest.approx(-found[2])
    assert abs(found[0]) == pytest.approx(math.sqrt(2) - 1)


def test_scores_are_taken_with_the_running_mean_of_earlier_dev_gradients() -> None:
    config = paper(dev_memory=0.75, dev_every=2, meta_every=1, aux_lr=1.0)
    method = Aang(weighting(), config)
    mean_P, seen = None, []
    moved = torch.zeros(2, dtype=torch.float64)
    for step in range(5):
        gradients_SP = Problem.random(4, step).gradients_SP()
        if step % 2:
            gradients_SP[0] = 0.0  # no dev batch
        chosen = replace(sampled(0, 1), step=step)
        assert method.samples_dev_at(step) == (step % 2 == 0)
        request = method.request(chosen)
        assert (request.reference_P is None) == (step == 0)
        method.observe(chosen, dense_answer(gradients_SP, request))
        if mean_P is not None:
            moved += torch.nn.functional.cosine_similarity(gradients_SP[2:], mean_P[None])
        if step % 2 == 0:
            seen.append(gradients_SP[0])
            shares = torch.tensor([0.75 ** (len(seen) - 1 - i) for i in range(len(seen))], dtype=torch.float64)
            mean_P = (shares / shares.sum()) @ torch.stack(seen)
        torch.testing.assert_close(torch.from_numpy(method.factors()["A"][:2].copy()), moved)


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"dev_every": 2}, "set dev_memory"),
        ({"dev_every": 2, "head_refit_every": 3, "dev_memory": 0.5}, "a multiple of the other"),
        ({"dev_memory": 0.5, "auxiliary_score": "published"}, "auxiliary_score: published"),
        ({"update": "evidence", "jacobian": "softmax"}, "jacobian: softmax"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings_: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        paper(**settings_)
