"""What the encoder reads: texts laid out in rows.

Shape suffixes: R rows, L columns, E texts, N noised tokens, W width of the embeddings. A row holds one text (padded
layout) or several (packed); tokens of different texts never see each other.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenInputs:
    """E texts in R rows of L tokens.

    Row position i sees key j iff both are tokens of the same text and either i = j or
    `key_ranks[j] <= ranks[i]` (semantics section 2.5); padding is seen by nobody and sees its own
    row's padding only, so that its softmax is defined.
    """

    ids_RL: Tensor
    """Token ids, int64."""
    positions_RL: Tensor
    """Position of the token in its text, from 0, int64; the encoder adds its family's offset."""
    ranks_RL: Tensor
    """What a position sees, int32."""
    key_ranks_RL: Tensor
    """Who sees a position, int32; differs from `ranks_RL` only where nobody may see it."""
    texts_RL: Tensor
    """Index of the text, int32; -1 on padding."""
    first_E: Tensor
    """Index of each text's first token in the flattened [R * L] axis, int64."""
    lengths_E: Tensor
    """Tokens of each text, int64."""
    visible_RLL: Tensor | None = None
    """Overrides the rank rule where given (published visibility): bool, [R, L, L]."""
    noised_N: Tensor | None = None
    """Positions whose input embeddings get noise, in the flattened [R * L] axis, int64."""
    noise_NW: Tensor | None = None
    """What is added to them, float."""

    def to(self, device: torch.device) -> Self:
        """The same inputs on a device; the copy does not block where the memory is pinned."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        moved = {name: value.to(device, non_blocking=True) for name, value in tensors.items() if value is not None}
        return replace(self, **moved)

    def visibility_RLL(self) -> Tensor:
        """The boolean matrix of who sees whom: [R, L, L], rows are queries, columns are keys."""
        if self.visible_RLL is not None:
            return self.visible_RLL
        same = self.texts_RL[:, :, None] == self.texts_RL[:, None, :]
        itself = torch.eye(self.ids_RL.shape[1], dtype=torch.bool, device=self.ids_RL.device)
        return same & ((self.key_ranks_RL[:, None, :] <= self.ranks_RL[:, :, None]) | itself)
