"""The masked-LM head that a checkpoint brings along, in the parts that `TokenHead` is made of."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from aang_ray.model.heads import MaskedLMHead


@dataclass(frozen=True)
class HeadNames:
    """Dotted names of a family's parts inside its masked-LM model."""

    dense: str
    norm: str
    bias: str
    activation: str | None
    """None: GELU, called as a function."""
    decoder: str | None
    """The output layer; None where the model multiplies by the table of embeddings itself."""


def _bert_like(activation: str = "transform_act_fn") -> HeadNames:
    transform = "cls.predictions.transform"
    return HeadNames(
        dense=f"{transform}.dense",
        norm=f"{transform}.LayerNorm",
        bias="cls.predictions.decoder.bias",
        activation=f"{transform}.{activation}",
        decoder="cls.predictions.decoder",
    )


_ROBERTA_LIKE = HeadNames(
    dense="lm_head.dense",
    norm="lm_head.layer_norm",
    bias="lm_head.decoder.bias",
    activation=None,
    decoder="lm_head.decoder",
)

_NAMES: Mapping[str, tuple[HeadNames, ...]] = {
    "bert": (_bert_like(),),
    "roberta": (_ROBERTA_LIKE,),
    "xlm-roberta": (_ROBERTA_LIKE,),
    "camembert": (_ROBERTA_LIKE,),
    "mpnet": (_ROBERTA_LIKE,),
    "distilbert": (
        HeadNames("vocab_transform", "vocab_layer_norm", "vocab_projector.bias", "activation", "vocab_projector"),
    ),
    "electra": (
        HeadNames(
            dense="generator_predictions.dense",
            norm="generator_predictions.LayerNorm",
            bias="generator_lm_head.bias",
            activation="generator_predictions.activation",
            decoder="generator_lm_head",
        ),
    ),
    # The layout of the first releases, and the one of `legacy: false`.
    "deberta-v2": (
        _bert_like(),
        HeadNames(
            dense="lm_predictions.lm_head.dense",
            norm="lm_predictions.lm_head.LayerNorm",
            bias="lm_predictions.lm_head.bias",
            activation="lm_predictions.lm_head.transform_act_fn",
            decoder=None,
        ),
    ),
    "modernbert": (HeadNames("head.dense", "head.norm", "decoder.bias", "head.act", "decoder"),),
}


def masked_lm_head(model: nn.Module, missing: Collection[str]) -> MaskedLMHead | None:
    """The head of a masked-LM model, if the checkpoint brought all of it.

    Args:
        model: a Hugging Face masked-LM model.
        missing: names of parameters that the checkpoint lacked, so that they are random.

    None also where its decoder is not the table of embeddings: the transform in front of another
    matrix says nothing about the table.
    """
    wrapped: Any = model
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for names in _NAMES.get(wrapped.config.model_type, ()):
        if f"{names.dense}.weight" not in parameters:
            continue
        parts = (f"{names.dense}.", f"{names.norm}.", names.bias)
        if any(name.startswith(parts) for name in missing):
            return None
        if names.decoder is not None and not _is_table(model, names.decoder, wrapped.get_input_embeddings()):
            return None
        return _parts(model, names, parameters.get(names.bias))
    return None


def _is_table(model: nn.Module, decoder: str, table: nn.Embedding) -> bool:
    weight = model.get_submodule(decoder).weight
    return weight is table.weight or (isinstance(weight, Tensor) and torch.equal(weight, table.weight))


def _parts(model: nn.Module, names: HeadNames, bias_V: Tensor | None) -> MaskedLMHead:
    dense, norm = model.get_submodule(names.dense), model.get_submodule(names.norm)
    assert isinstance(dense, nn.Linear)
    assert isinstance(norm, nn.LayerNorm)
    activation = nn.GELU() if names.activation is None else model.get_submodule(names.activation)
    return MaskedLMHead(dense, activation, norm, bias_V)
