"""The encoder's input, and how each encoder family is made to attend to visible tokens only.

A batch is R rows of L tokens. A row holds one text (padded layout) or several (packed layout); tokens of different
texts never see each other. Which position sees which is the boolean visibility matrix [R, L, L] (rows are queries,
columns are keys), computed from ranks (docs/semantics.md, section 2, step 5). Families differ in the attention mask
that they take, and there is one adapter for each convention:

- `AdditiveMask`: an additive float mask [R, 1, L, L] for the model's forward (eager attention would *add* a boolean
  one, and leak): BERT, RoBERTa and its descendants, DistilBERT, ELECTRA, MPNet;
- `KeepMask`: a boolean mask [R, L, L] for the layers, because the model's forward accepts padding masks only:
  DeBERTa-v2;
- `TwoMasks`: two additive masks, for layers with full and with sliding-window attention: ModernBERT.

Position and token-type ids are always given, [R, L]. Without them a family looks up one row [1, L] for the whole
batch, and the gradient of those embeddings is no longer a sum over the tokens of single texts.

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

    Position i sees key j iff both are tokens of the same text and either i = j or `key_ranks[j] <= ranks[i]`.
    Padding sees, and is seen by, the padding of its own row only; so its softmax is defined.
    """

    ids_RL: Tensor
    """Token ids, int64."""
    positions_RL: Tensor
    """Position of the token in its text, from 0, int64; the encoder adds its family's offset."""
    ranks_RL: Tensor
    """Rank of the position as a query: it sees keys of this or a lower rank, int32."""
    key_ranks_RL: Tensor
    """Rank of the position as a key, int32; differs from `ranks_RL` only for positions that nobody may see."""
    texts_RL: Tensor
    """Index of the text, int32; -1 on padding."""
    first_E: Tensor
    """Index of each text's first token in the flattened [R * L] axis, int64."""
    lengths_E: Tensor
    """Tokens of each text, int64."""
    visible_RLL: Tensor | None = None
    """If given, used in place of the ranks (published visibility): bool."""
    noised_N: Tensor | None = None
    """Positions whose input embeddings get noise, in the flattened [R * L] axis, int64."""
    noise_NW: Tensor | None = None
    """The noise that is added to them, float."""

    def to(self, device: torch.device) -> Self:
        """The same inputs on a device; the copy does not block where the memory is pinned."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        moved = {name: value.to(device, non_blocking=True) for name, value in tensors.items() if value is not None}
        return replace(self, **moved)

    def visibility_RLL(self) -> Tensor:
        """Whether a query (second axis) sees a key (third axis): bool, [R, L, L]."""
        if self.visible_RLL is not None:
            return self.visible_RLL
        same = self.texts_RL[:, :, None] == self.texts_RL[:, None, :]
        itself = torch.eye(self.ids_RL.shape[1], dtype=torch.bool, device=self.ids_RL.device)
        return same & ((self.key_ranks_RL[:, None, :] <= self.ranks_RL[:, :, None]) | itself)


class Adapter(Protocol):
    """Runs a body under the visibility of its inputs."""

    positions_given: bool
    """Whether the family places a token by its position id alone, so that it can stand anywhere in its row."""

    def __call__(self, body: nn.Module, inputs: TokenInputs) -> Tensor:
        """The last hidden states, [R, L, H]."""
        ...


def additive(visible_RLL: Tensor, dtype: torch.dtype) -> Tensor:
    """An additive mask: 0 where visible, the lowest finite value of `dtype` elsewhere, [R, 1, L, L].

    It is finite so that the softmax of a row that sees nothing has no NaN; if a key is visible, its exp() is exactly
    0.
    """
    mask_RLL = torch.zeros(visible_RLL.shape, dtype=dtype, device=visible_RLL.device)
    return mask_RLL.masked_fill_(~visible_RLL, torch.finfo(dtype).min).unsqueeze(1)


def attention_dtype(body: nn.Module, device: torch.device) -> torch.dtype:
    """The dtype of attention scores: autocast's where it is on, else the parameters'."""
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return next(body.parameters()).dtype


def position_offset(body: nn.Module) -> int:
    """The position id of a text's first token.

    Families that descend from fairseq reserve the ids up to the padding id: their position table has a padding row,
    and positions start after it.
    """
    for name, module in body.named_modules():
        if name.rpartition(".")[2] == "position_embeddings" and isinstance(module, nn.Embedding):
            return 0 if module.padding_idx is None else module.padding_idx + 1
    return 0


class ExplicitIds:
    """Makes the position and token-type ids that a body's forward (or its embeddings' forward) takes."""

    def __init__(self, body: nn.Module, takes: Callable[..., Any]) -> None:
        names = inspect.signature(takes).parameters
        settings: Any = body.config
        self.positions = "position_ids" in names
        self.types = "token_type_ids" in names and getattr(settings, "type_vocab_size", 1) > 0
        self.offset = position_offset(body)

    def __call__(self, inputs: TokenInputs) -> dict[str, Tensor]:
        """Keyword arguments, each [R, L]; all tokens have token type 0."""
        ids: dict[str, Tensor] = {}
        if self.positions:
            ids["position_ids"] = inputs.positions_RL + self.offset
        if self.types:
            ids["token_type_ids"] = torch.zeros_like(inputs.ids_RL)
        return ids


class AdditiveMask:
    """One additive mask for all layers, through the model's own forward.

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
    """The same for families that know positions from a table of absolute positions only."""

    positions_given = True


class KeepMask:
    """A boolean mask, given to the layers; for families with relative positions that are differences of columns.

    Within one text of a packed row these are the differences of the text alone. A token out of order would be
    misplaced.

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
    """ModernBERT: some layers attend to all tokens, the others to those at most `sliding_window` positions away.

    The distance is one of position ids, not of columns, so that a token may stand out of order.
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
"""The adapter of each family, by the configuration's `model_type`."""


def adapter_for(body: nn.Module) -> Adapter:
    """The adapter of a body's family. An unknown family gets an additive mask; the leak test (`loading.py`) checks it.

    Raises:
        UserError: the visibility of this body cannot be set.
    """
    settings: Any = body.config
    return ADAPTERS.get(settings.model_type, AdditiveMask)(body)
