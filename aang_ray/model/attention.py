"""The encoder's input, and adapters that restrict each encoder family's attention to visible tokens.

A batch is R rows of L tokens, and a row holds one text or several. The visibility matrix [R, L, L] (query, key) is
computed from ranks (docs/semantics.md, section 2, step 5). Families expect different attention masks, so there is an
adapter for each convention. Position and token-type ids [R, L] are always passed: without them a model looks up one row
[1, L] for the whole batch, and the gradient of these embeddings is not a sum over tokens of single texts.

Shape suffixes: R rows, L columns, E texts, N noised tokens, W width of the embeddings, H hidden size.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from aang_ray.errors import UserError
from aang_ray.model.segments import Movable


@dataclass(frozen=True)
class TokenInputs(Movable):
    """E texts in R rows of L tokens.

    Position i sees key j iff both are tokens of the same text and either i = j or `key_ranks[j] <= ranks[i]`. Padding
    sees, and is seen by, only padding of the same row, so that its softmax is defined.
    """

    ids_RL: Tensor
    """Token ids, int64."""
    positions_RL: Tensor
    """Position of the token in its text, from 0, int64."""
    ranks_RL: Tensor
    """Rank of the position as a query, int32; it sees keys of the same or a lower rank."""
    key_ranks_RL: Tensor
    """Rank of the position as a key, int32; it differs from `ranks_RL` only for positions that no other may see."""
    texts_RL: Tensor
    """Index of the text, int32; -1 on padding."""
    first_E: Tensor
    """Index of each text's first token in the flattened [R * L] axis, int64."""
    lengths_E: Tensor
    types_RL: Tensor | None = None
    """Token type of the position, int64: 1 for the second text of a pair in BERT-like encoders; None: all are 0."""
    visible_RLL: Tensor | None = None
    """Visibility matrix that replaces the ranks (published visibility), bool; None to use the ranks."""
    noised_N: Tensor | None = None
    """Positions whose input embeddings get noise, in the flattened [R * L] axis, int64; None without noise."""
    noise_NW: Tensor | None = None

    def visibility_RLL(self) -> Tensor:
        """Return the visibility matrix, bool, [R, L, L]: whether a query (second axis) sees a key (third axis)."""
        if self.visible_RLL is not None:
            return self.visible_RLL
        same = self.texts_RL[:, :, None] == self.texts_RL[:, None, :]
        itself = torch.eye(self.ids_RL.shape[1], dtype=torch.bool, device=self.ids_RL.device)
        return same & ((self.key_ranks_RL[:, None, :] <= self.ranks_RL[:, :, None]) | itself)


def additive(visible_RLL: Tensor, dtype: torch.dtype) -> Tensor:
    """Return an additive mask, [R, 1, L, L]: 0 where visible, the lowest finite value of `dtype` elsewhere.

    The value is finite so that the softmax of a query without visible keys is not NaN. If any key is visible, the
    softmax of the hidden keys is exactly 0.
    """
    mask_RLL = torch.zeros(visible_RLL.shape, dtype=dtype, device=visible_RLL.device)
    return mask_RLL.masked_fill_(~visible_RLL, torch.finfo(dtype).min).unsqueeze(1)


def position_offset(body: nn.Module) -> int:
    """Return the position id of a text's first token; fairseq's families count from their padding row."""
    for name, module in body.named_modules():
        if name.rpartition(".")[2] == "position_embeddings" and isinstance(module, nn.Embedding):
            return 0 if module.padding_idx is None else module.padding_idx + 1
    return 0


class Adapter(ABC):
    """Runs a body under the visibility of its inputs.

    Args:
        body: the model.
        takes: the forward method of the model or of its embeddings; ids that it does not accept are not made.
        positions_given: whether a token's position depends on its position id alone, so that tokens may be in any
            order in their row.
    """

    def __init__(self, body: nn.Module, takes: Callable[..., Any], positions_given: bool) -> None:
        names = inspect.signature(takes).parameters
        settings: Any = body.config
        self.positions_given = positions_given
        self._positions = "position_ids" in names
        kinds: int = getattr(settings, "type_vocab_size", 1)
        self._types, self._tells_types = "token_type_ids" in names and kinds > 0, kinds > 1
        self._offset = position_offset(body)

    def ids(self, inputs: TokenInputs) -> dict[str, Tensor]:
        """Return position and token-type ids, [R, L], as keyword arguments."""
        ids = {"position_ids": inputs.positions_RL + self._offset} if self._positions else {}
        if self._types:
            given = inputs.types_RL if self._tells_types else None
            ids["token_type_ids"] = torch.zeros_like(inputs.ids_RL) if given is None else given
        return ids

    @abstractmethod
    def __call__(self, body: nn.Module, inputs: TokenInputs) -> Tensor:
        """Return the last hidden states, [R, L, H]."""


class AdditiveMask(Adapter):
    """Passes an additive mask to the model's forward; a boolean one would leak, because eager attention would add it.

    Raises:
        UserError: if the model's forward takes no attention mask.
    """

    def __init__(self, body: nn.Module, positions_given: bool = False) -> None:
        takes = inspect.signature(body.forward).parameters
        if "attention_mask" not in takes or "input_ids" not in takes:
            settings: Any = body.config
            raise UserError(
                f"encoder of type {settings.model_type!r} takes no attention mask: visibility cannot be set"
            )
        super().__init__(body, body.forward, positions_given)

    def mask(self, inputs: TokenInputs, dtype: torch.dtype) -> Tensor | dict[str, Tensor]:
        """Return what the model takes as its attention mask."""
        return additive(inputs.visibility_RLL(), dtype)

    def __call__(self, body: nn.Module, inputs: TokenInputs) -> Tensor:
        kind = inputs.ids_RL.device.type
        dtype = next(body.parameters()).dtype
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
        output = body(input_ids=inputs.ids_RL, attention_mask=self.mask(inputs, dtype), **self.ids(inputs))
        hidden_RLH: Tensor = output.last_hidden_state
        return hidden_RLH


class TwoMasks(AdditiveMask):
    """For ModernBERT, some of whose layers attend within `sliding_window` positions only.

    The distance is one of position ids and not of columns, so tokens may be in any order.
    """

    def __init__(self, body: nn.Module) -> None:
        super().__init__(body, positions_given=True)
        settings: Any = body.config
        self.window: int = settings.sliding_window

    def mask(self, inputs: TokenInputs, dtype: torch.dtype) -> dict[str, Tensor]:
        visible_RLL = inputs.visibility_RLL()
        near_RLL = (inputs.positions_RL[:, :, None] - inputs.positions_RL[:, None, :]).abs() <= self.window
        return {
            "full_attention": additive(visible_RLL, dtype),
            "sliding_attention": additive(visible_RLL & near_RLL, dtype),
        }


class KeepMask(Adapter):
    """Passes a boolean mask to the layers, for DeBERTa-v2, whose forward accepts only padding masks.

    Its relative positions are differences of columns. Within a text of a packed row, these are the same as in the text
    alone, if the tokens of a text are in order.

    Raises:
        UserError: if the encoder has a convolution over neighbouring tokens, which no attention mask restricts.
    """

    def __init__(self, body: nn.Module) -> None:
        model: Any = body
        if getattr(model.encoder, "conv", None) is not None:
            raise UserError(
                f"encoder of type {model.config.model_type!r} has a convolution over neighbouring tokens "
                "(conv_kernel_size > 0), which no attention mask restricts: choose an encoder without one"
            )
        super().__init__(body, model.embeddings.forward, positions_given=False)

    def __call__(self, body: nn.Module, inputs: TokenInputs) -> Tensor:
        model: Any = body
        embedded_RLH = model.embeddings(input_ids=inputs.ids_RL, **self.ids(inputs))
        output = model.encoder(embedded_RLH, inputs.visibility_RLL(), output_hidden_states=False)
        hidden_RLH: Tensor = output.last_hidden_state
        return hidden_RLH


def adapter_for(body: nn.Module) -> Adapter:
    """Return the adapter for a body's family.

    An unknown family gets an additive mask, and the leak test (`loading.py`) checks whether that works.

    Raises:
        UserError: if the visibility of this body cannot be set.
    """
    settings: Any = body.config
    match settings.model_type:
        case "bert" | "camembert" | "distilbert" | "electra" | "roberta" | "xlm-roberta":
            return AdditiveMask(body, positions_given=True)  # a table of absolute positions is all they have
        case "deberta-v2":
            return KeepMask(body)
        case "modernbert":
            return TwoMasks(body)
        case _:
            return AdditiveMask(body)
