"""The Jacobian of per-example losses with respect to the body, as an operator: J is never held.

Shape suffixes: M examples, P entries of the body's parameters in the order of `named_parameters`, K directions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from aang_ray.gradients.engine import inner

# --- gradients.functional: Call a computation at other parameters than those that its modules hold.


A = TypeVar("A")


def called_at(
    parameters: Mapping[str, Tensor], modules: nn.Module, function: Callable[[A], Tensor], argument: A
) -> Any:
    """`function(argument)` with the modules' parameters replaced for the time of the call.

    `function` may hold the modules in any way: while it runs they hold the tensors of `parameters`, named as in
    `modules.named_parameters()`, and what it computes is differentiable with respect to those.
    """
    named = {f"modules_.{name}": value for name, value in parameters.items()}
    return functional_call(_Closure(modules, function), named, (argument,))


class _Closure(nn.Module):
    """Makes a function a module, so that `functional_call` finds the parameters to replace."""

    def __init__(self, modules: nn.Module, function: Callable[[A], Tensor]) -> None:
        super().__init__()
        self.modules_ = modules
        self._function: Callable[[Any], Tensor] = function

    def forward(self, argument: Any) -> Tensor:
        return self._function(argument)


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


# --- gradients.subspace: The subspace that the end task's per-example gradients span, and a gradient seen from it.
#
# Shape suffixes: M examples, P entries of the body's parameters, K directions.


def span(jacobian: ExampleJacobian, omega_KM: Tensor, rotate: bool) -> Tensor:
    """V, [P, K]: an orthonormal basis of about the K leading right singular directions of J.

    Randomised SVD (Halko, Martinsson, Tropp 2011) without J (semantics section 6, line 1):

        Y = (Omega J)^T,  Q = orth(Y),  B = J Q = U S W^T,  V = Q W

    With `rotate` false it stops at Q. A direction that no example's gradient has (J of lower rank than K, or 0)
    becomes a column of zeros: orthonormalising would put an arbitrary one there. Memory: three times V.
    """
    Q_PK: Tensor = torch.linalg.qr(jacobian.left(omega_KM).t()).Q
    B_MK = jacobian.right(Q_PK)
    # A loss that is not finite fails the step by its own check; the decomposition must not fail before that.
    _, S_K, W_KK = torch.linalg.svd(B_MK.nan_to_num(), full_matrices=False)
    smallest = S_K[0] * max(B_MK.shape) * torch.finfo(B_MK.dtype).eps
    V_PK = Q_PK @ W_KK.t() if rotate else Q_PK
    sizes_K = S_K if rotate else torch.linalg.vector_norm(B_MK, dim=0)
    return V_PK.mul_(sizes_K.gt(smallest)).contiguous()


def reweighted(g_P: Tensor, V_PK: Tensor, p_K: Tensor, perp: float, plus: float, minus: float) -> tuple[Tensor, Tensor]:
    """eta_perp g_perp + eta_plus g_plus + eta_minus g_minus, [P], and the three parts' shares of ||g||^2, [3].

    With a = V^T g and p = V^T (the end task's mean gradient):

        g_plus = V (a where a p > 0),  g_minus = V (a where a p <= 0),  g_perp = g - g_plus - g_minus

    (semantics section 6, lines 2 and 3). Shares are in the order perp, plus, minus; all 0 where g is.
    """
    a_K = V_PK.t() @ g_P
    helps_K = a_K.sign() * p_K.sign() > 0  # the product of two small numbers could be rounded to 0
    weight_K = torch.where(helps_K, plus - perp, minus - perp)
    direction_P = torch.addmv(g_P, V_PK, weight_K.to(a_K.dtype) * a_K, beta=perp)
    norm2 = inner(g_P, g_P)
    inside = torch.stack(((a_K * helps_K).square().sum(), (a_K * ~helps_K).square().sum()))
    shares_2 = torch.where(norm2 > 0, inside / torch.where(norm2 > 0, norm2, 1.0), 0.0)
    rest = torch.where(norm2 > 0, (1 - shares_2.sum()).clamp_min(0), 0.0)
    return direction_P, torch.cat((rest.reshape(1), shares_2))
