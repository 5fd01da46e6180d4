"""The unweighted mean loss of every segment of a piece. (docs/semantics.md, section 2.6)

L_s = (sum over the segment's labels of weight * loss) / (sum of its label weights at this step): shares of pieces add
up to the step's mean however the batch is cut. A segment without labels has L = 0.

Shape suffixes: R rows, L columns, T = R * L flattened positions, E texts, H hidden size, S segments, K targets of a
head, C outputs of a head, G generated tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from aang_ray.model.encoder import Encoder
from aang_ray.model.heads import TokenHead
from aang_ray.model.segments import segment_rows
from aang_ray.objectives.batch import BatchPiece, Replacements, Targets
from aang_ray.objectives.calibration import Calibrated, calibrated
from aang_ray.objectives.outputs import DENOISE_HEAD


def segment_losses(encoder: Encoder, heads: Mapping[str, nn.Module], piece: BatchPiece) -> Tensor:
    """Return a piece's share of every segment's loss, [S], differentiable, in fp32 or wider.

    Vocabulary heads read labelled tokens only, and their logits exist for one block of rows at a time
    (`model/vocabulary_loss.py`).
    """
    piece = with_replacements(encoder, heads, piece)
    hidden_RLH = encoder(piece.inputs)
    losses_S = head_losses(heads, hidden_RLH.flatten(0, 1), piece.vocabulary, piece.tokens.count)
    if piece.pooled:
        pooled_EH = encoder.pool(hidden_RLH, piece.inputs)
        losses_S = losses_S + head_losses(heads, pooled_EH, piece.pooled, piece.tokens.count)
    return losses_S


def head_losses(heads: Mapping[str, nn.Module], source: Tensor, read: Sequence[Targets], segments: int) -> Tensor:
    """Return the share of every segment's loss, [S], of the heads that read rows of `source`, [T, H] or [E, H]."""
    losses_S = torch.zeros(segments, device=source.device, dtype=_wide(source.dtype))
    for targets in read:
        with segment_rows(targets.rows):
            loss_K = _row_losses(heads[targets.head], source.index_select(0, targets.index_K), targets)
        shares_S = torch.zeros(segments, device=loss_K.device, dtype=loss_K.dtype)
        weighted_K = loss_K * targets.weight_K.to(loss_K.dtype)
        losses_S = losses_S + shares_S.index_add(0, targets.segment_K, weighted_K)
    return losses_S


def _row_losses(head: nn.Module, chosen: Tensor, targets: Targets) -> Tensor:
    """Return the loss of each target, [K], in fp32 or wider."""
    if isinstance(head, TokenHead):
        loss_K: Tensor = head(chosen, targets.label_K, targets.weight_K)
        return loss_K
    outputs_KC = head(chosen)
    outputs_KC = outputs_KC.to(_wide(outputs_KC.dtype))
    if isinstance(head, Calibrated):
        outputs_KC = calibrated(outputs_KC, targets.label_K, targets.weight_K)
    if targets.label_K.is_floating_point():
        return F.mse_loss(outputs_KC, targets.label_K.to(outputs_KC.dtype), reduction="none").mean(1)
    return F.cross_entropy(outputs_KC, targets.label_K, reduction="none")


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


# Replaced tokens, as in ELECTRA (Clark et al. 2020), with the run's own body and denoise head as the generator.

_BELOW_ONE = 1.0 - 2.0**-40
"""Factor that keeps a sample inside its distribution whatever is rounded."""

DRAWN_AT_ONCE = 256
"""Tokens that are drawn at once: their logits are in double precision."""


def with_replacements(encoder: Encoder, heads: Mapping[str, nn.Module], piece: BatchPiece) -> BatchPiece:
    """Return the piece with generated tokens in their places, and labels that tell which tokens changed."""
    wanted = piece.replacements
    if wanted is None:
        return piece
    before_T = piece.inputs.ids_RL.flatten()
    after_T = before_T.index_copy(0, wanted.place_G, draw(encoder, heads[DENOISE_HEAD], wanted))
    changed_T = (after_T != before_T).long()
    vocabulary = tuple(
        replace(targets, label_K=changed_T.index_select(0, targets.index_K)) if targets.of_replacements else targets
        for targets in piece.vocabulary
    )
    inputs = replace(piece.inputs, ids_RL=after_T.view_as(piece.inputs.ids_RL))
    return replace(piece, inputs=inputs, vocabulary=vocabulary, replacements=None)


@torch.no_grad()
def draw(encoder: Encoder, denoise: nn.Module, wanted: Replacements) -> Tensor:
    """Sample token ids, [G], from the denoise head's predictions, without gradient and with dropout off.

    A sample is the inverse of the predicted distribution at a number that is a function of (seed, step, objective,
    example). So it does not depend on how the batch is cut, unless rounding moves a boundary across that number.
    """
    training = encoder.training
    encoder.eval()
    hidden_RLH = encoder(wanted.inputs)
    encoder.train(training)
    chosen_GH = hidden_RLH.flatten(0, 1).index_select(0, wanted.index_G)
    blocks = zip(*(torch.split(part, DRAWN_AT_ONCE) for part in (chosen_GH, wanted.uniform_G)), strict=True)
    return torch.cat([_draw_block(denoise(block_BH), uniform_B, wanted) for block_BH, uniform_B in blocks])


def _draw_block(logits_BV: Tensor, uniform_B: Tensor, wanted: Replacements) -> Tensor:
    """Return the sample of each row of logits, [B]."""
    logits_BV = logits_BV[:, : wanted.size].double().index_fill(1, wanted.special, -torch.inf)
    cumulated_BV = logits_BV.softmax(1).cumsum(1)
    at_B1 = uniform_B[:, None] * _BELOW_ONE * cumulated_BV[:, -1:]
    return torch.searchsorted(cumulated_BV, at_B1, right=True).squeeze(1)
