"""ATTITTUD on problems with two parameters, and its state. (docs/semantics.md, section 6)"""

from __future__ import annotations

import io

import pytest
import torch
from torch import Tensor, nn
from torchjd.aggregation import PCGrad

from aang_ray.config.methods import AttittudConfig
from aang_ray.config.sections import Semantics
from aang_ray.gradients.engine import StepGradients
from aang_ray.gradients.statistics import ExampleJacobian
from aang_ray.methods.attittud import Attittud
from aang_ray.objectives import randomness
from tests.methods.problem import sampled, weighting


def linear(*rows: tuple[float, ...]) -> ExampleJacobian:
    """Losses whose gradients are these rows, whatever the parameters are."""
    J_MP = torch.tensor(rows, dtype=torch.float64)
    body = nn.Module()
    body.theta = nn.Parameter(torch.zeros(J_MP.shape[1], dtype=torch.float64))
    return ExampleJacobian(body, (J_MP,), lambda part: part @ body.theta, len(J_MP))


def gradients(*rows: tuple[float, float]) -> StepGradients:
    """The end task's gradient and the static update: half of it, and half of the objectives' mean."""
    each = torch.tensor(rows, dtype=torch.float64)
    update_P = 0.5 * each[0] + 0.5 * each[1:].mean(dim=0)
    return StepGradients(torch.zeros(1 + len(each)), kept={1: each[0]}, update_P=update_P)


def update(config: AttittudConfig, *rows: tuple[float, float]) -> list[float]:
    """The direction where the end task's gradients all lie along the first axis and point to its positive side."""
    method = Attittud(weighting(), config, seed=0)
    method.measure(0, linear((1.0, 0.0), (2.0, 0.0)), linear((3.0, 0.0)))
    step = sampled(*range(len(rows) - 1))
    direction_P = method.direction(step, gradients(*rows))
    assert method.request(step).keep == (1,)
    return [float(value) for value in direction_P]


@pytest.mark.parametrize(
    ("etas", "expected"),
    [
        # lambda = 1/2: d = (2, 0)/2 + g with g = (-1, 1)/2 = g_minus (-1/2, 0) + g_perp (0, 1/2), g_plus = 0.
        ((1.0, 1.0, 1.0), [0.5, 0.5]),
        ((0.0, 0.0, 0.0), [1.0, 0.0]),
        ((1.0, 1.0, 0.0), [1.0, 0.5]),
        ((1.0, 1.0, -1.0), [1.5, 0.5]),
        ((0.0, 5.0, 2.0), [0.0, 0.0]),
    ],
)
def test_worked_by_hand(etas: tuple[float, float, float], expected: list[float]) -> None:
    perp, plus, minus = etas
    config = AttittudConfig(eta_perp=perp, eta_plus=plus, eta_minus=minus, rank=1)
    assert update(config, (2.0, 0.0), (-1.0, 1.0)) == pytest.approx(expected, abs=1e-12)


def test_two_objectives_are_one_joint_gradient() -> None:
    """(3, 1) helps and (-1, 1) harms, but their mean (1, 1) helps: d = (2, 0)/2 + (1, 1)/2 with (1, 1, -1)."""
    assert update(AttittudConfig(rank=1), (2.0, 0.0), (3.0, 1.0), (-1.0, 1.0)) == pytest.approx([1.5, 0.5])


def test_the_subspace_is_kept_between_refreshes_and_through_a_checkpoint() -> None:
    """p is measured anew at every step: the same gradient helps after the end task has turned round."""
    config = AttittudConfig(rank=1, refresh_every=3)
    method = Attittud(weighting(), config, seed=0)
    wanted = [method.primary_examples(step) for step in range(4)]
    assert [subspace for subspace, _ in wanted] == [64, 0, 0, 64]
    assert {mean for _, mean in wanted} == {32}
    method.measure(0, linear((1.0, 0.0)), linear((1.0, 0.0)))
    first = method.direction(sampled(0), gradients((2.0, 0.0), (-1.0, 1.0)))
    stream = io.BytesIO()
    torch.save(method.state_dict(), stream)
    stream.seek(0)
    resumed = Attittud(weighting(), config, seed=0)
    resumed.load_state_dict(torch.load(stream, weights_only=True))
    directions: list[Tensor] = []
    for each in (method, resumed):
        each.measure(1, None, linear((-1.0, 0.0)))
        directions.append(each.direction(sampled(0), gradients((2.0, 0.0), (-1.0, 1.0))))
    assert torch.equal(*directions)
    assert first.tolist() == pytest.approx([1.5, 0.5])
    assert directions[0].tolist() == pytest.approx([0.5, 0.5])
    rows = [each.describe(sampled(0)) for each in (method, resumed)]
    assert rows[0] == rows[1]
    # g = (-1/2, 1/2): half of its square lies in the subspace; it harms at the first step and helps at the second.
    assert rows[0].health == pytest.approx({"aux_neutral": 0.5, "aux_helps": 0.25, "aux_harms": 0.25})
    assert not method.describe(sampled(0)).health


def test_fewer_examples_than_directions() -> None:
    """k = 10 of two examples: both directions, and none that is made up."""
    method = Attittud(weighting(), AttittudConfig(), seed=0)
    method.measure(0, linear((1.0, 0.0, 0.0), (0.0, 1.0, 0.0)), linear((1.0, 1.0, 0.0)))
    basis_PK = method.state_dict()["basis"]
    torch.testing.assert_close(basis_PK @ basis_PK.t(), torch.diag(torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)))


@pytest.mark.parametrize("basis", ["sound", "published"])
def test_the_split_depends_on_the_basis(basis: Semantics) -> None:
    """Losses with gradients (3, 0, 0) and (0, 1, 0): sound directions are the first two axes; published, an orthonormal
    basis of the sketch Omega J, which spans the same plane and lies askew.

    p = (1, 1, 0) and g = (2, -1, 1) agree along the first axis and not along the second: (1, 1, -1) makes of g
    (2, 1, 1) in the sound basis. Q's first direction is that of Omega J's first row, its second perpendicular to it.
    """
    config = AttittudConfig(rank=2, basis=basis)
    method = Attittud(weighting(), config, seed=0)
    method.measure(0, linear((3.0, 0.0, 0.0), (0.0, 1.0, 0.0)), linear((1.0, 1.0, 0.0)))
    q = method.state_dict()["basis"][:2]
    torch.testing.assert_close(q.t() @ q, torch.eye(2, dtype=torch.float64))
    g_P = torch.tensor([2.0, -1.0, 1.0], dtype=torch.float64)
    zero_P = torch.zeros(3, dtype=torch.float64)
    direction_P = method.direction(sampled(0), StepGradients(torch.zeros(3), kept={1: zero_P}, update_P=g_P))
    if basis == "sound":
        torch.testing.assert_close(q.abs(), torch.eye(2, dtype=torch.float64))
        assert direction_P.tolist() == pytest.approx([2.0, 1.0, 1.0])
        return
    draw = torch.from_numpy(randomness.generator(0, 0, randomness.METHOD, 1).standard_normal((2, 2)))
    sketch_2 = draw[0] * torch.tensor([3.0, 1.0])
    assert float((sketch_2 / sketch_2.norm() @ q[:, 0]).abs()) == pytest.approx(1.0)
    expected = torch.zeros(2, dtype=torch.float64)
    for k in range(2):
        a, p = float(q[:, k] @ g_P[:2]), float(q[:, k].sum())
        expected += (a if a * p > 0 else -a) * q[:, k]
    assert direction_P.tolist() == pytest.approx([*expected.tolist(), 1.0])
    assert direction_P.tolist() != pytest.approx([2.0, 1.0, 1.0], abs=0.1)


def test_without_a_measurement_there_is_no_direction() -> None:
    method = Attittud(weighting(), AttittudConfig(), seed=0)
    with pytest.raises(ValueError, match="its measurement of the end task"):
        method.direction(sampled(0), gradients((1.0, 0.0), (1.0, 0.0)))
    with pytest.raises(ValueError, match="must be estimated before it is used"):
        method.measure(1, None, linear((1.0, 0.0)))


@pytest.mark.parametrize("end_task", [(2.0, 0.0, 1.0), (-1.0, 0.5, 0.0), (0.0, 0.0, 0.0)])
@pytest.mark.parametrize("auxiliary", [(-1.0, 1.0, 2.0), (3.0, 1.0, -0.5)])
def test_with_its_own_gradient_as_subspace_it_is_one_half_of_pcgrad(
    end_task: tuple[float, float, float], auxiliary: tuple[float, float, float]
) -> None:
    """TorchJD's PCGrad of two gradients is the sum of both one-sided projections."""
    config = AttittudConfig(subspace="gradient", eta_minus=0.0)

    def projected(primary_P: Tensor, other_P: Tensor) -> Tensor:
        """What is left of `other` where `primary` is the end task's gradient; the update's weights are 1/2 each."""
        method = Attittud(weighting(), config, seed=0)
        assert not method.measures
        given = StepGradients(torch.zeros(3), kept={1: primary_P}, update_P=0.5 * (primary_P + other_P))
        direction_P = method.direction(sampled(0), given)
        return 2 * direction_P - primary_P

    first_P, second_P = (torch.tensor(row, dtype=torch.float64) for row in (end_task, auxiliary))
    both_2P = torch.stack((first_P, second_P))
    expected_P = PCGrad()(both_2P)
    torch.testing.assert_close(projected(first_P, second_P) + projected(second_P, first_P), expected_P)
    dot = float(first_P @ second_P)
    dense_P = second_P - (dot / float(first_P @ first_P)) * first_P if dot < 0 else second_P
    torch.testing.assert_close(projected(first_P, second_P), dense_P)
