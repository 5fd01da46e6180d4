"""The Jacobian of per-example losses with respect to the body, as an operator: J is never held.

Shape suffixes: M examples, P entries of the body's parameters in the order of `named_parameters`, K directions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from aang_ray.gradients.functional import called_at


class ExampleJacobian:
    """J = d l_M / d theta at the parameters that the body holds, over pieces of examples one after the other.

    `losses(piece)` gives a piece's losses, [E], in the mode that the body is in: dropout has to be off, or the
    passes would be of different functions. `examples` is how many they are, M. Results are in fp32, in fp64 for
    an fp64 body.
    """

    def __init__(self, body: nn.Module, pieces: Sequence[Any], losses: Callable[[Any], Tensor], examples: int) -> None:
        self.examples = examples
        self._body, self._pieces, self._losses = body, pieces, losses
        self._named = {name: p for name, p in body.named_parameters() if p.requires_grad}
        first = self.parameters[0]
        self._dtype, self._device = torch.promote_types(first.dtype, torch.float32), first.device
        self.size = sum(p.numel() for p in self.parameters)
        """P."""

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Of the body, in the order of the P axis."""
        return list(self._named.values())

    def left(self, omega_KM: Tensor) -> Tensor:
        """Omega J, [K, P]: one forward pass of every piece, K backward passes."""
        result_KP = torch.zeros(len(omega_KM), self.size, dtype=self._dtype, device=self._device)
        start = 0
        for losses_E in self._forward():
            omega_KE = omega_KM[:, start : start + len(losses_E)].to(losses_E)
            start += len(losses_E)
            for row, omega_E in enumerate(omega_KE):
                keep = row + 1 < len(omega_KE)
                found = torch.autograd.grad(losses_E, self.parameters, omega_E, retain_graph=keep, allow_unused=True)
                result_KP[row] += self._flat(found)
        return result_KP

    def right(self, directions_PK: Tensor) -> Tensor:
        """J Q, [M, K]: K forward-mode passes of every piece, without a graph."""
        columns = []
        # The fused attention kernels have no forward-mode derivative, their composition of matrix products has.
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level():
            for direction_P in directions_PK.unbind(1):
                tangents = self._split(direction_P)
                duals = {name: _dual(p.detach(), tangents[name]) for name, p in self._named.items()}
                losses = [called_at(duals, self._body, self._losses, piece) for piece in self._pieces]
                columns.append(torch.cat([_tangent(losses_E) for losses_E in losses]).to(self._dtype))
        return torch.stack(columns, dim=1)

    def mean_gradient(self) -> Tensor:
        """1/M sum_i J_i, [P]: the gradient of the mean loss."""
        result_P = torch.zeros(self.size, dtype=self._dtype, device=self._device)
        for losses_E in self._forward():
            result_P += self._flat(torch.autograd.grad(losses_E.sum(), self.parameters, allow_unused=True))
        return result_P / self.examples

    def _forward(self) -> Iterator[Tensor]:
        for piece in self._pieces:
            yield self._losses(piece)

    def _flat(self, gradients: Sequence[Tensor | None]) -> Tensor:
        parts = [torch.zeros_like(p) if g is None else g for p, g in zip(self.parameters, gradients, strict=True)]
        return torch.cat([part.flatten() for part in parts]).to(self._dtype)

    def _split(self, vector_P: Tensor) -> dict[str, Tensor]:
        parts = torch.split(vector_P, [p.numel() for p in self.parameters])
        return {n: part.view_as(p).to(p.dtype) for (n, p), part in zip(self._named.items(), parts, strict=True)}


def _dual(value: Tensor, tangent: Tensor) -> Tensor:
    dual: Tensor = forward_ad.make_dual(value, tangent)  # type: ignore[no-untyped-call]
    return dual


def _tangent(dual: Tensor) -> Tensor:
    """Zero where the value depends on nothing that has a tangent."""
    tangent: Tensor | None = forward_ad.unpack_dual(dual).tangent  # type: ignore[no-untyped-call]
    return torch.zeros_like(dual) if tangent is None else tangent
