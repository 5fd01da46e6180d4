"""How a module's parameters get their segment gradients from its inputs X and the gradient G at its output.

| module | segment's gradient |
|---|---|
| Linear | weight G_sᵀ X_s, bias sum of G_s |
| Conv1D of GPT-2 (x W + b) | weight X_sᵀ G_s, bias sum of G_s |
| Embedding | row v: sum of G over the segment's rows with id v |
| LayerNorm, RMSNorm | weight sum of G * normalised(X), bias sum of G |
| Conv1d, Conv2d | correlation of the segment's examples' X with G |
| decoder tied to a table | table G_sᵀ X_s, bias sum of G_s |

Any other module is left to autograd, segment by segment (`regions.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node
from torch.nn import functional as F
from torch.nn.grad import conv1d_weight, conv2d_weight

from aang_ray.gradients.engine import UnsupportedModule
from aang_ray.model.heads import TiedDecoder
from aang_ray.model.segments import SegmentRows

# --- gradients.contributions: What one call of one module gives to the gradient of one parameter, segment by segment.
#
# Shape suffixes: N rows, S segments, I inputs, O outputs, V entries of a table, H its width, P parameters.
# Rows of a segment are contiguous, so that a segment's part is a slice and never a copy.


def per_row(values_S: Tensor, rows: SegmentRows) -> Tensor:
    """Every row's value of its segment, [S] to [N], without waiting for the device."""
    lengths = torch.tensor([b - a for a, b in zip(rows.bounds, rows.bounds[1:], strict=False)])
    return values_S.repeat_interleave(lengths.to(values_S.device, non_blocking=True), output_size=rows.rows)


class Contribution(Protocol):
    """The part of a parameter's segment gradients that comes from one call."""

    rows: SegmentRows

    def add_to(self, segment: int, out: Tensor) -> None:
        """Add the segment's gradient to a tensor of the parameter's shape."""
        ...

    def add_total(self, coefficients_S: Tensor, out: Tensor) -> None:
        """Add sum_s c_s g_s to a tensor of the parameter's shape."""
        ...


class Products:
    """A matrix that maps rows: the segment's gradient is G_sᵀ X_s, [O, I], the same products as in the sum."""

    def __init__(self, grads_NO: Tensor, inputs_NI: Tensor, rows: SegmentRows) -> None:
        self.rows = rows
        self.grads_NO = grads_NO
        self.inputs_NI = inputs_NI

    def add_to(self, segment: int, out: Tensor) -> None:
        part = self.rows.of(segment)
        out += self.grads_NO[part].t() @ self.inputs_NI[part]

    def add_total(self, coefficients_S: Tensor, out: Tensor) -> None:
        weights_N = per_row(coefficients_S, self.rows).to(self.inputs_NI.dtype)
        out += self.grads_NO.t() @ (self.inputs_NI * weights_N[:, None])


class Sums:
    """A vector that is added to every row: the segment's gradient is the sum of its rows of G.

    With `inputs` and `scaled`, a vector that multiplies `scaled(row)`: the sum of G * scaled(X).
    """

    def __init__(
        self,
        grads_NP: Tensor,
        rows: SegmentRows,
        inputs_NP: Tensor | None = None,
        scaled: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.rows = rows
        self.grads_NP = grads_NP
        self.inputs_NP = inputs_NP
        self.scaled = scaled

    def columns(self, dtype: torch.dtype, members: Callable[[SegmentRows, Tensor], Tensor] | None = None) -> Tensor:
        """All segments' gradients, [S, P], in the given type.

        With `members`, a function that gives the 0/1 matrix of who owns which row, [S, N], rows of half
        precision are added by a product with it: read once, accumulated in fp32, rounded once.
        """
        if members is not None and self.inputs_NP is None and self.grads_NP.dtype in (torch.bfloat16, torch.float16):
            return (members(self.rows, self.grads_NP) @ self.grads_NP).to(dtype)
        columns_SP = self.grads_NP.new_zeros(self.rows.count, self.grads_NP.shape[1], dtype=dtype)
        for segment in range(self.rows.count):
            part = self.rows.of(segment)
            if part.stop > part.start:
                torch.sum(self._terms(part, dtype), dim=0, dtype=dtype, out=columns_SP[segment])
        return columns_SP

    def _terms(self, part: slice, dtype: torch.dtype) -> Tensor:
        grads_NP = self.grads_NP[part]
        if self.inputs_NP is None or self.scaled is None:
            return grads_NP
        return self.scaled(self.inputs_NP[part].to(dtype)).mul_(grads_NP)

    def add_to(self, segment: int, out: Tensor) -> None:
        out += self._terms(self.rows.of(segment), out.dtype).sum(0, dtype=out.dtype).view(out.shape)

    def add_total(self, coefficients_S: Tensor, out: Tensor) -> None:
        out += (coefficients_S @ self.columns(coefficients_S.dtype)).view(out.shape)


class Lookups:
    """A table read at ids: row v of the segment's gradient is the sum of G over the segment's rows with id v."""

    def __init__(self, grads_NH: Tensor, ids_N: Tensor, rows: SegmentRows, padding: int | None) -> None:
        self.rows = rows
        self.ids_N = ids_N
        # The entry of padding is constant by definition of the module.
        self.grads_NH = grads_NH if padding is None else grads_NH * (ids_N != padding)[:, None]

    def add_to(self, segment: int, out: Tensor) -> None:
        part = self.rows.of(segment)
        out.index_add_(0, self.ids_N[part], self.grads_NH[part].to(out.dtype))

    def add_total(self, coefficients_S: Tensor, out: Tensor) -> None:
        weights_N = per_row(coefficients_S, self.rows).to(out.dtype)
        out.index_add_(0, self.ids_N, self.grads_NH.to(out.dtype) * weights_N[:, None])


class Convolution:
    """A filter bank: the segment's gradient is the correlation of its examples' inputs with their gradients."""

    def __init__(self, module: nn.Conv1d | nn.Conv2d, grads: Tensor, inputs: Tensor, rows: SegmentRows) -> None:
        self.rows = rows
        self._module: Any = module
        self._grads = grads
        self._inputs = inputs

    def add_to(self, segment: int, out: Tensor) -> None:
        part = self.rows.of(segment)
        module = self._module
        weight_grad: Callable[..., Tensor] = conv1d_weight if isinstance(module, nn.Conv1d) else conv2d_weight
        out += weight_grad(
            self._inputs[part],
            module.weight.shape,
            self._grads[part],
            module.stride,
            module.padding,
            module.dilation,
            module.groups,
        )

    def add_total(self, coefficients_S: Tensor, out: Tensor) -> None:
        for segment in range(self.rows.count):
            gradient = torch.zeros_like(out)
            self.add_to(segment, gradient)
            out += coefficients_S[segment] * gradient


Contributions = list[tuple[nn.Parameter, Contribution]]


class Rule(Protocol):
    """Knows one kind of module. A rule belongs to one module, `module`."""

    @property
    def parameters(self) -> Sequence[nn.Parameter]:
        """The parameters that the rule takes out of autograd's hands."""
        ...

    def leading(self, inputs: Tensor) -> int:
        """How many of the input's axes count rows."""
        ...

    def keep(self, inputs: Tensor, output: Tensor) -> Tensor:
        """What of the input the backward pass needs."""
        ...

    def contributions(self, kept: Tensor, grads: Tensor, rows: SegmentRows) -> Contributions:
        """What the call contributes to each parameter."""
        ...


def _own(*parameters: Tensor | None) -> list[nn.Parameter]:
    return [parameter for parameter in parameters if isinstance(parameter, nn.Parameter)]


class LinearRule:
    """y = x Wᵀ + b; `transposed`: y = x W + b."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None, transposed: bool = False) -> None:
        self.weight, self.bias, self.transposed = weight, bias, transposed
        self.parameters = _own(weight, bias)

    def leading(self, inputs: Tensor) -> int:
        return inputs.ndim - 1

    def keep(self, inputs: Tensor, output: Tensor) -> Tensor:
        # Autocast multiplies in the output's type; kept so, the input takes no more memory than autocast's copy.
        return inputs.to(output.dtype)

    def contributions(self, kept: Tensor, grads: Tensor, rows: SegmentRows) -> Contributions:
        inputs_NI, grads_NO = kept.flatten(0, -2), grads.flatten(0, -2)
        factors = (inputs_NI, grads_NO) if self.transposed else (grads_NO, inputs_NI)
        found: Contributions = [(self.weight, Products(*factors, rows))]
        if self.bias is not None:
            found.append((self.bias, Sums(grads_NO, rows)))
        return found


class EmbeddingRule:
    """y = W[ids]."""

    def __init__(self, weight: nn.Parameter, padding: int | None) -> None:
        self.weight, self.padding = weight, padding
        self.parameters = [weight]

    def leading(self, inputs: Tensor) -> int:
        return inputs.ndim

    def keep(self, inputs: Tensor, output: Tensor) -> Tensor:
        return inputs

    def contributions(self, kept: Tensor, grads: Tensor, rows: SegmentRows) -> Contributions:
        return [(self.weight, Lookups(grads.flatten(0, -2), kept.flatten(), rows, self.padding))]


class NormRule:
    """y = w * n(x) + b, where n has no parameters: LayerNorm and RMSNorm, with or without a bias."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None, eps: float | None, centred: bool) -> None:
        self.weight, self.bias, self.eps, self.centred = weight, bias, eps, centred
        self.parameters = _own(weight, bias)

    def leading(self, inputs: Tensor) -> int:
        return inputs.ndim - self.weight.ndim

    def keep(self, inputs: Tensor, output: Tensor) -> Tensor:
        return inputs

    def normalised(self, inputs_NP: Tensor) -> Tensor:
        """n(x): mean 0 (LayerNorm only) and mean square 1 over the last axis, up to eps."""
        if not self.centred:
            return F.rms_norm(inputs_NP, inputs_NP.shape[-1:], eps=self.eps)
        return F.layer_norm(inputs_NP, inputs_NP.shape[-1:], eps=1e-5 if self.eps is None else self.eps)

    def contributions(self, kept: Tensor, grads: Tensor, rows: SegmentRows) -> Contributions:
        shape = (rows.rows, self.weight.numel())
        inputs_NP, grads_NP = kept.reshape(shape), grads.reshape(shape)
        found: Contributions = [(self.weight, Sums(grads_NP, rows, inputs_NP, self.normalised))]
        if self.bias is not None:
            found.append((self.bias, Sums(grads_NP, rows)))
        return found


class ConvolutionRule:
    """Filters over examples: the rows are the examples of the batch axis."""

    def __init__(self, module: nn.Conv1d | nn.Conv2d) -> None:
        self.module = module
        self.parameters = _own(module.weight, module.bias)

    def leading(self, inputs: Tensor) -> int:
        return 1 if inputs.ndim == self.module.weight.ndim else 0

    def keep(self, inputs: Tensor, output: Tensor) -> Tensor:
        return inputs.to(output.dtype)

    def contributions(self, kept: Tensor, grads: Tensor, rows: SegmentRows) -> Contributions:
        found: Contributions = [(self.parameters[0], Convolution(self.module, grads, kept, rows))]
        for bias in self.parameters[1:]:
            found.append((bias, Sums(grads.flatten(2).sum(2), rows)))
        return found


def rule_for(module: nn.Module, name: str) -> Rule | None:
    """The rule of a module that owns parameters; None leaves them to autograd.

    A rule is for exactly the type that it was written for: a subclass may compute something else.

    Raises:
        UnsupportedModule: the module's gradient is not a sum over its rows.
    """
    kind = type(module)
    if isinstance(module, nn.Embedding | nn.EmbeddingBag) and (
        module.sparse or module.scale_grad_by_freq or module.max_norm is not None
    ):
        raise UnsupportedModule(name, kind.__name__, "has sparse, scale_grad_by_freq or max_norm set")
    if isinstance(module, TiedDecoder):
        table, *_ = _own(module.table.weight)
        return LinearRule(table, module.bias)
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    if weight is None:
        return None
    if kind in (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return LinearRule(weight, bias)
    if kind is nn.Embedding and isinstance(module, nn.Embedding):
        return EmbeddingRule(weight, module.padding_idx)
    if kind is nn.LayerNorm and isinstance(module, nn.LayerNorm):
        return NormRule(weight, bias, module.eps, centred=True)
    if kind in (nn.Conv1d, nn.Conv2d) and isinstance(module, nn.Conv1d | nn.Conv2d):
        plain = module.padding_mode == "zeros" and not isinstance(module.padding, str)
        return ConvolutionRule(module) if plain else None
    return _rule_by_behaviour(module, weight, bias)


def _rule_by_behaviour(module: nn.Module, weight: nn.Parameter, bias: nn.Parameter | None) -> Rule | None:
    """The rule of a module that is known by what it computes: RMSNorm and GPT-2's Conv1D have many authors."""
    if set(module._parameters) - {"weight", "bias"} or any(True for _ in module.children()):
        return None
    name = type(module).__name__
    if name.endswith("RMSNorm") and weight.ndim == 1:
        settings = vars(module)
        rule = NormRule(weight, bias, settings.get("variance_epsilon", settings.get("eps")), centred=False)
        probe = _probe(weight, weight.shape[0])
        shift = 0 if bias is None else bias
        # Some authors store the scale's distance from 1.
        expected = [rule.normalised(probe) * scale + shift for scale in (weight, 1 + weight)]
        return rule if _computes(module, probe, expected) else None
    if name == "Conv1D" and weight.ndim == 2:
        probe = _probe(weight, weight.shape[0])
        shift = 0 if bias is None else bias
        return LinearRule(weight, bias, transposed=True) if _computes(module, probe, [probe @ weight + shift]) else None
    return None


def _probe(like: Tensor, width: int) -> Tensor:
    """A few rows that are no multiples of each other."""
    ramp = torch.linspace(-1.0, 2.0, 3 * width, device=like.device, dtype=like.dtype)
    return ramp.view(3, width) + torch.tensor([[0.5], [0.0], [-2.0]], device=like.device, dtype=like.dtype)


@torch.no_grad()
def _computes(module: nn.Module, probe: Tensor, expected: Sequence[Tensor]) -> bool:
    found = module(probe)
    return any(torch.allclose(found, value, rtol=1e-2, atol=1e-3) for value in expected)


# --- gradients.tap: The places where a pass is listened to: module calls whose rows belong to segments.


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
