"""Gradients of a training step, one for each segment of its batch, and statistics of them."""

from __future__ import annotations

from typing import Literal

from torch import nn

from aang_ray.gradients.engine import Engine
from aang_ray.gradients.loop import LoopEngine
from aang_ray.gradients.single_pass import SegmentEngine

__all__ = ["LoopEngine", "SegmentEngine", "make_engine"]


def make_engine(
    name: Literal["segments", "loop"], body: nn.Module, heads: nn.Module, *, tied_in_scores: bool
) -> Engine:
    """Return a gradient engine."""
    kind = SegmentEngine if name == "segments" else LoopEngine
    return kind(body, heads, tied_in_scores)
