"""Replaced tokens that the model makes itself: samples of the denoise head, drawn without gradient.

As in ELECTRA (Clark et al. 2020), with the run's own body and denoise head as the generator. The texts go through
the body once more, their drawn tokens masked and everything visible, dropout off; a sample is the inverse of the
predicted distribution at a number that is a function of (seed, step, objective, example). So at given parameters
it is a pure function, too, whatever the accumulation (but where rounding moves a boundary across that number).

Shape suffixes: G drawn tokens, R rows, L columns, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from aang_ray.model.encoder import Encoder
from aang_ray.model.inputs import TokenInputs
from aang_ray.objectives.lay_out import lay_out, packed, starts
from aang_ray.objectives.segment import Drawn, Segment
from aang_ray.objectives.tensors import moved, pinned
from aang_ray.objectives.texts import Int64

_BELOW_ONE = 1.0 - 2.0**-40
"""Keeps a sample inside its distribution whatever is rounded."""


@dataclass(frozen=True)
class Replacements:
    """What the generator reads, and where its samples go."""

    inputs: TokenInputs
    """The texts with their drawn tokens masked, in rows of their own."""
    index_G: Tensor
    """Where to read in them, flattened; int64."""
    place_G: Tensor
    """Where the samples go in the piece, flattened; int64."""
    uniform_G: Tensor
    """The number in [0, 1) that chooses each sample, float64."""
    special: Tensor
    """Ids that are never drawn, int64."""
    size: int
    """Ids of the tokenizer: the table may have more rows."""

    def to(self, device: torch.device) -> Replacements:
        """The same on a device."""
        return replace(moved(self, device), inputs=self.inputs.to(device))

    def pin(self) -> Replacements:
        """The same in page-locked memory."""
        return replace(pinned(self), inputs=pinned(self.inputs))


def collate_replacements(segments: Sequence[Segment], flat_T: Int64, pad_id: int) -> Replacements | None:
    """The drawn tokens of a piece; `flat_T`: where the piece has each token. None if there are none."""
    drawing = [
        (start, segment, segment.drawn)
        for start, segment in zip(starts(segments), segments, strict=False)
        if segment.drawn is not None and len(segment.drawn.at_G)
    ]
    if not drawing:
        return None
    masked = [_masked(segment, drawn) for _, segment, drawn in drawing]
    inputs, own_T = lay_out(masked, packed([segment.lengths_E for segment in masked]), pad_id)
    vocabulary = drawing[0][2].vocabulary
    index = [own_T[drawn.at_G + start] for start, (_, _, drawn) in zip(starts(masked), drawing, strict=False)]
    return Replacements(
        inputs=inputs,
        index_G=torch.from_numpy(np.concatenate(index)),
        place_G=torch.from_numpy(np.concatenate([flat_T[drawn.at_G + start] for start, _, drawn in drawing])),
        uniform_G=torch.from_numpy(np.concatenate([drawn.uniform_G for _, _, drawn in drawing])),
        special=torch.tensor(vocabulary.special_ids, dtype=torch.int64),
        size=vocabulary.size,
    )


def _masked(segment: Segment, drawn: Drawn) -> Segment:
    ids_T = segment.ids_T.copy()
    ids_T[drawn.at_G] = drawn.vocabulary.mask_id
    visible_T = np.zeros_like(segment.ranks_T)
    return replace(segment, ids_T=ids_T, ranks_T=visible_T, key_ranks_T=visible_T, drawn=None)


@torch.no_grad()
def draw(encoder: Encoder, denoise: nn.Module, wanted: Replacements) -> Tensor:
    """The samples, [G]."""
    training = encoder.training
    encoder.eval()
    hidden_RLH = encoder(wanted.inputs)
    encoder.train(training)
    logits_GV = denoise(hidden_RLH.flatten(0, 1).index_select(0, wanted.index_G))[:, : wanted.size]
    logits_GV = logits_GV.double().index_fill(1, wanted.special, -torch.inf)
    cumulated_GV = logits_GV.softmax(1).cumsum(1)
    at_G1 = wanted.uniform_G[:, None] * _BELOW_ONE * cumulated_GV[:, -1:]
    return torch.searchsorted(cumulated_GV, at_G1, right=True).squeeze(1)


def replaced(inputs: TokenInputs, wanted: Replacements, samples_G: Tensor) -> tuple[TokenInputs, Tensor]:
    """The piece's inputs with the samples in place, and which flattened positions changed, [R * L]."""
    before_T = inputs.ids_RL.flatten()
    after_T = before_T.index_copy(0, wanted.place_G, samples_G)
    return replace(inputs, ids_RL=after_T.view_as(inputs.ids_RL)), after_T != before_T
