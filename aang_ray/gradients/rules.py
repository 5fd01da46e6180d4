"""Rules that compute each segment's gradient of a module's parameters; there is one rule for each module type.

A rule keeps the module's inputs X in the forward pass and receives the gradient G with respect to the module's output
in the backward pass. A segment's gradient is a sum over its own rows of X and G (docs/single-pass.md):

| module | gradient of segment s |
|---|---|
| Linear, y = x Wᵀ + b | weight G_sᵀ X_s; bias sum of G_s |
| decoder, losses of labels | the same, with G = u (p - e) made again in blocks; the update is in the graph's node |
| Conv1D of GPT-2, y = x W + b | weight X_sᵀ G_s; bias sum of G_s |
| Embedding, y = W[id] | row v: sum of G over the segment's rows with id v |
| LayerNorm, RMSNorm, y = w * n(x) + b | weight sum of G * n(X); bias sum of G |
| Conv1d, Conv2d | correlation of X and G over the segment's examples |

Shape suffixes: N rows, S segments, I inputs, O outputs, H width of a table, P entries of a parameter. Rows of a segment
are contiguous, so its part of a tensor is a slice and never a copy.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.nn import functional as F
from torch.nn.grad import conv1d_weight, conv2d_weight

from aang_ray.gradients.engine import UnsupportedModule
from aang_ray.model.heads import OwnDecoder, TiedDecoder
from aang_ray.model.segments import SegmentRows, per_row
from aang_ray.model.vocabulary_loss import Saved, decoder_sums, saved_by


class Contribution(ABC):
    """The contribution of one call of a module to every segment's gradient of one parameter."""

    rows: SegmentRows

    @abstractmethod
    def add_to(self, segment: int, out: Tensor) -> None:
        """Add the segment's gradient to a tensor of the parameter's shape."""

    @abstractmethod
    def add_total(self, coefficients_S: Tensor, out: Tensor) -> None:
        """Add sum_s c_s g_s to a tensor of the parameter's shape."""


Contributions = list[tuple[nn.Parameter, Contribution]]


@dataclass
class OuterProducts(Contribution):
    """Contribution to a matrix that maps rows: G_sᵀ X_s, [O, I]."""

    grads_NO: Tensor
    inputs_NI: Tensor
    rows: SegmentRows

    def add_to(self, segment: int, out: Tensor) -> None:
        part = self.rows.of(segment)
        out += self.grads_NO[part].t() @ self.inputs_NI[part]

    def add_total(self, coefficients_S: Tensor, out: Tensor) -> None:
        weights_N = per_row(coefficients_S, self.rows).to(self.inputs_NI.dtype)
        out += self.grads_NO.t() @ (self.inputs_NI * weights_N[:, None])


@dataclass
class RowSums(Contribution):
    """The sum of G, or of G * scaled(X), over the segment's rows: contribution to a bias, or to a scale."""

    grads_NP: Tensor
    rows: SegmentRows
    inputs_NP: Tensor | None = None
    scaled: Callable[[Tensor], Tensor] | None = None

    def stacked(self, dtype: torch.dtype, members: Callable[[SegmentRows, Tensor], Tensor] | None = None) -> Tensor:
        """Return all segments' gradients, [S, P].

        With `members`, which returns the 0/1 matrix [S, N] of rows and segments, half-precision rows are summed by a
        matrix product: read once, accumulated in fp32 and rounded once.
        """
        if members is not None and self.inputs_NP is None and self.grads_NP.dtype in (torch.bfloat16, torch.float16):
            return (members(self.rows, self.grads_NP) @ self.grads_NP).to(dtype)
        sums_SP = self.grads_NP.new_zeros(self.rows.count, self.grads_NP.shape[1], dtype=dtype)
        for segment in range(self.rows.count):
            part = self.rows.of(segment)
            if part.stop > part.start:
                torch.sum(self._terms(part, dtype), dim=0, dtype=dtype, out=sums_SP[segment])
        return sums_SP

    def _terms(self, part: slice, dtype: torch.dtype) -> Tensor:
        grads_NP = self.grads_NP[part]
        if self.inputs_NP is None or self.scaled is None:
            return grads_NP
        return self.scaled(self.inputs_NP[part].to(dtype)).mul_(grads_NP)

    def add_to(self, segment: int, out: Tensor) -> None:
        out += self._terms(self.rows.of(segment), out.dtype).sum(0, dtype=out.dtype).view(out.shape)

    def add_total(self, coefficients_S: Tensor, out: Tensor) -> None:
        out += (coefficients_S @ self.stacked(coefficients_S.dtype)).view(out.shape)


class Lookups(Contribution):
    """Contribution to a table that is looked up by ids: row v is the sum of G over the segment's rows with id v."""

    def __init__(self, grads_NH: Tensor, ids_N: Tensor, rows: SegmentRows, padding: int | None) -> None:
        self.rows = rows
        self.ids_N = ids_N
        # nn.Embedding does not train the entry of the padding id.
        self.grads_NH = grads_NH if padding is None else grads_NH * (ids_N != padding)[:, None]

    def add_to(self, segment: int, out: Tensor) -> None:
        part = self.rows.of(segment)
        out.index_add_(0, self.ids_N[part], self.grads_NH[part].to(out.dtype))

    def add_total(self, coefficients_S: Tensor, out: Tensor) -> None:
        weights_N = per_row(coefficients_S, self.rows).to(out.dtype)
        out.index_add_(0, self.ids_N, self.grads_NH.to(out.dtype) * weights_N[:, None])


@dataclass
class Correlation(Contribution):
    """Contribution to filters: the correlation of the segment's inputs with its rows of G. A row is an example."""

    module: nn.Conv1d | nn.Conv2d
    grads: Tensor
    inputs: Tensor
    rows: SegmentRows

    def add_to(self, segment: int, out: Tensor) -> None:
        part, module = self.rows.of(segment), self.module
        weight_grad: Callable[..., Tensor] = conv1d_weight if isinstance(module, nn.Conv1d) else conv2d_weight
        settings = (module.stride, module.padding, module.dilation, module.groups)
        out += weight_grad(self.inputs[part], module.weight.shape, self.grads[part], *settings)

    def add_total(self, coefficients_S: Tensor, out: Tensor) -> None:
        for segment in range(self.rows.count):
            gradient = torch.zeros_like(out)
            self.add_to(segment, gradient)
            out += coefficients_S[segment] * gradient


@dataclass
class DecoderSums(Contribution):
    """Contribution of a decoder's losses to its matrix or its bias: sums of u (p - e) over the segment's rows."""

    saved: Saved
    scale_N: Tensor
    """u, the gradient with respect to the losses."""
    total: Tensor | None
    """The update, after a forward pass that knew the coefficients (`PassUpdate`)."""
    rows: SegmentRows
    of_weight: bool

    def _sum(self, part: slice, scale_N: Tensor) -> Tensor:
        saved = self.saved
        of_weight, of_bias = decoder_sums(
            saved.x_MW[part],
            saved.weight_VW,
            saved.bias_V,
            saved.label_M[part],
            scale_N[part],
            of_weight=self.of_weight,
        )
        return of_bias if of_weight is None else of_weight

    def add_to(self, segment: int, out: Tensor) -> None:
        part = self.rows.of(segment)
        if part.stop > part.start:
            out += self._sum(part, self.scale_N)

    def add_total(self, coefficients_S: Tensor, out: Tensor) -> None:
        if self.total is not None:
            out += self.total
            return
        out += self._sum(slice(None), self.scale_N * per_row(coefficients_S, self.rows).to(self.scale_N.dtype))


class Rule(ABC):
    """Computes the contributions of one module from its inputs and gradients."""

    parameters: Sequence[nn.Parameter]
    """The module's parameters whose gradients the rule computes, in place of autograd."""

    def leading(self, inputs: Tensor) -> int:
        """Return the number of leading axes of the input that index rows."""
        return inputs.ndim - 1

    def keep(self, inputs: Tensor, output: Tensor) -> Tensor:
        """Return the tensor, made from the input, that the backward pass needs."""
        return inputs

    @abstractmethod
    def contributions(self, kept: Tensor, grads: Tensor, rows: SegmentRows, node: Node | None) -> Contributions:
        """Return the contribution of a call to each parameter, from what `keep` returned and G.

        `node` is the node of the module's output in the graph.
        """


def _parameters(*tensors: Tensor | None) -> list[nn.Parameter]:
    return [tensor for tensor in tensors if isinstance(tensor, nn.Parameter)]


class LinearRule(Rule):
    """Rule for y = x Wᵀ + b, or with `transposed` for y = x W + b."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None, transposed: bool = False) -> None:
        self.weight, self.bias, self.transposed = weight, bias, transposed
        self.parameters = _parameters(weight, bias)

    def keep(self, inputs: Tensor, output: Tensor) -> Tensor:
        # Autocast multiplies in the output's type. In that type the input takes no more memory than autocast's copy.
        return inputs.to(output.dtype)

    def contributions(self, kept: Tensor, grads: Tensor, rows: SegmentRows, node: Node | None) -> Contributions:
        inputs_NI, grads_NO = kept.flatten(0, -2), grads.flatten(0, -2)
        factors = (inputs_NI, grads_NO) if self.transposed else (grads_NO, inputs_NI)
        found: Contributions = [(self.weight, OuterProducts(*factors, rows))]
        if self.bias is not None:
            found.append((self.bias, RowSums(grads_NO, rows)))
        return found


class DecoderRule(LinearRule):
    """Rule for a vocabulary decoder, which returns logits, or losses without them."""

    def keep(self, inputs: Tensor, output: Tensor) -> Tensor:
        # For losses the node holds what is needed.
        return inputs if output.ndim < inputs.ndim else super().keep(inputs, output)

    def contributions(self, kept: Tensor, grads: Tensor, rows: SegmentRows, node: Node | None) -> Contributions:
        # Read now: the graph drops it as soon as its pass has gone through the node.
        saved = saved_by(node)
        if saved is None:
            return super().contributions(kept, grads, rows, node)
        assert self.bias is not None
        return [
            (self.weight, DecoderSums(saved, grads, saved.weight_sum_VW, rows, of_weight=True)),
            (self.bias, DecoderSums(saved, grads, saved.bias_sum_V, rows, of_weight=False)),
        ]


class EmbeddingRule(Rule):
    """Rule for y = W[ids]."""

    def __init__(self, weight: nn.Parameter, padding: int | None) -> None:
        self.weight, self.padding = weight, padding
        self.parameters = [weight]

    def leading(self, inputs: Tensor) -> int:
        return inputs.ndim

    def contributions(self, kept: Tensor, grads: Tensor, rows: SegmentRows, node: Node | None) -> Contributions:
        return [(self.weight, Lookups(grads.flatten(0, -2), kept.flatten(), rows, self.padding))]


class NormRule(Rule):
    """Rule for y = w * n(x) + b with n without parameters: LayerNorm (`centred`) and RMSNorm, bias optional."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None, eps: float | None, centred: bool) -> None:
        self.weight, self.bias, self.eps, self.centred = weight, bias, eps, centred
        self.parameters = _parameters(weight, bias)

    def leading(self, inputs: Tensor) -> int:
        return inputs.ndim - self.weight.ndim

    def normalised(self, inputs_NP: Tensor) -> Tensor:
        """Return n(x), which has mean square 1 over the last axis (up to eps) and, for LayerNorm, mean 0."""
        if not self.centred:
            return F.rms_norm(inputs_NP, inputs_NP.shape[-1:], eps=self.eps)
        return F.layer_norm(inputs_NP, inputs_NP.shape[-1:], eps=1e-5 if self.eps is None else self.eps)

    def contributions(self, kept: Tensor, grads: Tensor, rows: SegmentRows, node: Node | None) -> Contributions:
        shape = (rows.rows, self.weight.numel())
        inputs_NP, grads_NP = kept.reshape(shape), grads.reshape(shape)
        found: Contributions = [(self.weight, RowSums(grads_NP, rows, inputs_NP, self.normalised))]
        if self.bias is not None:
            found.append((self.bias, RowSums(grads_NP, rows)))
        return found


class ConvolutionRule(Rule):
    """Rule for convolutions; the rows are the examples of the batch axis."""

    def __init__(self, module: nn.Conv1d | nn.Conv2d) -> None:
        self.module = module
        self.parameters = _parameters(module.weight, module.bias)

    def leading(self, inputs: Tensor) -> int:
        return 1 if inputs.ndim == self.module.weight.ndim else 0

    def keep(self, inputs: Tensor, output: Tensor) -> Tensor:
        return inputs.to(output.dtype)

    def contributions(self, kept: Tensor, grads: Tensor, rows: SegmentRows, node: Node | None) -> Contributions:
        found: Contributions = [(self.parameters[0], Correlation(self.module, grads, kept, rows))]
        for bias in self.parameters[1:]:
            found.append((bias, RowSums(grads.flatten(2).sum(2), rows)))
        return found


def rule_for(module: nn.Module, name: str) -> Rule | None:
    """Return the rule of a module with parameters; None if autograd must handle them.

    A rule applies only to the exact type for which it was written, because a subclass may compute something else.

    Raises:
        UnsupportedModule: The module's gradient is not a sum over its rows; `name` is in the message.
    """
    kind = type(module)
    if isinstance(module, nn.Embedding | nn.EmbeddingBag) and (
        module.sparse or module.scale_grad_by_freq or module.max_norm is not None
    ):
        raise UnsupportedModule(name, kind.__name__, "has sparse, scale_grad_by_freq or max_norm set")
    if isinstance(module, TiedDecoder):
        table, *_ = _parameters(module.table.weight)
        return DecoderRule(table, module.bias)
    if kind is OwnDecoder and isinstance(module, OwnDecoder):
        return DecoderRule(module.weight, module.bias)
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
    """Return the rule of an RMSNorm or of GPT-2's Conv1D, which many libraries define themselves; else None.

    The name of the type suggests the rule. It is used only if it reproduces the module's output for a few rows.
    """
    if set(module._parameters) - {"weight", "bias"} or any(True for _ in module.children()):
        return None
    name, shift = type(module).__name__, 0 if bias is None else bias
    if name.endswith("RMSNorm") and weight.ndim == 1:
        settings = vars(module)
        rule = NormRule(weight, bias, settings.get("variance_epsilon", settings.get("eps")), centred=False)
        probe = _probe(weight)
        # Some libraries store the scale minus 1.
        expected = [rule.normalised(probe) * scale + shift for scale in (weight, 1 + weight)]
        return rule if _computes(module, probe, expected) else None
    if name == "Conv1D" and weight.ndim == 2:
        probe = _probe(weight)
        return LinearRule(weight, bias, transposed=True) if _computes(module, probe, [probe @ weight + shift]) else None
    return None


def _probe(weight: Tensor) -> Tensor:
    """Return three rows that are not multiples of each other, of the length of the weight's first axis."""
    width = weight.shape[0]
    ramp = torch.linspace(-1.0, 2.0, 3 * width, device=weight.device, dtype=weight.dtype)
    return ramp.view(3, width) + torch.tensor([[0.5], [0.0], [-2.0]], device=weight.device, dtype=weight.dtype)


@torch.no_grad()
def _computes(module: nn.Module, probe: Tensor, expected: Sequence[Tensor]) -> bool:
    found = module(probe)
    return any(torch.allclose(found, value, rtol=1e-2, atol=1e-3) for value in expected)
