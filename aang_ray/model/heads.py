"""Output heads (semantics section 4).

Shape suffixes: E texts, M labelled positions, H hidden size, W width of the embeddings, C classes, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ClassificationHead(nn.Sequential):
    """Linear, Tanh, Dropout, Linear on a pooled text: [E, H] to [E, C]."""

    def __init__(self, hidden: int, classes: int, dropout: float) -> None:
        super().__init__(nn.Linear(hidden, hidden), nn.Tanh(), nn.Dropout(dropout), nn.Linear(hidden, classes))


class TiedDecoder(nn.Module):
    """Logits over the vocabulary through the encoder's own table of embeddings: x Wᵀ + b, [M, W] to [M, V].

    The table stays the encoder's: it is not among this module's parameters, the bias is.
    """

    alias: Tensor | None
    """Stands in for the table where set: a plain tensor (not a Parameter), so that the gradient of the
    table as decoder can be told from its gradient as lookup."""

    def __init__(self, table: nn.Embedding, bias_V: Tensor | None = None) -> None:
        super().__init__()
        # Past nn.Module's registration, which would make the table a parameter of the head.
        object.__setattr__(self, "_table", table)
        self.bias = nn.Parameter(_bias(table, bias_V))
        self.alias = None

    @property
    def table(self) -> nn.Embedding:
        """The encoder's table."""
        table = self.__dict__["_table"]
        assert isinstance(table, nn.Embedding)
        return table

    def forward(self, x_MW: Tensor) -> Tensor:
        weight_VW = self.table.weight if self.alias is None else self.alias
        return F.linear(x_MW, weight_VW, self.bias)


@dataclass(frozen=True)
class MaskedLMHead:
    """The parts of a checkpoint's own masked-LM head, in the order of their use."""

    dense: nn.Linear
    activation: Callable[[Tensor], Tensor]
    norm: nn.LayerNorm
    bias_V: Tensor | None


class TokenHead(nn.Module):
    """Vocabulary logits at labelled positions alone: dense, GELU, LayerNorm, decoder; [M, H] to [M, V].

    Starts as a copy of the checkpoint's own masked-LM head where it has one (`start`). Else fresh, with
    weights of standard deviation `std`, and with `bias_V` on the output: at the log unigram frequencies of
    the corpus the head predicts what is frequent from the first step on, and does not start by shaking the
    body. `untied` gives the decoder its own copy of the table, trained with the head.
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
        if start is None:
            weight = table.weight
            self.dense = nn.Linear(hidden, table.embedding_dim, device=weight.device, dtype=weight.dtype)
            nn.init.normal_(self.dense.weight, std=std)
            nn.init.zeros_(self.dense.bias)
            self.activation: Callable[[Tensor], Tensor] = nn.GELU()
            self.norm = nn.LayerNorm(table.embedding_dim, device=weight.device, dtype=weight.dtype)
        else:
            self.dense = copy.deepcopy(start.dense)
            self.activation = copy.deepcopy(start.activation)
            self.norm = copy.deepcopy(start.norm)
            bias_V = start.bias_V
        self.decoder = _own_decoder(table, bias_V) if untied else TiedDecoder(table, bias_V)

    def forward(self, hidden_MH: Tensor) -> Tensor:
        logits_MV: Tensor = self.decoder(self.norm(self.activation(self.dense(hidden_MH))))
        return logits_MV


def _own_decoder(table: nn.Embedding, bias_V: Tensor | None) -> nn.Linear:
    weight = table.weight
    # Made without storage: the default initialisation would draw from the random stream and be overwritten.
    decoder = nn.Linear(table.embedding_dim, table.num_embeddings, device="meta", dtype=weight.dtype)
    decoder = decoder.to_empty(device=weight.device)
    with torch.no_grad():
        decoder.weight.copy_(weight)
        decoder.bias.copy_(_bias(table, bias_V))
    return decoder


def _bias(table: nn.Embedding, bias_V: Tensor | None) -> Tensor:
    """A copy of the bias beside the table, or zeros.

    Raises:
        ValueError: if its length is not the vocabulary's.
    """
    if bias_V is None:
        return table.weight.new_zeros(table.num_embeddings)
    if bias_V.shape != (table.num_embeddings,):
        raise ValueError(f"the bias has shape {tuple(bias_V.shape)}, the vocabulary {table.num_embeddings} entries")
    return bias_V.detach().to(table.weight, copy=True)
