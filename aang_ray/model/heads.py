"""Output heads: class logits of texts, and vocabulary logits of labelled positions (docs/semantics.md, section 4).

A vocabulary head starts from the checkpoint's masked-LM head if there is one; the last part of this file finds it.

Shape suffixes: E texts, M labelled positions, H hidden size, W width of the embeddings, C classes, V vocabulary.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

from aang_ray.errors import UserError
from aang_ray.model.segments import current_pass_update, current_segment_rows, per_row
from aang_ray.model.vocabulary_loss import compute_type, decoded_losses


class ClassificationHead(nn.Sequential):
    """Linear, Tanh, Dropout, Linear on pooled texts: [E, H] to [E, C]."""

    def __init__(self, hidden: int, classes: int, dropout: float) -> None:
        super().__init__(nn.Linear(hidden, hidden), nn.Tanh(), nn.Dropout(dropout), nn.Linear(hidden, classes))


@dataclass(frozen=True)
class NativeForm:
    """How the classifier of a family computes: Dropout, Linear, activation, LayerNorm, Dropout, Linear."""

    activation: str
    """Its name in Transformers."""
    drops_first: bool = False
    """Whether there is a Dropout before the first Linear."""
    normed: bool = False
    """Whether there is a LayerNorm; the configuration says whether it and the first Linear have biases."""


NATIVE: Mapping[str, NativeForm] = {
    "distilbert": NativeForm("relu"),
    "electra": NativeForm("gelu", drops_first=True),
    "deberta-v2": NativeForm("gelu", drops_first=True),
    "modernbert": NativeForm("gelu", normed=True),
}
"""Families whose own classifier is no `ClassificationHead`."""
TANH_FAMILIES = frozenset({"bert", "camembert", "mpnet", "roberta", "xlm-roberta"})
"""Families whose own classifier is Linear, Tanh, Dropout, Linear on the first token: a `ClassificationHead`."""


class NativeHead(nn.Module):
    """The head of a family's own classifier on pooled texts: [E, H] to [E, C].

    Args:
        settings: The configuration of the encoder, whose family is one of `NATIVE`.
        classes: C.
        dropout: The dropout, before each Linear or the last one alone.
    """

    def __init__(self, settings: Any, classes: int, dropout: float) -> None:
        super().__init__()
        form, hidden = NATIVE[settings.model_type], settings.hidden_size
        activation = getattr(settings, "pooler_hidden_act", None) or getattr(settings, "classifier_activation", None)
        self.first_dropout: nn.Module = nn.Dropout(dropout) if form.drops_first else nn.Identity()
        self.dense = nn.Linear(hidden, hidden, bias=not form.normed or settings.classifier_bias)
        self.activation: nn.Module = ACT2FN[activation or form.activation]
        self.norm: nn.Module = nn.Identity()
        if form.normed:
            self.norm = nn.LayerNorm(hidden, eps=settings.norm_eps, bias=settings.norm_bias)
        self.dropout = nn.Dropout(dropout)
        self.out_proj = nn.Linear(hidden, classes)

    def forward(self, pooled_EH: Tensor) -> Tensor:
        hidden_EH = self.norm(self.activation(self.dense(self.first_dropout(pooled_EH))))
        logits_EC: Tensor = self.out_proj(self.dropout(hidden_EH))
        return logits_EC


EndTaskHead = ClassificationHead | NativeHead


def end_task_head(kind: str, settings: Any, pooling: str, classes: int, dropout: float) -> EndTaskHead:
    """Return a new head for the end task.

    Args:
        kind: `tanh` or `native`, see `EncoderConfig.head`.
        settings: The configuration of the encoder.
        pooling: `first` or `mean`.
        classes: C.
        dropout: The dropout.

    Raises:
        UserError: The family's own head is wanted, and is not known, or is not for this pooling.
    """
    if kind == "native":
        family = settings.model_type
        if pooling != "first":
            raise UserError(f"encoder.head: native goes with encoder.pooling: first, not with {pooling}")
        if family not in NATIVE and family not in TANH_FAMILIES:
            known = ", ".join(sorted({*NATIVE, *TANH_FAMILIES}))
            raise UserError(
                f"encoder.head: native is not known for encoders of type {family}, only for {known}; use tanh"
            )
        if family in NATIVE:
            return NativeHead(settings, classes, dropout)
    return ClassificationHead(settings.hidden_size, classes, dropout)


class Decoder(nn.Module, ABC):
    """Vocabulary logits x Wᵀ + b, [M, W] to [M, V], or the losses of labels, [M], without the logits."""

    bias: nn.Parameter

    @property
    @abstractmethod
    def matrix(self) -> Tensor:
        """W, [V, W]."""

    def forward(self, x_MW: Tensor, label_M: Tensor | None = None, weight_M: Tensor | None = None) -> Tensor:
        """Return the logits, or with labels the cross-entropy of each row in fp32 or wider.

        `weight_M` is the factor of each row in its segment's loss. With it, and inside `segments.pass_update`, the
        forward pass also computes this pass's sums for W and b.
        """
        weight_VW = self.matrix
        if label_M is None:
            return F.linear(x_MW, weight_VW, self.bias)
        update, rows = current_pass_update(), current_segment_rows()
        if update is None or rows is None or weight_M is None or not torch.is_grad_enabled():
            return decoded_losses(x_MW, weight_VW, self.bias, label_M)
        wide = torch.promote_types(compute_type(x_MW, weight_VW), torch.float32)
        scale_M = weight_M.to(wide) * per_row(update.coefficients_S.to(wide), rows)
        sums = update.sums(weight_VW), update.sums(self.bias)
        return decoded_losses(x_MW, weight_VW, self.bias, label_M, scale_M, sums)


class TiedDecoder(Decoder):
    """A decoder whose matrix is the encoder's embedding table and the table's parameter only."""

    alias: Tensor | None
    """A plain tensor (not a Parameter) that replaces the table if it is set. It separates the table's gradient as
    decoder from its gradient as lookup."""

    def __init__(self, table: nn.Embedding, bias_V: Tensor | None = None) -> None:
        super().__init__()
        # Bypass nn.Module's registration, which would make the table a parameter of the head.
        object.__setattr__(self, "_table", table)
        self.bias = nn.Parameter(_bias(table, bias_V))
        self.alias = None

    @property
    def table(self) -> nn.Embedding:
        table = self.__dict__["_table"]
        assert isinstance(table, nn.Embedding)
        return table

    @property
    def matrix(self) -> Tensor:
        return self.table.weight if self.alias is None else self.alias


class OwnDecoder(Decoder):
    """A decoder with a copy of the encoder's embedding table, which is trained with the head."""

    def __init__(self, table: nn.Embedding, bias_V: Tensor | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(table.weight.detach().clone())
        self.bias = nn.Parameter(_bias(table, bias_V))

    @property
    def matrix(self) -> Tensor:
        return self.weight


@dataclass(frozen=True)
class MaskedLMHead:
    """The parts of a checkpoint's masked-LM head, in the order of application."""

    dense: nn.Linear
    activation: Callable[[Tensor], Tensor]
    norm: nn.LayerNorm
    bias_V: Tensor | None


class TokenHead(nn.Module):
    """Vocabulary logits, [M, V], or losses, [M], of labelled positions, [M, H]: dense, GELU, LayerNorm, decoder.

    Args:
        table: the encoder's embedding table.
        hidden: H.
        bias_V: initial bias of the decoder, used without `start`: log unigram frequencies, because with a zero bias the
            first gradients would disturb the body.
        start: the checkpoint's masked-LM head, which is copied together with its bias; None for a random head.
        untied: whether the decoder gets its own copy of the table, which is trained with the head.
        std: standard deviation of a random head's weights.

    Raises:
        ValueError: if the bias and the vocabulary differ in length.
    """

    def __init__(
        self,
        table: nn.Embedding,
        hidden: int,
        *,
        bias_V: Tensor | None = None,
        start: MaskedLMHead | None = None,
        untied: bool = False,
        std: float = 0.02,
    ) -> None:
        super().__init__()
        self.from_checkpoint = start is not None
        """Whether the checkpoint brought the head."""
        if start is None:
            weight = table.weight
            self.dense = nn.Linear(hidden, table.embedding_dim, device=weight.device, dtype=weight.dtype)
            nn.init.normal_(self.dense.weight, std=std)
            nn.init.zeros_(self.dense.bias)
            self.activation: Callable[[Tensor], Tensor] = nn.GELU()
            self.norm = nn.LayerNorm(table.embedding_dim, device=weight.device, dtype=weight.dtype)
        else:
            self.dense, self.activation, self.norm = copy.deepcopy((start.dense, start.activation, start.norm))
            bias_V = start.bias_V
        self.decoder: Decoder = OwnDecoder(table, bias_V) if untied else TiedDecoder(table, bias_V)

    def forward(self, hidden_MH: Tensor, label_M: Tensor | None = None, weight_M: Tensor | None = None) -> Tensor:
        """Return the logits, or with labels the losses, as `Decoder.forward`."""
        x_MW = self.norm(self.activation(self.dense(hidden_MH)))
        decoded: Tensor = self.decoder(x_MW) if label_M is None else self.decoder(x_MW, label_M, weight_M)
        return decoded


def _bias(table: nn.Embedding, bias_V: Tensor | None) -> Tensor:
    """Return a copy of the bias with the table's dtype and device; zeros if there is none."""
    if bias_V is None:
        return table.weight.new_zeros(table.num_embeddings)
    if bias_V.shape != (table.num_embeddings,):
        raise ValueError(f"the bias has shape {tuple(bias_V.shape)}, the vocabulary {table.num_embeddings} entries")
    return bias_V.detach().to(table.weight, copy=True)


@dataclass(frozen=True)
class HeadNames:
    """Dotted names of the masked-LM head's parts in the models of a family."""

    dense: str
    norm: str
    bias: str
    activation: str | None
    """The activation; None if the model calls GELU as a function."""
    decoder: str | None
    """The output layer; None if the model multiplies by the embedding table directly."""


_BERT_LIKE = HeadNames(
    dense="cls.predictions.transform.dense",
    norm="cls.predictions.transform.LayerNorm",
    bias="cls.predictions.decoder.bias",
    activation="cls.predictions.transform.transform_act_fn",
    decoder="cls.predictions.decoder",
)
_ROBERTA_LIKE = HeadNames("lm_head.dense", "lm_head.layer_norm", "lm_head.decoder.bias", None, "lm_head.decoder")

_NAMES: Mapping[str, tuple[HeadNames, ...]] = {
    "bert": (_BERT_LIKE,),
    **dict.fromkeys(("roberta", "xlm-roberta", "camembert", "mpnet"), (_ROBERTA_LIKE,)),
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
    # The layout of the first releases, and that of `legacy: false`.
    "deberta-v2": (
        _BERT_LIKE,
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
    """Return the head of a masked-LM model.

    It is None if parameters of it are missing in the checkpoint, if the family is unknown, or if the decoder is not the
    embedding table, because then the head was trained for another matrix.
    """
    wrapped: Any = model
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for names in _NAMES.get(wrapped.config.model_type, ()):
        if f"{names.dense}.weight" not in parameters:
            continue
        parts = (f"{names.dense}.", f"{names.norm}.", names.bias)
        if any(name.startswith(parts) for name in missing):
            return None
        table_VW = wrapped.get_input_embeddings().weight
        if names.decoder is not None and not torch.equal(parameters[f"{names.decoder}.weight"], table_VW):
            return None
        dense, norm = model.get_submodule(names.dense), model.get_submodule(names.norm)
        assert isinstance(dense, nn.Linear)
        assert isinstance(norm, nn.LayerNorm)
        activation = nn.GELU() if names.activation is None else model.get_submodule(names.activation)
        return MaskedLMHead(dense, activation, norm, parameters.get(names.bias))
    return None
