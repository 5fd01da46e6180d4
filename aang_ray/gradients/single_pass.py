"""The gradients of all segments from one forward and one backward pass (docs/single-pass.md has the derivation).

A row (token) i of segment s influences only the segment's loss L_s. So one backward pass of the *unweighted* sum L of
the losses gives at the output of a linear layer y_i = W x_i + b

    G_i = dL/dy_i = dL_s/dy_i,      dL_s/dW = sum over rows i of segment s of G_i x_iᵀ = G_sᵀ X_s

1. `Recorder.hooked` puts hooks on every module that owns parameters.
2. Forward pass: `_before` sets `requires_grad` of the parameters of a module with a rule to False, so autograd computes
   gradients of activations only. `_after` puts a *tap* (`regions.py`) on the module's output.
3. Backward pass: at each tap, `_add_call` receives G and the module's input X. The rule (`rules.py`) turns them into
   contributions, which are collected until the parameter's last one, because the norm of their sum is needed.
4. `settle` computes each segment's gradient from the contributions and adds it to the `Ledger`.
5. Parameters without a rule follow, with a backward pass through small regions of the graph for each segment.

Heads get only sum_s c_s g_s. Shape suffixes: S segments, B entries of a block, P entries of a parameter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.utils.hooks import RemovableHandle

from aang_ray.gradients.engine import P, Request, StepGradients, UnsupportedModule, check_memory, weighted_pass
from aang_ray.gradients.ledger import Ledger
from aang_ray.gradients.products import SegmentProducts
from aang_ray.gradients.regions import Call, Regions, Tap, is_tap, nodes_until_taps
from aang_ray.gradients.rules import Contribution, Lookups, OuterProducts, RowSums, Rule, rule_for
from aang_ray.gradients.tables import settle_lookups
from aang_ray.model.segments import PassUpdate, SegmentRows, current_segment_rows, pass_update


class SegmentEngine:
    """Computes a step's gradients by one forward and one backward pass (for each piece).

    Extra memory: three gradients of one matrix on a CPU, S of them on a GPU; more in the cases that `Ledger` lists.

    Args:
        body: The encoder; statistics are of its parameters' gradients.
        heads: All heads; they get only their update.
        tied_in_scores: Whether the decoder's part of a tied table counts in scores and norms. It is always in the
            update.

    Raises:
        UnsupportedModule: A module mixes rows, or has no exact segment gradients for another reason.
    """

    per_segment = False

    def __init__(self, body: nn.Module, heads: nn.Module, tied_in_scores: bool) -> None:
        self._body, self._heads, self._tied_in_scores = body, heads, tied_in_scores
        self._sites = [
            Site(name, module, rule_for(module, name), head)
            for root, head in ((body, False), (heads, True))
            for name, module in root.named_modules()
            if module._parameters
        ]

    def __call__(self, pieces: Sequence[P], losses: Callable[[P], Tensor], request: Request) -> StepGradients:
        if not (request.scores or request.gram or request.separate):
            return weighted_pass(pieces, losses, request)
        body = [p for p in self._body.parameters() if p.requires_grad]
        trained = frozenset((*body, *(p for p in self._heads.parameters() if p.requires_grad)))
        if request.separate or (request.gram and len(pieces) > 1):
            check_memory(body, len(request.coefficients_S))
        elif len(pieces) > 1:
            # v, a segment that continues in the next piece, the joint gradient, and the gradients to keep.
            check_memory(body, 3 + len(request.keep))
        ledger = Ledger(body, request, [piece.tokens for piece in pieces])
        update = PassUpdate(request.coefficients_S, trained - frozenset(body) if self._tied_in_scores else trained)
        recorder = Recorder(self._sites, ledger, frozenset(body), trained, self._tied_in_scores)
        total_S = torch.zeros_like(ledger.coefficients_S)
        with recorder.hooked(self._body, self._heads):
            for piece in pieces:
                recorder.begin(piece.tokens)
                with pass_update(update):
                    losses_S = losses(piece)
                if losses_S.requires_grad:
                    recorder.backward(losses_S)
                ledger.end_piece()
                total_S += losses_S.detach()
        return ledger.result(total_S)


@dataclass
class Site:
    """A module that has parameters of its own."""

    name: str
    module: nn.Module
    rule: Rule | None
    head: bool
    taken: list[list[nn.Parameter] | None] = field(default_factory=list)
    """For each running call: the parameters whose `requires_grad` was set to False; None if the call gets no tap."""


class Recorder:
    """Hooks on modules, and the data that they record in the passes of one step."""

    def __init__(
        self,
        sites: Sequence[Site],
        ledger: Ledger,
        body: frozenset[nn.Parameter],
        trained: frozenset[nn.Parameter],
        tied_in_scores: bool,
    ) -> None:
        self._sites, self._ledger, self._body, self._trained = sites, ledger, body, trained
        self._tied_in_scores = tied_in_scores
        self._anchor = torch.zeros((), device=ledger.device, requires_grad=True)
        self._tokens: SegmentRows | None = None
        self._forward = False
        """False in the backward pass, where checkpointing calls modules a second time."""
        self._cutting = False
        """Whether gradients stop at taps; true while regions are differentiated."""
        self._calls: list[Call] = []
        """The tapped calls of the forward pass."""
        self._expected: dict[nn.Parameter, int] = {}
        """Number of contributions to each parameter's scored gradient in the backward pass."""
        self._contributions: dict[nn.Parameter, list[Contribution]] = {}
        self._deferred: frozenset[nn.Parameter] = frozenset()
        """Parameters in regions, whose gradients are added to the ledger after the backward pass."""
        self._given: dict[int, Tensor] = {}
        """Arguments of modules that have submodules, by address."""
        self._cast: tuple[Tensor, int, Tensor] | None = None

    @contextmanager
    def hooked(self, *roots: nn.Module) -> Iterator[None]:
        """Install the hooks inside the block. Afterwards every trained parameter requires its gradient again."""
        handles: list[RemovableHandle] = []
        try:
            for site in self._sites:
                handles.append(site.module.register_forward_pre_hook(partial(self._before, site), with_kwargs=True))
                handles.append(site.module.register_forward_hook(partial(self._after, site), with_kwargs=True))
            for module in {module for root in roots for module in root.modules()}:
                if next(module.children(), None) is not None:
                    handles.append(module.register_forward_pre_hook(self._remember_given, with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()
            for site in self._sites:
                site.taken.clear()
            for parameter in self._trained:
                parameter.requires_grad_(True)
            self._forget()

    def begin(self, tokens: SegmentRows) -> None:
        """Prepare for the forward pass of a piece."""
        self._forget()
        self._tokens, self._forward = tokens, True

    def _forget(self) -> None:
        """Drop references to the graph. Its nodes refer to this object, and Python cannot collect such a cycle."""
        for collected in (self._calls, self._expected, self._given, self._contributions):
            collected.clear()
        self._cast = None

    # The forward pass.

    def _remember_given(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.is_grad_enabled():  # not needed in a pass without gradients
            given = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
            # After the first tap, what is computed from the batch requires a gradient. Other numbers, such as a frozen
            # table of relative positions, may only have as many rows by coincidence.
            self._given.update({t.data_ptr(): t for t in given if not (t.is_floating_point() and self._calls)})

    def _before(self, site: Site, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if isinstance(site.module, nn.modules.batchnorm._BatchNorm) and site.module.training:
            raise UnsupportedModule(site.name, type(site.module).__name__, "mixes the examples of a batch")
        taken: list[nn.Parameter] | None = None
        inputs = _first(args, kwargs)
        if torch.is_grad_enabled() and inputs is not None and self._carries_rows(site, inputs):
            taken = [] if site.rule is None else [p for p in site.rule.parameters if p in self._trained]
            for parameter in taken:
                parameter.requires_grad_(False)
        site.taken.append(taken)

    def _after(
        self, site: Site, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Tensor | None:
        taken = site.taken.pop()
        if taken is None:
            return None
        for parameter in taken:
            parameter.requires_grad_(True)
        rows = self._rows(site)
        inputs = _first(args, kwargs)
        if not isinstance(output, Tensor) or inputs is None or _leading(output.shape, rows.rows) is None:
            return None
        call = Call(
            rows=rows,
            on_gradient=partial(self._add_call, site) if taken else None,
            below=get_gradient_edge(output) if output.requires_grad else None,
            cut=lambda: self._cutting,
        )
        if self._forward:
            self._calls.append(call)
            for parameter in taken:
                if self._scored(site, parameter):
                    self._expected[parameter] = self._expected.get(parameter, 0) + 1
        kept = (self._keep(site.rule, inputs, output),) if site.rule is not None and taken else ()
        tap: Callable[..., Tensor] = Tap.apply
        return tap(call, self._anchor, output, *kept)

    def _keep(self, rule: Rule, inputs: Tensor, output: Tensor) -> Tensor:
        """Return what the rule keeps of an input. Modules that are called one after another on one input share it."""
        inputs = inputs.detach()
        if self._cast is not None:
            source, version, kept = self._cast
            unchanged = source.data_ptr() == inputs.data_ptr() and source._version == version == inputs._version
            if unchanged and kept.dtype == output.dtype and kept.shape == inputs.shape:
                return kept
        kept = rule.keep(inputs, output)
        if kept is not inputs:
            self._cast = (inputs, inputs._version, kept)
        return kept

    def _rows(self, site: Site) -> SegmentRows:
        rows = current_segment_rows() if site.head else self._tokens
        if rows is None:
            raise UnsupportedModule(site.name, type(site.module).__name__, "was called outside `segment_rows`")
        return rows

    def _carries_rows(self, site: Site, inputs: Tensor) -> bool:
        """Return whether the input has one entry for every row of the batch, other than by coincidence.

        A table of relative positions may have as many entries. So a computed input must depend on another tapped call;
        any other must have been an argument of a module with submodules, or be a matrix of ids that is not square.
        """
        rows = self._rows(site).rows
        leading = _leading(inputs.shape, rows) if site.rule is None else site.rule.leading(inputs)
        if leading is None or math.prod(inputs.shape[:leading]) != rows:
            return False
        if inputs.grad_fn is not None:
            return any(is_tap(node) for node in nodes_until_taps(inputs.grad_fn))
        if inputs.requires_grad:
            return inputs not in self._trained
        ids = not inputs.is_floating_point() and inputs.ndim == 2 and inputs.shape[0] != inputs.shape[1]
        return ids or inputs.data_ptr() in self._given

    # The backward pass.

    def backward(self, losses_S: Tensor) -> None:
        """Run the backward pass of the unweighted losses, and add the piece's gradients to the ledger."""
        regions = Regions(self._calls, losses_S, self._trained)
        self._forward = False
        self._deferred = frozenset(regions.parameters)
        self._cast = None
        retain_graph = bool(regions.parameters)
        torch.autograd.grad(losses_S.sum(), [self._anchor], retain_graph=retain_graph, allow_unused=True)
        # If not all uses of a parameter influence the losses, its contributions are complete only now.
        for parameter in [p for p in self._contributions if p not in self._deferred]:
            settle(self._ledger, parameter, self._contributions.pop(parameter))
        if regions.parameters:
            self._cutting = True
            try:
                self._settle_regions(regions)
            finally:
                self._cutting = False

    def _add_call(self, site: Site, call: Call, grads: Tensor, kept: Tensor) -> None:
        """Handle the backward pass at a tap: `grads` is G at the module's output, `kept` its input."""
        assert site.rule is not None
        node = None if call.below is None else call.below.node
        for parameter, contribution in site.rule.contributions(kept, grads, call.rows, node):
            if parameter not in self._trained:
                continue
            if self._scored(site, parameter):
                found = self._contributions.setdefault(parameter, [])
                found.append(contribution)
                if len(found) == self._expected[parameter] and parameter not in self._deferred:
                    settle(self._ledger, parameter, self._contributions.pop(parameter))
            else:
                contribution.add_total(self._ledger.coefficients_S, self._ledger.update(parameter))

    def _scored(self, site: Site, parameter: nn.Parameter) -> bool:
        """Return whether the site's part of the parameter's gradient counts in scores and norms."""
        return parameter in self._body and (not site.head or self._tied_in_scores)

    def _settle_regions(self, regions: Regions) -> None:
        """Add the deferred parameters' gradients to the ledger: contributions, and what autograd gives per segment."""
        ledger = self._ledger
        of_body = [p for p in regions.parameters if p in self._body]
        of_heads = [p for p in regions.parameters if p not in self._body]
        if of_body:

            def gradients_of(segment: int) -> list[Tensor]:
                found = regions.segment(of_body, segment)
                return [
                    ledger.zeros(*p.shape) if g is None else g.to(ledger.dtype, copy=True).contiguous()
                    for p, g in zip(of_body, found, strict=True)
                ]

            contributions, self._contributions = self._contributions, {}
            settle_dense(ledger, of_body, gradients_of, contributions)
        if of_heads:
            for parameter, gradient in zip(of_heads, regions.weighted(of_heads, ledger.coefficients_S), strict=True):
                if gradient is not None:
                    ledger.update(parameter).add_(gradient)


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Return a module's first argument if it is a tensor, else None."""
    value = args[0] if args else next(iter(kwargs.values()), None)
    return value if isinstance(value, Tensor) else None


def _leading(shape: torch.Size, rows: int) -> int | None:
    """Return the number of leading axes whose sizes multiply to `rows`; None if there is none."""
    product = 1
    for axes, size in enumerate(shape, start=1):
        product *= size
        if product == rows:
            return axes
    return None


BLOCK = 160_000
"""Maximum entries of a block, so that its parts of a gradient, of v and of the update fit into a core's cache."""


def settle(ledger: Ledger, parameter: nn.Parameter, contributions: Sequence[Contribution]) -> None:
    """Add all contributions of one pass to a parameter's gradient to the ledger, summed for each segment."""
    sums = [c for c in contributions if isinstance(c, RowSums)]
    products = [c for c in contributions if isinstance(c, OuterProducts)]
    lookups = [c for c in contributions if isinstance(c, Lookups)]
    if len(sums) == len(contributions):
        gradients_SP = sums[0].stacked(ledger.dtype, ledger.members)
        for other in sums[1:]:
            gradients_SP += other.stacked(ledger.dtype, ledger.members)
        ledger.add_stacked(parameter, gradients_SP)
    elif len(products) == len(contributions):
        _settle_products(ledger, parameter, products)
    elif len(lookups) == len(contributions):
        settle_lookups(ledger, parameter, lookups)
    else:
        settle_dense(ledger, [parameter], lambda _: [ledger.zeros(*parameter.shape)], {parameter: contributions})


def _settle_products(ledger: Ledger, parameter: nn.Parameter, products: Sequence[OuterProducts]) -> None:
    """Add G_sᵀ X_s, summed over the parameter's uses, to the ledger for one segment after the other."""
    factors = [SegmentProducts(c.grads_NO, c.inputs_NI, c.rows, ledger.copies) for c in products]
    if ledger.takes_stacked:
        gradients_SP = ledger.zeros(ledger.segments, *parameter.shape)
        for segment in ledger.present():
            for factor in factors:
                gradients_SP[segment] += factor.product(segment)
        ledger.add_stacked(parameter, gradients_SP.flatten(1))
        return
    entries = parameter.numel()
    size = -(-entries // -(-entries // BLOCK))
    starts = range(0, entries, size)
    blocks = [ledger.block(parameter, start, min(start + size, entries)) for start in starts]
    scratch_B = ledger.zeros(size)
    for segment in ledger.present():
        gradients = [factor.product(segment).view(-1) for factor in factors]
        for start, block in zip(starts, blocks, strict=True):
            parts = [gradient[start : start + size] for gradient in gradients]
            # A single product that already has the statistics' type is not copied.
            gradient_B = parts[0]
            if len(parts) > 1 or gradient_B.dtype != ledger.dtype:
                gradient_B = scratch_B[: len(gradient_B)].copy_(gradient_B)
                for other in parts[1:]:
                    gradient_B += other
            block.add(segment, gradient_B)
    for block in blocks:
        block.finish()


def settle_dense(
    ledger: Ledger,
    parameters: Sequence[nn.Parameter],
    gradients_of: Callable[[int], Sequence[Tensor]],
    contributions: Mapping[nn.Parameter, Sequence[Contribution]],
) -> None:
    """Add parameters' gradients to the ledger as dense tensors, one segment after the other.

    `gradients_of` returns a segment's gradients in new tensors, to which the contributions are added.
    """
    stacked = [ledger.zeros(ledger.segments, p.numel()) for p in parameters] if ledger.takes_stacked else []
    blocks = [] if ledger.takes_stacked else [ledger.block(p, 0, p.numel()) for p in parameters]
    for segment in ledger.present():
        for index, (parameter, gradient) in enumerate(zip(parameters, gradients_of(segment), strict=True)):
            for contribution in contributions.get(parameter, ()):
                contribution.add_to(segment, gradient)
            ledger.add_joint_table(parameter, segment, gradient)
            if ledger.takes_stacked:
                stacked[index][segment] = gradient.view(-1)
            else:
                blocks[index].add(segment, gradient.view(-1))
    for block in blocks:
        block.finish()
    for parameter, gradients_SP in zip(parameters, stacked, strict=False):
        ledger.add_stacked(parameter, gradients_SP)
