"""The unweighted mean loss of every segment of a piece.

L_s = (sum over the segment's labels of weight * loss) / (sum of its label weights at this step), so that shares of
pieces add up to the step's mean whatever the accumulation. The loss is cross-entropy for tokens and classes and
squared error for values. A segment without labels has L = 0. (semantics section 2.6)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from aang_ray.model.encoder import Encoder
from aang_ray.model.segments import segment_rows
from aang_ray.objectives.batch import BatchPiece, Targets, draw, replaced
from aang_ray.objectives.outputs import DENOISE_HEAD


def segment_losses(encoder: Encoder, heads: Mapping[str, nn.Module], piece: BatchPiece) -> Tensor:
    """[S] losses, differentiable; `heads` maps the names in the piece's targets to modules.

    Vocabulary logits are computed at labelled positions only; cross-entropy in fp32 or wider.
    """
    piece = with_replacements(encoder, heads, piece)
    hidden_RLH = encoder(piece.inputs)
    losses_S = torch.zeros(piece.segments, device=hidden_RLH.device, dtype=_wide(hidden_RLH.dtype))
    flat_TH = hidden_RLH.flatten(0, 1)
    for targets in piece.vocabulary:
        losses_S = losses_S + shares(heads[targets.head], flat_TH, targets, piece.segments)
    if piece.pooled:
        pooled_EH = encoder.pool(hidden_RLH, piece.inputs)
        for targets in piece.pooled:
            losses_S = losses_S + shares(heads[targets.head], pooled_EH, targets, piece.segments)
    return losses_S


def with_replacements(encoder: Encoder, heads: Mapping[str, nn.Module], piece: BatchPiece) -> BatchPiece:
    """The piece with tokens drawn by the denoise head in their places, and labels that say which changed."""
    wanted = piece.replacements
    if wanted is None:
        return piece
    inputs, changed_T = replaced(piece.inputs, wanted, draw(encoder, heads[DENOISE_HEAD], wanted))

    def labelled(targets: Targets) -> Targets:
        if not targets.of_replacements:
            return targets
        return replace(targets, label_K=changed_T.index_select(0, targets.index_K).long())

    return replace(piece, inputs=inputs, vocabulary=tuple(map(labelled, piece.vocabulary)), replacements=None)


def shares(head: nn.Module, source: Tensor, targets: Targets, segments: int) -> Tensor:
    """One head's share of every segment's loss, [S]: cross-entropy for classes, mean squared error for numbers."""
    with segment_rows(targets.rows):
        outputs_KC = head(source.index_select(0, targets.index_K))
    outputs_KC = outputs_KC.to(_wide(outputs_KC.dtype))
    if targets.label_K.is_floating_point():
        loss_K = F.mse_loss(outputs_KC, targets.label_K.to(outputs_KC.dtype), reduction="none").mean(1)
    else:
        loss_K = F.cross_entropy(outputs_KC, targets.label_K, reduction="none")
    shares_S = torch.zeros(segments, device=loss_K.device, dtype=loss_K.dtype)
    return shares_S.index_add(0, targets.segment_K, loss_K * targets.weight_K.to(loss_K.dtype))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
