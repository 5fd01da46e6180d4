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

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from aang_ray.gradients.contributions import Contribution, Convolution, Lookups, Products, Sums
from aang_ray.gradients.unsupported import UnsupportedModule
from aang_ray.model.heads import TiedDecoder
from aang_ray.model.segments import SegmentRows

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
