"""The places where a pass is listened to: module calls whose rows belong to segments."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from aang_ray.model.segments import SegmentRows


@dataclass
class Call:
    """One call of a module in a forward pass."""

    rows: SegmentRows
    arrive: Callable[[Call, Tensor, Tensor], None] | None
    """What to do with G and the kept input when the backward pass comes by; None: nothing."""
    below: GradientEdge | None
    """Where the module's own graph begins, below the tap; None where autograd recorded nothing."""
    cut: Callable[[], bool]
    """Whether gradients stop here."""
    remember: bool = False
    gradient: Tensor | None = None
    """G, where it is remembered."""


class Tap(torch.autograd.Function):
    """The identity on a module's output; its backward pass shows the module's input and G to the call.

    The input goes through `save_for_backward`, so that what watches over saved tensors does so here, too:
    gradient checkpointing recomputes it, and changing it in place is an error. `anchor` is a
    scalar that requires a gradient: the backward pass comes by even if nothing below does.
    """

    @staticmethod
    def forward(ctx: Any, call: Call, anchor: Tensor, output: Tensor, *kept: Tensor) -> Tensor:
        ctx.call, ctx.kept = call, len(kept)
        ctx.save_for_backward(*kept)
        ctx.set_materialize_grads(False)
        # Not a view in autograd's eyes, so that the next module may work in place.
        return output.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        call: Call = ctx.call
        grad = grads[0]
        of_kept = (None,) * ctx.kept
        if grad is None or call.cut():
            return (None, None, None, *of_kept)
        if call.remember:
            call.gradient = grad
        if call.arrive is not None:
            (kept,) = ctx.saved_tensors
            call.arrive(call, grad, kept)
        return (None, None, grad, *of_kept)


def nodes_until_taps(start: Node | None) -> Iterable[Node]:
    """The nodes of a graph down to, and including, the first taps on every way."""
    seen: set[Node] = set()
    open_nodes = [start]
    while open_nodes:
        node = open_nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        if not is_tap(node):
            open_nodes.extend(below for below, _ in node.next_functions)


def is_tap(node: Node) -> bool:
    """Whether a node of the graph is a tap."""
    return isinstance(node, Tap._backward_cls)
