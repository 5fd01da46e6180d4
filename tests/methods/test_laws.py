"""What every method obeys, or says why it cannot (`cases.py`)."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.methods.cases import CASES, DRIVEN, NAMES, case
from tests.methods.driving import Driven
from tests.methods.problem import Problem

STEPS = 3


def driven(name: str, **changes: Any) -> Driven:
    """A method in its case's settings."""
    objectives = case(name).objectives
    return Driven(name, n=max(1, len(objectives)), **{**case(name).settings, **changes})


def gradients(name: str, step: int) -> Tensor:
    """Of dev, end task and objectives at a step; dev's is 0 where a method asks for none."""
    found_SP = Problem.random(2 + len(case(name).objectives), 10 + step).gradients_SP()
    if not driven(name).method.uses_dev:
        found_SP[0] = 0.0
    return found_SP


def losses(name: str, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.rand(2 + len(case(name).objectives), generator=generator) + 0.5


def run(made: Driven, name: str, scale: float = 1.0, steps: range = range(STEPS)) -> list[Tensor]:
    """The updates of some steps."""
    objectives = case(name).objectives
    return [made.step(scale * gradients(name, step), objectives, losses(name, step)) for step in steps]


def same_way(one_P: Tensor, other_P: Tensor) -> bool:
    return bool(torch.nn.functional.cosine_similarity(one_P, other_P, dim=0) > 1 - 1e-5)


def test_the_table_names_methods() -> None:
    assert set(CASES) <= set(NAMES)


@pytest.mark.parametrize("name", DRIVEN)
@pytest.mark.parametrize("scale", [0.0, 1e-15, 1e12])
def test_finite(name: str, scale: float) -> None:
    made = driven(name)
    for update_P in run(made, name, scale):
        assert update_P.isfinite().all()
        assert scale > 0 or not update_P.any(), "no gradient, no update"
    assert made.method.request(made.sampled).coefficients_S.isfinite().all()
    row = made.method.describe(made.sampled)
    if row is not None:
        numbers = [row.end_task_weight, *row.weights.values(), *row.health.values()]
        assert torch.tensor(numbers).isfinite().all()


@pytest.mark.parametrize("name", DRIVEN)
def test_gradients_of_another_scale_give_an_update_of_another_scale(name: str) -> None:
    degree = case(name).degree
    plain = run(driven(name), name)
    for scale in (1e-4, 1e3):
        for one_P, other_P in zip(plain, run(driven(name), name, scale), strict=True):
            # 1e-4: what the iterative solvers stop at.
            torch.testing.assert_close(other_P, scale**degree * one_P, rtol=1e-3, atol=1e-4 * float(other_P.norm()))


@pytest.mark.parametrize("name", DRIVEN)
def test_the_order_of_objectives_changes_nothing(name: str) -> None:
    if case(name).not_permutable:
        pytest.skip(str(case(name).not_permutable))
    objectives = case(name).objectives
    forward, backward = driven(name), driven(name)
    for step in range(STEPS):
        found_SP, found_S = gradients(name, step), losses(name, step)
        order = [0, 1, *reversed(range(2, len(found_S)))]
        one_P = forward.step(found_SP, objectives, found_S)
        other_P = backward.step(found_SP[order], objectives[::-1], found_S[order])
        torch.testing.assert_close(other_P, one_P, rtol=1e-4, atol=1e-5)
    one, other = (made.method.describe(made.sampled) for made in (forward, backward))
    if one is not None and other is not None:
        assert dict(other.weights) == pytest.approx(dict(one.weights), abs=1e-4)


@pytest.mark.parametrize("name", DRIVEN)
def test_an_objective_that_is_the_end_task_leaves_its_direction(name: str) -> None:
    made, count = driven(name), len(case(name).objectives)
    for step in range(STEPS):
        found_SP = gradients(name, step)
        found_SP[2:] = found_SP[1]
        found_S = torch.ones(2 + count)
        assert same_way(made.step(found_SP, case(name).objectives, found_S), found_SP[1])


@pytest.mark.parametrize("name", DRIVEN)
def test_without_labelled_objectives_the_end_task_is_what_is_left(name: str) -> None:
    if case(name).not_reducible:
        pytest.skip(str(case(name).not_reducible))
    made, count = driven(name), len(case(name).objectives)
    for step in range(STEPS):
        found_SP, found_S = gradients(name, step), losses(name, step)
        found_SP[2:], found_S[2:] = 0.0, 0.0
        assert same_way(made.step(found_SP, case(name).objectives, found_S, [0.0] * count), found_SP[1])


@pytest.mark.parametrize("name", DRIVEN)
def test_a_state_in_a_checkpoint_is_the_whole_state(name: str) -> None:
    made, again = driven(name), driven(name)
    run(made, name, steps=range(STEPS))
    file = io.BytesIO()
    torch.save(made.method.state_dict(), file)
    file.seek(0)
    again.method.load_state_dict(torch.load(file, weights_only=True))
    again.steps = made.steps
    later = range(STEPS, 2 * STEPS)
    for one_P, other_P in zip(run(made, name, steps=later), run(again, name, steps=later), strict=True):
        assert torch.equal(one_P, other_P)
    one, other = made.method.state_dict(), again.method.state_dict()
    assert str(one) == str(other)
    assert made.method.describe(made.sampled) == again.method.describe(again.sampled)


@pytest.mark.parametrize("name", DRIVEN)
def test_the_same_seed_gives_the_same_updates(name: str) -> None:
    torch.manual_seed(1)
    one = run(driven(name), name)
    torch.manual_seed(2)
    assert all(torch.equal(a, b) for a, b in zip(one, run(driven(name), name), strict=True))


@pytest.mark.parametrize("name", DRIVEN)
def test_what_is_kept_apart_is_asked_for(name: str) -> None:
    """A direction needs the separate gradients, a tied decoder's part included."""
    made = driven(name)
    (first, *_) = run(made, name)
    request = made.method.request(made.sampled)
    assert made.method.whole_gradients == request.separate
    assert first.shape == gradients(name, 0)[1].shape
