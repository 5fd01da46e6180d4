"""The encoder's input, and adapters that restrict each encoder family's attention to visible tokens.

A batch is R rows of L tokens. A row holds one text (padded layout) or several (packed layout); tokens of different
texts never see each other. The boolean visibility matrix [R, L, L] (query position, key position) tells which position
sees which. It is computed from ranks (docs/semantics.md, section 2, step 5). Families expect different attention
masks, and there is one adapter for each convention:

- `AdditiveMask`: an additive float mask [R, 1, L, L], passed to the model's forward, for BERT, RoBERTa and its
  descendants, DistilBERT, ELECTRA and MPNet. A boolean mask would leak, because eager attention would add it.
- `KeepMask`: a boolean mask [R, L, L], passed to the layers because the model's forward accepts only padding masks,
  for DeBERTa-v2.
- `TwoMasks`: two additive masks, for layers with full and with sliding-window attention, for ModernBERT.

Position and token-type ids [R, L] are always passed. Without them a model looks up one row [1, L] for the whole batch,
and then the gradient of these embeddings is not a sum over tokens of single texts.

Shape suffixes: R rows, L columns, E texts, N noised tokens, W width of the embeddings, H hidden size.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from aang_ray.errors import UserError


@dataclass(frozen=True)
class TokenInputs:
    """E texts in R rows of L tokens.

    Position i sees key j iff both are tokens of the same text and either i = j or `key_ranks[j] <= ranks[i]`. Padding
    sees, and is seen by, only padding of the same row, so that its softmax is defined.
    """

    ids_RL: Tensor
    """Token ids, int64."""
    positions_RL: Tensor
    """Position of the token in its text, from 0, int64; the encoder adds its family's offset."""
    ranks_RL: Tensor
    """Rank of the position as a query, int32; it sees keys of the same or a lower rank."""
    key_ranks_RL: Tensor
    """Rank of the position as a key, int32; it differs from `ranks_RL` only for positions that no other may see."""
    texts_RL: Tensor
    """Index of the text, int32; -1 on padding."""
    first_E: Tensor
    """Index of each text's first token in the flattened [R * L] axis, int64."""
    lengths_E: Tensor
    """Number of tokens of each text, int64."""
    visible_RLL: Tensor | None = None
    """Visibility matrix that replaces the ranks (published visibility), bool; None to use the ranks."""
    noised_N: Tensor | None = None
    """Positions whose input embeddings get noise, in the flattened [R * L] axis, int64; None without noise."""
    noise_NW: Tensor | None = None
    """The noise that is added to these embeddings, float."""

    def to(self, device: torch.device) -> Self:
        """Return the same inputs on a device; the copy is asynchronous if the memory is pinned."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        moved = {name: value.to(device, non_blocking=True) for name, value in tensors.items() if value is not None}
        return replace(self, **moved)

    def visibility_RLL(self) -> Tensor:
        """Return the visibility matrix, bool, [R, L, L]: whether a query (second axis) sees a key (third axis)."""
        if self.visible_RLL is not None:
            return self.visible_RLL
        same = self.texts_RL[:, :, None] == self.texts_RL[:, None, :]
        itself = torch.eye(self.ids_RL.shape[1], dtype=torch.bool, device=self.ids_RL.device)
        return same & ((self.key_ranks_RL[:, None, :] <= self.ranks_RL[:, :, None]) | itself)


class Adapter(Protocol):
    """Runs a body under the visibility of its inputs."""

    positions_given: bool
    """Whether a token's position depends on its position id alone, so that tokens may be in any order in their row."""

    def __call__(self, body: nn.Module, inputs: TokenInputs) -> Tensor:
        """Return the last hidden states, [R, L, H]."""
        ...


def additive(visible_RLL: Tensor, dtype: torch.dtype) -> Tensor:
    """Return an additive mask, [R, 1, L, L]: 0 where visible, the lowest finite value of `dtype` elsewhere.

    The value is finite so that the softmax of a query without visible keys is not NaN. If any key is visible, the
    softmax of the hidden keys is exactly 0.
    """
    mask_RLL = torch.zeros(visible_RLL.shape, dtype=dtype, device=visible_RLL.device)
    return mask_RLL.masked_fill_(~visible_RLL, torch.finfo(dtype).min).unsqueeze(1)


def attention_dtype(body: nn.Module, device: torch.device) -> torch.dtype:
    """Return the dtype of attention scores: autocast's dtype if it is enabled, else that of the parameters."""
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return next(body.parameters()).dtype


def position_offset(body: nn.Module) -> int:
    """Return the position id of a text's first token.

    In families derived from fairseq, the position table has a padding row, and positions start after it.
    """
    for name, module in body.named_modules():
        if name.rpartition(".")[2] == "position_embeddings" and isinstance(module, nn.Embedding):
            return 0 if module.padding_idx is None else module.padding_idx + 1
    return 0


class ExplicitIds:
    """Makes the position and token-type ids for a forward method.

    Args:
        body: The model.
        takes: The forward method of the model or of its embeddings; ids that it does not accept are not made.
    """

    def __init__(self, body: nn.Module, takes: Callable[..., Any]) -> None:
        names = inspect.signature(takes).parameters
        settings: Any = body.config
        self.positions = "position_ids" in names
        self.types = "token_type_ids" in names and getattr(settings, "type_vocab_size", 1) > 0
        self.offset = position_offset(body)

    def __call__(self, inputs: TokenInputs) -> dict[str, Tensor]:
        """Return keyword arguments, each [R, L]; all tokens have token type 0."""
        ids: dict[str, Tensor] = {}
        if self.positions:
            ids["position_ids"] = inputs.positions_RL + self.offset
        if self.types:
            ids["token_type_ids"] = torch.zeros_like(inputs.ids_RL)
        return ids


class AdditiveMask:
    """Adapter that passes one additive mask for all layers to the model's forward.

    Raises:
        UserError: the model's forward takes no attention mask.
    """

    positions_given = False

    def __init__(self, body: nn.Module) -> None:
        takes = inspect.signature(body.forward).parameters
        if "attention_mask" not in takes or "input_ids" not in takes:
            settings: Any = body.config
            raise UserError(
                f"encoder of type {settings.model_type!r} takes no attention mask: visibility cannot be set"
            )
        self.ids = ExplicitIds(body, body.forward)

    def __call__(self, body: nn.Module, inputs: TokenInputs) -> Tensor:
        mask = additive(inputs.visibility_RLL(), attention_dtype(body, inputs.ids_RL.device))
        output = body(input_ids=inputs.ids_RL, attention_mask=mask, **self.ids(inputs))
        hidden_RLH: Tensor = output.last_hidden_state
        return hidden_RLH


class AdditiveMaskGivenPositions(AdditiveMask):
    """The same adapter for families whose only position information is a table of absolute positions."""

    positions_given = True


class KeepMask:
    """Adapter that passes a boolean mask to the layers.

    It is for families whose relative positions are differences of columns. Within a text of a packed row, these
    differences are the same as in the text alone. The tokens of a text must be in order.

    Raises:
        UserError: the encoder has a convolution over neighbouring tokens, which no attention mask restricts.
    """

    positions_given = False

    def __init__(self, body: nn.Module) -> None:
        model: Any = body
        if getattr(model.encoder, "conv", None) is not None:
            raise UserError(
                f"encoder of type {model.config.model_type!r} has a convolution over neighbouring tokens "
                "(conv_kernel_size > 0), which no attention mask restricts: choose an encoder without one"
            )
        self.ids = ExplicitIds(body, model.embeddings.forward)

    def __call__(self, body: nn.Module, inputs: TokenInputs) -> Tensor:
        model: Any = body
        embedded_RLH = model.embeddings(input_ids=inputs.ids_RL, **self.ids(inputs))
        output = model.encoder(embedded_RLH, inputs.visibility_RLL(), output_hidden_states=False)
        hidden_RLH: Tensor = output.last_hidden_state
        return hidden_RLH


class TwoMasks:
    """Adapter for ModernBERT: some layers attend to all tokens, others only within `sliding_window` positions.

    The distance is computed from position ids and not from columns, so tokens may be in any order.
    """

    positions_given = True

    def __init__(self, body: nn.Module) -> None:
        settings: Any = body.config
        self.window: int = settings.sliding_window
        self.ids = ExplicitIds(body, body.forward)

    def __call__(self, body: nn.Module, inputs: TokenInputs) -> Tensor:
        dtype = attention_dtype(body, inputs.ids_RL.device)
        visible_RLL = inputs.visibility_RLL()
        distance_RLL = (inputs.positions_RL[:, :, None] - inputs.positions_RL[:, None, :]).abs()
        masks = {
            "full_attention": additive(visible_RLL, dtype),
            "sliding_attention": additive(visible_RLL & (distance_RLL <= self.window), dtype),
        }
        output = body(input_ids=inputs.ids_RL, attention_mask=masks, **self.ids(inputs))
        hidden_RLH: Tensor = output.last_hidden_state
        return hidden_RLH


ADAPTERS: Mapping[str, Callable[[nn.Module], Adapter]] = {
    "bert": AdditiveMaskGivenPositions,
    "camembert": AdditiveMaskGivenPositions,
    "distilbert": AdditiveMaskGivenPositions,
    "electra": AdditiveMaskGivenPositions,
    "roberta": AdditiveMaskGivenPositions,
    "xlm-roberta": AdditiveMaskGivenPositions,
    "mpnet": AdditiveMask,
    "deberta-v2": KeepMask,
    "modernbert": TwoMasks,
}
"""Adapter of each family, by the configuration's `model_type`."""


def adapter_for(body: nn.Module) -> Adapter:
    """Return the adapter for a body's family.

    An unknown family gets an additive mask, and the leak test (`loading.py`) checks whether that works.

    Raises:
        UserError: the visibility of this body cannot be set.
    """
    settings: Any = body.config
    return ADAPTERS.get(settings.model_type, AdditiveMask)(body)
