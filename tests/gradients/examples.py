"""Steps on vectors, images or ids: every example is one row, every segment a range of examples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from aang_ray.model.segments import SegmentRows, segment_rows


@dataclass(frozen=True)
class Examples:
    """[N, ...] inputs and classes of the segments; `tokens` counts positions of the body."""

    inputs: Tensor
    classes_N: Tensor
    examples: SegmentRows
    tokens: SegmentRows


def examples(inputs: Tensor, bounds: Sequence[int], positions: int = 1) -> Examples:
    """Cut inputs [N, ...] at `bounds`; a body that works on sequences has `positions` rows for each example."""
    rows = SegmentRows(tuple(bounds))
    return Examples(
        inputs, torch.arange(len(inputs)) % 3, rows, SegmentRows(tuple(bound * positions for bound in bounds))
    )


def example_losses(body: nn.Module, head: nn.Module) -> Callable[[Examples], Tensor]:
    """Sum of the cross-entropies of each segment's examples; 0 for an empty one."""

    def losses(piece: Examples) -> Tensor:
        features = body(piece.inputs)
        with segment_rows(piece.examples):
            logits_NC = head(features)
        loss_N = F.cross_entropy(logits_NC, piece.classes_N, reduction="none")
        parts = [loss_N[piece.examples.of(s)].sum() for s in range(piece.examples.count)]
        return torch.stack(parts)

    return losses


def heads_of(width: int, dtype: torch.dtype = torch.float64) -> nn.ModuleDict:
    torch.manual_seed(3)
    return nn.ModuleDict({"head": nn.Linear(width, 3, dtype=dtype)})
