"""Modules of every kind: with a rule, with parameters that are used twice, and without a rule."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from aang_ray.gradients import SegmentEngine
from aang_ray.gradients.engine import Request, UnsupportedModule
from aang_ray.gradients.ledger import Ledger
from aang_ray.gradients.rules import RowSums
from aang_ray.model.segments import SegmentRows
from tests.gradients.examples import example_losses, examples, heads_of
from tests.gradients.steps import JOINT_FROM, assert_matches, reference, run

BOUNDS = (0, 3, 4, 4, 9)
COEFFICIENTS = torch.tensor([0.0, 0.6, 0.1, 0.3], dtype=torch.float64)


class LeNet(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 4, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Conv2d(4, 6, 2, groups=2, bias=False),
            nn.ReLU(inplace=True),
            nn.Flatten(),
            nn.Linear(54, 8),
        )


class ScaledRMSNorm(nn.Module):
    """RMSNorm as in Llama."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width, dtype=torch.float64) + 0.5)
        self.variance_epsilon = 1e-3

    def forward(self, hidden_states: Tensor) -> Tensor:
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        return self.weight * (hidden_states * torch.rsqrt(variance + self.variance_epsilon))


class ShiftedRMSNorm(ScaledRMSNorm):
    """RMSNorm as in Gemma."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states) * (1 + self.weight) / self.weight


class NotAnRMSNorm(ScaledRMSNorm):
    """A module that is named like an RMSNorm, but computes something else."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return torch.tanh(super().forward(hidden_states))


class Conv1D(nn.Module):
    """Linear layer as in GPT-2: x W + b."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs, dtype=torch.float64))
        self.bias = nn.Parameter(torch.randn(outputs, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight)


class Bilinearity(nn.Module):
    """A module without a rule, which owns its parameters directly and draws noise."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Parameter(torch.randn(6, 5, dtype=torch.float64))
        self.right = nn.Parameter(torch.randn(6, 5, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout((x @ self.left) * torch.sin(x @ self.right), 0.3)


class Twice(nn.Module):
    """One matrix is used at two depths, and also as a factor that is broadcast over the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(6, 6)
        self.table = nn.Parameter(torch.randn(4, 6))

    def forward(self, x: Tensor) -> Tensor:
        mixing = self.shared(self.table)
        hidden: Tensor = torch.tanh(self.shared(torch.tanh(self.shared(x)))) @ (mixing.t() @ mixing)
        return hidden


def check(body: nn.Module, inputs: Tensor, width: int, bounds: tuple[int, ...] = BOUNDS, positions: int = 1) -> None:
    heads = heads_of(width)
    body.double().train()
    piece, losses = examples(inputs, bounds, positions), example_losses(body, heads["head"])
    coefficients = torch.linspace(0, 1, len(bounds) - 1, dtype=torch.float64)
    torch.manual_seed(5)
    expected = reference(body, heads, piece, losses, coefficients)
    torch.manual_seed(5)
    request = Request(coefficients, scores=True, joint_from=JOINT_FROM)
    result, updates = run(SegmentEngine(body, heads, False), body, heads, [piece], losses, request)
    assert_matches(result, updates, expected, 1e-9)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_convolutional_network() -> None:
    check(LeNet(), normal(9, 1, 9, 9), 8)


def test_one_dimensional_convolution() -> None:
    body = nn.Sequential(nn.Conv1d(2, 3, 3, dilation=2), nn.Tanh(), nn.Flatten())
    check(body, normal(9, 2, 8), 12)


@pytest.mark.parametrize(
    "norm", [nn.RMSNorm(6), ScaledRMSNorm(6), ShiftedRMSNorm(6), NotAnRMSNorm(6), nn.LayerNorm(6, bias=False)]
)
def test_norms(norm: nn.Module) -> None:
    check(nn.Sequential(nn.Linear(5, 6), norm, nn.Linear(6, 6)), normal(9, 5), 6)


def test_gpt_convolution() -> None:
    check(nn.Sequential(Conv1D(7, 5), nn.Tanh(), Conv1D(6, 7)), normal(9, 5), 6)


def test_module_without_a_rule() -> None:
    check(nn.Sequential(nn.Linear(5, 6), Bilinearity(), nn.Linear(5, 6)), normal(9, 5), 6)


def test_recurrent_network() -> None:
    class Last(nn.Module):
        def forward(self, states: tuple[Tensor, Tensor]) -> Tensor:
            outputs, _ = states
            return outputs[:, -1]

    check(nn.Sequential(nn.Linear(5, 6), nn.GRU(6, 4, batch_first=True), Last()), normal(9, 3, 5), 4, positions=3)


def test_reparametrised_weight() -> None:
    check(nn.Sequential(weight_norm(nn.Linear(5, 6)), nn.Tanh(), nn.Linear(6, 6)), normal(9, 5), 6)


def test_parameter_used_at_several_places() -> None:
    check(nn.Sequential(nn.Linear(6, 6), Twice()), normal(9, 6), 6)


def test_a_computed_table_as_long_as_the_batch() -> None:
    """The table has as many entries as the batch has rows, but its entries are not rows."""

    class Long(Twice):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(9, 6))

        def forward(self, x: Tensor) -> Tensor:
            mixing = self.shared(torch.tanh(self.table))
            hidden: Tensor = torch.tanh(self.shared(x)) @ (mixing.t() @ mixing)
            return hidden

    check(nn.Sequential(nn.Linear(6, 6), Long()), normal(9, 6), 6)


def test_two_modules_with_one_parameter() -> None:
    first, second = nn.Linear(6, 6), nn.Linear(6, 6)
    second.weight = first.weight
    check(nn.Sequential(first, nn.Tanh(), second), normal(9, 6), 6)


class Positions(nn.Module):
    """Ids and positions; `relative` adds a table of relative positions, as long as the batch has rows."""

    def __init__(self, relative: bool) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 6, padding_idx=0)
        self.positions = nn.Embedding(4, 6)
        self.relative = nn.Embedding(7, 1) if relative else None
        self.project = nn.Linear(6, 6)

    def forward(self, ids: Tensor) -> Tensor:
        # [1, L, H]: broadcast over the batch.
        place = torch.arange(ids.shape[1])
        hidden = self.project(self.words(ids) + self.positions(place[None]))
        if self.relative is not None:
            bias = self.relative(place[:, None] - place[None, :] + 3).squeeze(-1)
            hidden = torch.tanh(hidden + torch.softmax(bias, -1) @ hidden)
        return torch.tanh(self.project(hidden)).sum(1)


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("rows", [9, 4])
def test_tables_that_are_broadcast(relative: bool, rows: int) -> None:
    # With 4 rows of 4 ids the matrix of relative positions has the shape of the batch.
    ids = torch.randint(0, 11, (rows, 4), generator=torch.Generator().manual_seed(0))
    bounds = BOUNDS if rows == 9 else (0, 1, 2, 2, 4)
    check(Positions(relative), ids, 6, bounds, positions=4)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=2, max_size=7).filter(lambda lengths: sum(lengths) > 0))
def test_any_bounds(lengths: list[int]) -> None:
    bounds = tuple(sum(lengths[:i]) for i in range(len(lengths) + 1))
    body = nn.Sequential(nn.Embedding(9, 5), nn.LayerNorm(5), nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4), nn.Flatten())
    ids = torch.randint(0, 9, (bounds[-1], 3), generator=torch.Generator().manual_seed(1))
    check(body, ids, 12, bounds, positions=3)


def test_normalisation_over_the_batch_is_refused() -> None:
    body = nn.Sequential(nn.Linear(5, 6), nn.Sequential(nn.BatchNorm1d(6)))
    with pytest.raises(UnsupportedModule, match=r"'1\.0' \(BatchNorm1d\) mixes"):
        check(body, normal(9, 5), 6)


def test_gradients_scaled_by_frequency_are_refused() -> None:
    body = nn.Sequential(nn.Embedding(9, 5, scale_grad_by_freq=True))
    with pytest.raises(UnsupportedModule, match=r"'0' \(Embedding\)"):
        SegmentEngine(body, nn.ModuleDict(), False)


def test_everything_is_as_before_after_success_and_failure() -> None:
    body, heads = nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6)).double(), heads_of(6)
    body[0].bias.requires_grad_(False)
    engine, piece = SegmentEngine(body, heads, False), examples(normal(9, 5), BOUNDS)

    def failing(_: object) -> Tensor:
        body(normal(9, 5))
        raise RuntimeError("in the middle")

    engine([piece], example_losses(body, heads["head"]), Request(COEFFICIENTS, scores=True))
    assert body[0].bias.grad is None
    with pytest.raises(RuntimeError, match="in the middle"):
        engine([piece], failing, Request(COEFFICIENTS, scores=True))
    assert [p.requires_grad for p in body.parameters()] == [True, False, True, True]
    assert all(p.requires_grad for p in heads.parameters())
    for module in (*body.modules(), *heads.modules()):
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_sums_of_half_precision_rows() -> None:
    rows = SegmentRows((0, 3, 3, 10))
    parameter = nn.Parameter(torch.zeros(4))
    ledger = Ledger([parameter], Request(torch.zeros(3), scores=True), [rows])
    grads = torch.randint(-2, 3, (10, 4), generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = torch.stack([grads[rows.of(s)].float().sum(0) for s in range(3)])
    assert torch.equal(RowSums(grads, rows).stacked(torch.float32, ledger.members), expected)
    other = SegmentRows((0, 1, 2, 10))
    expected = torch.stack([grads[other.of(s)].float().sum(0) for s in range(3)])
    assert torch.equal(RowSums(grads, other).stacked(torch.float32, ledger.members), expected)
