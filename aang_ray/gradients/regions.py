"""The part of a graph that no rule knows: parameters whose gradients autograd computes segment by segment.

Such are parameters whose contribution is broadcast over the batch (tables of relative positions, projections of
them), parameters that are read directly, and modules that no rule knows. Taps cut the graph into
regions; at a tap's output the gradient G is known row by row. By linearity the parameter's gradient of segment
s is the vector-Jacobian product of the taps that it reaches first with G restricted to the rows of s.
It is exact whatever happens between, as long as rows of different segments do not mix, and costs one
backward pass through those regions (not through the model) for every segment.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from aang_ray.gradients.rules import Call, nodes_until_taps, per_row


class Regions:
    """The regions of one forward pass that hold parameters."""

    def __init__(self, calls: Iterable[Call], losses_S: Tensor, wanted: frozenset[nn.Parameter]) -> None:
        self.parameters: dict[nn.Parameter, None] = {}
        self._calls: list[tuple[Call, GradientEdge]] = []
        self._losses_S = losses_S.detach()
        self._below_losses: GradientEdge | None = None
        for call in calls:
            if call.rows.rows and call.below is not None and self._note(call.below, wanted):
                call.remember = True
                self._calls.append((call, call.below))
        edge = get_gradient_edge(losses_S)
        if self._note(edge, wanted):
            self._below_losses = edge

    def _note(self, edge: GradientEdge, wanted: frozenset[nn.Parameter]) -> bool:
        leaves = (getattr(node, "variable", None) for node in nodes_until_taps(edge.node))
        found = [leaf for leaf in leaves if leaf is not None and leaf in wanted]
        self.parameters.update(dict.fromkeys(found))
        return bool(found)

    def segment(self, parameters: Sequence[nn.Parameter], segment: int) -> list[Tensor | None]:
        """The regions' part of one segment's gradient of each parameter."""

        def restricted(call: Call, gradient: Tensor) -> Tensor:
            part = call.rows.of(segment)
            result = torch.zeros_like(gradient, memory_format=torch.contiguous_format)
            result.view(call.rows.rows, -1)[part] = gradient.reshape(call.rows.rows, -1)[part]
            return result

        one_S = torch.zeros_like(self._losses_S)
        one_S[segment] = 1.0
        return self._product(parameters, restricted, one_S)

    def weighted(self, parameters: Sequence[nn.Parameter], coefficients_S: Tensor) -> list[Tensor | None]:
        """The regions' part of sum_s c_s g_s of each parameter."""

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
