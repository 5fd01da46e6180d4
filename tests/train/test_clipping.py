"""Sound and published clipping, of given gradients and in a whole step compared with autograd.

(semantics section 2.8)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from aang_ray.config.sections import OptimConfig, Semantics
from aang_ray.model.heads import TiedDecoder, TokenHead
from aang_ray.train.optim import clip, clip_objectives
from aang_ray.train.step import Stepper
from tests.train.running import parameters, stepper, tiny_config

BOUND = 10.0


def module(*gradient: float) -> nn.Module:
    """One parameter with this gradient."""
    made = nn.Module()
    made.weight = nn.Parameter(torch.zeros(len(gradient), dtype=torch.float64))
    made.weight.grad = torch.tensor(gradient, dtype=torch.float64)
    return made


def gradient_of(made: nn.Module) -> list[float]:
    """Gradients of all parameters, concatenated."""
    return torch.cat([p.grad.flatten() for p in made.parameters() if p.grad is not None]).tolist()


@pytest.mark.parametrize(
    ("clipping", "heads"),
    [
        # Norms 5 and 12, each to 1: (3, 4) / 5 and (0, 12) / 12.
        ("sound", [[0.6, 0.8], [0.0, 1.0]]),
        # Jointly 13: each over 13.
        ("published", [[3 / 13, 4 / 13], [0.0, 12 / 13]]),
    ],
)
def test_heads_are_clipped_each_or_jointly(clipping: Semantics, heads: list[list[float]]) -> None:
    body, one, other = module(0.0, 2.0), module(3.0, 4.0), module(0.0, 12.0)
    clip(body, {"one": one, "other": other}, OptimConfig(clipping=clipping))
    assert gradient_of(body) == pytest.approx([0.0, 1.0], rel=1e-5)
    assert [gradient_of(one), gradient_of(other)] == [pytest.approx(head, rel=1e-5) for head in heads]


@pytest.mark.parametrize(("clipping", "together"), [("sound", False), ("published", True)])
def test_heads_within_the_bound_may_exceed_it_together(clipping: Semantics, together: bool) -> None:
    """0.96 each is within 1, sqrt(2) 0.96 = 1.358 together is not: 0.96 / 1.358 = sqrt(1/2)."""
    one, other = module(0.96), module(0.96)
    clip(module(0.1), {"one": one, "other": other}, OptimConfig(clipping=clipping))
    expected = 0.5**0.5 if together else 0.96
    assert gradient_of(one) == gradient_of(other) == pytest.approx([expected], rel=1e-5)


def test_only_long_gradients_of_objectives_are_shortened_and_the_decoders_part_stays() -> None:
    # Segments: dev (coefficient 0), the end task with norm 50, g_1 = (12, 16, 0) of norm 20 and g_2 = (0, 3, 4) of
    # norm 5; coefficients 1/2, 1/4, 1/4. In `.grad`: their sum, and (1, 1, 1) of a decoder.
    # Afterwards: (1, 1, 1) + (30, 40, 0) / 2 + (6, 8, 0) / 4 + (0, 3, 4) / 4 = (17.5, 23.75, 2).
    separate_SP = torch.tensor([[99.0, 0, 0], [30, 40, 0], [12, 16, 0], [0, 3, 4]], dtype=torch.float64)
    coefficients_S = torch.tensor([0.0, 0.5, 0.25, 0.25])
    before_P = torch.ones(3, dtype=torch.float64) + coefficients_S.double() @ separate_SP
    body = nn.Module()
    body.first, body.second = (nn.Parameter(torch.zeros(n, dtype=torch.float64)) for n in (1, 2))
    body.first.grad, body.second.grad = before_P[:1].clone(), before_P[1:].clone()
    clip_objectives(body, separate_SP, coefficients_S)
    assert gradient_of(body) == pytest.approx([17.5, 23.75, 2.0])


def test_a_gradient_of_zero_stays_zero() -> None:
    body = module(1.0, 1.0)
    clip_objectives(body, torch.zeros(3, 2, dtype=torch.float64), torch.tensor([0.0, 0.5, 0.5]))
    assert gradient_of(body) == [1.0, 1.0]


STEEP = 40.0
"""What a vocabulary head's LayerNorm is multiplied by, so that some objectives' gradients exceed 10."""
WHOLE = (
    "encoder.dropout=0.0",
    "encoder.head_dropout=0.0",
    "method=static",
    "optim={algorithm: sgd, momentum: 0.0, body_weight_decay: 0.0, head_weight_decay: 0.0, clip: 0.5}",
    "optim.body_lr=1.0",
    "optim.head_lr=1.0",
    "schedule.warmup_fraction=0.0",
)


def steep(config: Any) -> Stepper:
    made = stepper(config, torch.float64)
    for head in made.setup.head_of.values():
        if isinstance(head, TokenHead):
            head.norm.weight.data.mul_(STEEP)
    return made


@dataclass
class Expected:
    """Gradients of one step, where each objective's gradient is computed by its own pass."""

    coefficients_S: Tensor
    body_SP: Tensor
    """As lookup, which is what is clipped."""
    decoder_SP: Tensor
    """Of the tied table as decoder."""
    heads: dict[str, Tensor]
    """Of each head, flat: the weighted sum over the segments."""

    @property
    def scale_S(self) -> Tensor:
        """min(1, 10 / ||g_k||), and 1 for dev and the end task."""
        scale_S = (BOUND / self.body_SP.norm(dim=1)).clamp(max=1.0)
        scale_S[:2] = 1.0
        return scale_S

    def body(self, scale_S: Tensor) -> Tensor:
        """Sum of c_s (scale_s g_s + decoder part)."""
        return self.coefficients_S @ (scale_S[:, None] * self.body_SP + self.decoder_SP)


def by_hand(made: Stepper) -> Expected:
    """The gradients of step 0."""
    prepared = made.prepare(0)
    setup = made.setup
    weights_S = setup.method.request(prepared.sampled).coefficients_S.double()
    table = setup.encoder.get_parameter("body.embeddings.word_embeddings.weight")
    leaf = table.detach().requires_grad_()
    for decoder in (m for m in setup.heads.modules() if isinstance(m, TiedDecoder)):
        decoder.alias = leaf
    body = list(setup.encoder.parameters())
    losses_S = torch.zeros_like(weights_S)
    for piece in prepared.pieces:
        losses_S = losses_S + made.losses(piece)

    def rows(inputs: list[nn.Parameter] | list[Tensor]) -> Tensor:
        found = []
        for loss in losses_S:
            if loss.requires_grad:
                parts = torch.autograd.grad(loss, inputs, retain_graph=True, allow_unused=True)
            else:
                parts = (None,) * len(inputs)
            each = [torch.zeros_like(p) if g is None else g for p, g in zip(inputs, parts, strict=True)]
            found.append(torch.cat([g.flatten() for g in each]))
        return torch.stack(found)

    of_table = rows([leaf])
    decoder_SP = torch.cat([of_table if p is table else of_table.new_zeros(len(weights_S), p.numel()) for p in body], 1)
    heads = {name: weights_S @ rows(list(head.parameters())) for name, head in setup.head_of.items()}
    expected = Expected(weights_S, rows(body), decoder_SP, heads)
    for decoder in (m for m in setup.heads.modules() if isinstance(m, TiedDecoder)):
        decoder.alias = None
    return expected


SETTINGS = [
    ("gradients.engine=segments",),
    ("gradients.engine=loop",),
    ("gradients.engine=segments", "batch.micro=7"),
    ("gradients.engine=segments", "objectives.heads=per_objective"),
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: ",".join(s.split(".")[1] for s in settings))
def test_a_published_step_moves_by_the_sum_of_clipped_gradients(
    tiny: dict[str, Any], settings: tuple[str, ...]
) -> None:
    """SGD with rate 1 and nothing else: what the parameters move by is the clipped update, or head gradient."""
    config = tiny_config(tiny, *WHOLE, "optim.clipping=published", *settings)
    made, expected = steep(config), by_hand(steep(config))
    norms_n = expected.body_SP[2:].norm(dim=1)
    assert norms_n.max() > 2 * BOUND, "the example has an objective above the bound"
    assert norms_n.min() < BOUND, "and one below"
    # A tied table has a part that is not clipped; the published, untied decoders are none of the body's.
    assert bool(expected.decoder_SP.any()) == ("objectives.heads=per_objective" not in settings)
    before_Q = parameters(made).clone()
    made.step(made.prepare(0))
    moved_Q = before_Q - parameters(made)
    update_P = expected.body(expected.scale_S)
    joint_norm = torch.stack([g.norm() for g in expected.heads.values()]).norm()
    assert update_P.norm() > 0.5
    assert joint_norm > 0.5
    # `optim.clip` is 0.5 here: the body to that norm, and all heads together.
    heads_Q = torch.cat(list(expected.heads.values())) * 0.5 / joint_norm
    torch.testing.assert_close(moved_Q, torch.cat((update_P * 0.5 / update_P.norm(), heads_Q)), rtol=1e-4, atol=1e-9)


def test_a_sound_step_moves_by_the_plain_sum_and_clips_each_head(tiny: dict[str, Any]) -> None:
    config = tiny_config(tiny, *WHOLE)
    made, expected = steep(config), by_hand(steep(config))
    before_Q = parameters(made).clone()
    made.step(made.prepare(0))
    update_P = expected.body(torch.ones_like(expected.scale_S))
    heads = [g * min(1.0, 0.5 / float(g.norm())) if g.any() else g for g in expected.heads.values()]
    assert sum(bool(g.norm() > 0.49) for g in heads) > 1
    expected_Q = torch.cat((update_P * 0.5 / update_P.norm(), *heads))
    torch.testing.assert_close(before_Q - parameters(made), expected_Q, rtol=1e-4, atol=1e-9)
