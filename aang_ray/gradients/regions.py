"""Taps on the outputs of modules, and regions, which are the parts of the autograd graph between taps.

A *tap* is an identity on a module's output. In the backward pass it receives the gradient G with respect to that
output. A parameter p without a rule (`rules.py`) lies in one or more regions. Rows of different segments do not mix, so

    dL_s/dp = sum over taps ( d output_tap / dp )^T [ G_tap, with the rows outside segment s set to 0 ]

over the taps that p reaches without passing another tap, whatever the region computes (docs/single-pass.md).

Shape suffixes: N rows, S segments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from aang_ray.model.segments import SegmentRows, per_row


@dataclass
class Call:
    """One call of a module in a forward pass, on whose output there is a tap."""

    rows: SegmentRows
    on_gradient: Callable[[Call, Tensor, Tensor], None] | None
    """Called in the backward pass with the call, G, and the kept part of the module's input; None for no call."""
    below: GradientEdge | None
    """The module's output in the graph, before the tap; None if it requires no gradient."""
    cut: Callable[[], bool]
    """Returns whether gradients stop at the tap."""
    remember: bool = False
    """Whether to store G."""
    gradient: Tensor | None = None
    """G, if it is stored."""


class Tap(torch.autograd.Function):
    """The identity on a module's output. Its backward pass passes G and the module's input to the call.

    The input is saved with `save_for_backward`, so gradient checkpointing recomputes it. `anchor` is a scalar that
    requires a gradient, so that the backward pass reaches the tap even if nothing before it does.
    """

    @staticmethod
    def forward(ctx: Any, call: Call, anchor: Tensor, output: Tensor, *kept: Tensor) -> Tensor:
        ctx.call, ctx.kept = call, len(kept)
        ctx.save_for_backward(*kept)
        ctx.set_materialize_grads(False)
        # With detach(), autograd does not treat the result as a view, so the next module may work in place.
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
        if call.on_gradient is not None:
            (kept,) = ctx.saved_tensors
            call.on_gradient(call, grad, kept)
        return (None, None, grad, *of_kept)


def is_tap(node: Node) -> bool:
    """Return whether a node of the graph is a tap."""
    return isinstance(node, Tap._backward_cls)


def nodes_until_taps(start: Node | None) -> Iterable[Node]:
    """Yield the nodes of a graph from `start` down to and including the first tap on every path."""
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


class Regions:
    """The regions of one forward pass, up to the losses, that contain `wanted` parameters."""

    def __init__(self, calls: Iterable[Call], losses_S: Tensor, wanted: frozenset[nn.Parameter]) -> None:
        self.parameters: dict[nn.Parameter, None] = {}
        """The wanted parameters that lie in a region (an ordered set)."""
        self._calls: list[tuple[Call, GradientEdge]] = []
        self._losses_S = losses_S.detach()
        self._below_losses: GradientEdge | None = None
        for call in calls:
            if call.rows.rows and call.below is not None and self._find(call.below, wanted):
                call.remember = True
                self._calls.append((call, call.below))
        edge = get_gradient_edge(losses_S)
        if self._find(edge, wanted):
            self._below_losses = edge

    def _find(self, edge: GradientEdge, wanted: frozenset[nn.Parameter]) -> bool:
        """Add the wanted parameters of one region to `parameters`, and return whether there are any."""
        leaves = (getattr(node, "variable", None) for node in nodes_until_taps(edge.node))
        found = [leaf for leaf in leaves if leaf is not None and leaf in wanted]
        self.parameters.update(dict.fromkeys(found))
        return bool(found)

    def segment(self, parameters: Sequence[nn.Parameter], segment: int) -> list[Tensor | None]:
        """Return the regions' part of g_s for each parameter; None for a parameter without one."""

        def restricted(call: Call, gradient: Tensor) -> Tensor:
            part = call.rows.of(segment)
            result = torch.zeros_like(gradient, memory_format=torch.contiguous_format)
            result.view(call.rows.rows, -1)[part] = gradient.reshape(call.rows.rows, -1)[part]
            return result

        one_S = torch.zeros_like(self._losses_S)
        one_S[segment] = 1.0
        return self._product(parameters, restricted, one_S)

    def weighted(self, parameters: Sequence[nn.Parameter], coefficients_S: Tensor) -> list[Tensor | None]:
        """Return the regions' part of sum_s c_s g_s for each parameter; None for a parameter without one."""

        def restricted(call: Call, gradient: Tensor) -> Tensor:
            weights_N = per_row(coefficients_S, call.rows).to(gradient.dtype)
            return (gradient.reshape(call.rows.rows, -1) * weights_N[:, None]).view(gradient.shape)

        return self._product(parameters, restricted, coefficients_S.to(self._losses_S.dtype))

    def _product(
        self, parameters: Sequence[nn.Parameter], restricted: Callable[[Call, Tensor], Tensor], at_losses_S: Tensor
    ) -> list[Tensor | None]:
        reached = [(edge, restricted(call, g)) for call, edge in self._calls if (g := call.gradient) is not None]
        if self._below_losses is not None:
            reached.append((self._below_losses, at_losses_S))
        edges, gradients = zip(*reached, strict=True)
        return list(torch.autograd.grad(edges, parameters, gradients, retain_graph=True, allow_unused=True))
