"""Statistics of gradients: scores, the Gram matrix, the Jacobian of per-example losses, and a subspace of it.

Shape suffixes: S segments, M examples, E examples of one piece, P entries of the body's parameters in the order of
`named_parameters`, K directions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from aang_ray.gradients.engine import Request, StepGradients, split_vector
from aang_ray.gradients.products import inner

A = TypeVar("A")


def cosine(dots_S: Tensor, norms2_S: Tensor) -> Tensor:
    """Return cos(v, g_s) from `dots_S` = <v, g_s> and `norms2_S` = ||g_s||^2; g_0 is v. It is 0 where a norm is 0."""
    # The product of the square roots, because the root of the product could underflow or overflow.
    norms_S = norms2_S.clamp_min(0).sqrt()
    product_S = norms_S[0] * norms_S
    defined_S = product_S > 0
    return torch.where(defined_S, dots_S / torch.where(defined_S, product_S, 1.0), 0.0).clamp(-1.0, 1.0)


def from_gram(losses_S: Tensor, gram_SS: Tensor, request: Request, separate_SP: Tensor | None) -> StepGradients:
    """Return the requested statistics from the Gram matrix: norms are its diagonal, ||sum_s c_s g_s||^2 is cᵀ G c."""
    joint_norm2 = None
    if request.scores and request.joint_from is not None:
        numbers_S = torch.arange(len(gram_SS), device=gram_SS.device)
        joint_S = request.coefficients_S.to(gram_SS.dtype).masked_fill(numbers_S < request.joint_from, 0.0)
        joint_norm2 = joint_S @ gram_SS @ joint_S
    return StepGradients(
        losses_S=losses_S,
        dots_S=gram_SS[0].clone() if request.scores else None,
        norms2_S=gram_SS.diagonal().clone() if request.scores else None,
        joint_norm2=joint_norm2,
        gram_SS=gram_SS if request.gram else None,
        separate_SP=separate_SP if request.separate else None,
    )


def called_at(
    parameters: Mapping[str, Tensor], modules: nn.Module, function: Callable[[A], Tensor], argument: A
) -> Any:
    """Return `function(argument)`, differentiable by `parameters`, which replace those of `modules` during the call."""
    named = {f"modules_.{name}": value for name, value in parameters.items()}
    return functional_call(_Closure(modules, function), named, (argument,))


class _Closure(nn.Module):
    """Wraps a function in a module, so that `functional_call` finds the parameters to replace."""

    def __init__(self, modules: nn.Module, function: Callable[[A], Tensor]) -> None:
        super().__init__()
        self.modules_ = modules
        self._function: Callable[[Any], Tensor] = function

    def forward(self, argument: Any) -> Tensor:
        return self._function(argument)


class ExampleJacobian:
    """Products with the Jacobian J = d l_M / d theta, [M, P], of per-example losses, in fp32 (fp64 for an fp64 body).

    Args:
        body: The module with the parameters theta.
        pieces: The examples in pieces.
        losses: Returns a piece's losses, [E]. Dropout must be off, because every pass must compute the same function.
        examples: Number of examples M.
    """

    def __init__(self, body: nn.Module, pieces: Sequence[Any], losses: Callable[[Any], Tensor], examples: int) -> None:
        self.examples = examples
        self._body, self._pieces, self._losses = body, pieces, losses
        named = {name: p for name, p in body.named_parameters() if p.requires_grad}
        self._names, self.parameters = list(named), list(named.values())
        first = self.parameters[0]
        self._dtype, self._device = torch.promote_types(first.dtype, torch.float32), first.device
        self.size = sum(p.numel() for p in self.parameters)

    def left(self, omega_KM: Tensor) -> Tensor:
        """Return Omega J, [K, P]. Every piece takes one forward pass and K backward passes."""
        result_KP = torch.zeros(len(omega_KM), self.size, dtype=self._dtype, device=self._device)
        start = 0
        for piece in self._pieces:
            losses_E = self._losses(piece)
            omega_KE = omega_KM[:, start : start + len(losses_E)].to(losses_E)
            start += len(losses_E)
            for row, omega_E in enumerate(omega_KE):
                keep = row + 1 < len(omega_KE)
                found = torch.autograd.grad(losses_E, self.parameters, omega_E, retain_graph=keep, allow_unused=True)
                result_KP[row] += self._flat(found)
        return result_KP

    def right(self, directions_PK: Tensor) -> Tensor:
        """Return J Q, [M, K]. Every piece takes K forward passes with forward-mode differentiation, without a graph."""
        columns = []
        # Fused attention kernels have no forward-mode derivative, but the MATH backend has one.
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level():
            for direction_P in directions_PK.unbind(1):
                tangents = split_vector(direction_P, self.parameters)
                duals = {n: _dual(p.detach(), t.to(p.dtype)) for n, (p, t) in zip(self._names, tangents, strict=True)}
                losses = [called_at(duals, self._body, self._losses, piece) for piece in self._pieces]
                columns.append(torch.cat([_tangent(losses_E) for losses_E in losses]).to(self._dtype))
        return torch.stack(columns, dim=1)

    def mean_gradient(self) -> Tensor:
        """Return 1/M sum_i J_i, [P], the gradient of the mean loss."""
        result_P = torch.zeros(self.size, dtype=self._dtype, device=self._device)
        for piece in self._pieces:
            losses_E = self._losses(piece)
            result_P += self._flat(torch.autograd.grad(losses_E.sum(), self.parameters, allow_unused=True))
        return result_P / self.examples

    def _flat(self, gradients: Sequence[Tensor | None]) -> Tensor:
        parts = [torch.zeros_like(p) if g is None else g for p, g in zip(self.parameters, gradients, strict=True)]
        return torch.cat([part.flatten() for part in parts]).to(self._dtype)


def _dual(value: Tensor, tangent: Tensor) -> Tensor:
    dual: Tensor = forward_ad.make_dual(value, tangent)  # type: ignore[no-untyped-call]
    return dual


def _tangent(dual: Tensor) -> Tensor:
    """Return the tangent of a dual number; zeros if it depends on nothing with a tangent."""
    tangent: Tensor | None = forward_ad.unpack_dual(dual).tangent  # type: ignore[no-untyped-call]
    return torch.zeros_like(dual) if tangent is None else tangent


def span(jacobian: ExampleJacobian, omega_KM: Tensor, rotate: bool) -> Tensor:
    """Return an orthonormal basis V, [P, K], approximately the K leading right singular vectors of J.

    This is a randomised SVD (Halko, Martinsson, Tropp 2011; docs/semantics.md, section 6, step 1):

        Y = (Omega J)^T,  Q = orth(Y),  B = J Q = U S W^T,  V = Q W

    If the rank of J is less than K, the remaining columns are 0, where orthonormalising would give arbitrary
    directions. Needs three times the memory of V.

    Args:
        jacobian: J, [M, P].
        omega_KM: A Gaussian random matrix Omega.
        rotate: If false, return Q instead of V.
    """
    Q_PK: Tensor = torch.linalg.qr(jacobian.left(omega_KM).t()).Q
    B_MK = jacobian.right(Q_PK)
    # The step itself checks for losses that are not finite; the decomposition must not fail before that.
    _, S_K, W_KK = torch.linalg.svd(B_MK.nan_to_num(), full_matrices=False)
    smallest = S_K[0] * max(B_MK.shape) * torch.finfo(B_MK.dtype).eps
    V_PK = Q_PK @ W_KK.t() if rotate else Q_PK
    sizes_K = S_K if rotate else torch.linalg.vector_norm(B_MK, dim=0)
    return V_PK.mul_(sizes_K.gt(smallest)).contiguous()


def reweighted(g_P: Tensor, V_PK: Tensor, p_K: Tensor, perp: float, plus: float, minus: float) -> tuple[Tensor, Tensor]:
    """Return the gradient eta_perp g_perp + eta_plus g_plus + eta_minus g_minus of ATTITTUD.

    With a = V^T g (docs/semantics.md, section 6, steps 2 and 3):

        g_plus = V (a where a p > 0),  g_minus = V (a where a p <= 0),  g_perp = g - g_plus - g_minus

    Args:
        g_P: The auxiliary gradient g.
        V_PK: Orthonormal directions; some columns may be 0.
        p_K: V^T times the end task's mean gradient.
        perp, plus, minus: The weights eta.

    Returns:
        The reweighted gradient, [P], and the shares of ||g||^2 in g_perp, g_plus and g_minus, [3] (zeros if g is 0).
    """
    a_K = V_PK.t() @ g_P
    helps_K = a_K.sign() * p_K.sign() > 0  # product of signs: the product of two small numbers may round to 0
    weight_K = torch.where(helps_K, plus - perp, minus - perp)
    direction_P = torch.addmv(g_P, V_PK, weight_K.to(a_K.dtype) * a_K, beta=perp)
    norm2 = inner(g_P, g_P)
    inside = torch.stack(((a_K * helps_K).square().sum(), (a_K * ~helps_K).square().sum()))
    shares_2 = torch.where(norm2 > 0, inside / torch.where(norm2 > 0, norm2, 1.0), 0.0)
    rest = torch.where(norm2 > 0, (1 - shares_2.sum()).clamp_min(0), 0.0)
    return direction_P, torch.cat((rest.reshape(1), shares_2))
