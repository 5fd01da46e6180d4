"""The leak test refuses encoders that ignore visibility, and leaves the encoder as it was."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from aang_ray.errors import UserError
from aang_ray.model import attention
from aang_ray.model.attention import TokenInputs
from aang_ray.model.encoder import Encoder
from aang_ray.model.loading import check_no_leak
from tests.model.families import FAMILIES, small_config, small_encoder


class Misled:
    """An encoder's own adapter that applies another visibility than the requested one."""

    positions_given = True

    def __init__(self, adapter: attention.Adapter, kind: str) -> None:
        self.adapter, self.kind = adapter, kind

    def __call__(self, body: nn.Module, inputs: TokenInputs) -> Tensor:
        visible = inputs.visibility_RLL()
        same = inputs.texts_RL[:, :, None] == inputs.texts_RL[:, None, :]
        eye = torch.eye(visible.shape[1], dtype=torch.bool)
        wrong = {
            "ignores the mask": torch.ones_like(visible),
            "ignores ranks": same,
            "ignores texts": visible | ~same,
            "looks one ahead": visible | (torch.diag(torch.ones(visible.shape[1] - 1), 1).bool() & same),
            "sees itself alone": eye.expand_as(visible),
        }[self.kind]
        return self.adapter(body, replace(inputs, visible_RLL=wrong))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["ignores the mask", "ignores ranks", "ignores texts", "looks one ahead"])
def test_an_encoder_that_disobeys_is_refused_by_name(family: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = small_encoder(family)
    monkeypatch.setattr(encoder, "_adapter", Misled(encoder._adapter, kind))
    with pytest.raises(UserError, match=rf"{family}.* does not obey its attention mask: under [a-z-]+ visibility"):
        check_no_leak(encoder)


def test_an_encoder_that_ignores_its_context_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = small_encoder("bert")
    monkeypatch.setattr(encoder, "_adapter", Misled(encoder._adapter, "sees itself alone"))
    with pytest.raises(UserError, match="ignores its context"):
        check_no_leak(encoder)


def test_a_boolean_mask_under_eager_attention_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    # The leak that made masks floats: eager attention adds True and False to the scores.
    def boolean(visible_RLL: Tensor, dtype: torch.dtype) -> Tensor:
        return visible_RLL.unsqueeze(1)

    monkeypatch.setattr(attention, "additive", boolean)
    encoder = small_encoder("bert")
    body: Any = encoder.body
    body.set_attn_implementation("eager")
    with pytest.raises(UserError, match="bert"):
        check_no_leak(encoder)


def test_a_convolution_over_tokens_is_refused() -> None:
    body = transformers.DebertaV2Model(small_config("deberta-v2", conv_kernel_size=3))
    with pytest.raises(UserError, match=r"deberta-v2.*convolution"):
        Encoder(body, "first")


def test_an_unknown_family_is_tried_and_judged() -> None:
    albert = transformers.AlbertModel(
        transformers.AlbertConfig(
            vocab_size=50, embedding_size=16, hidden_size=32, num_attention_heads=4, intermediate_size=48
        ),
        add_pooling_layer=False,
    )
    obedient = Encoder(albert, "first")
    check_no_leak(obedient)
    assert not obedient.positions_given
    # Its convolutions look at neighbouring tokens, whatever the mask says.
    convbert = transformers.ConvBertModel(
        transformers.ConvBertConfig(
            vocab_size=50,
            embedding_size=32,
            hidden_size=32,
            num_attention_heads=4,
            intermediate_size=48,
            num_hidden_layers=2,
        )
    )
    with pytest.raises(UserError, match="convbert"):
        check_no_leak(Encoder(convbert, "first"))
    fnet = transformers.FNetModel(transformers.FNetConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1))
    with pytest.raises(UserError, match=r"fnet.*takes no attention mask"):
        Encoder(fnet, "first")


def test_mode_random_state_gradients_and_hooks_are_as_before() -> None:
    encoder = small_encoder("bert", dropout=0.1)
    body: Any = encoder.body
    body.encoder.layer[0].eval()
    modes = [module.training for module in encoder.modules()]
    state = torch.get_rng_state()
    check_no_leak(encoder)
    assert modes == [module.training for module in encoder.modules()]
    assert torch.equal(state, torch.get_rng_state())
    assert all(p.grad is None and p.requires_grad for p in encoder.parameters())
    assert not any(module._forward_hooks for module in encoder.modules())


def test_frozen_encoders_and_callers_without_gradients_are_tested_too() -> None:
    encoder = small_encoder("roberta").requires_grad_(False)
    with torch.no_grad():
        check_no_leak(encoder)
