"""The gradients of all segments for the price of their sum."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.utils.hooks import RemovableHandle

from aang_ray.gradients.engine import (
    OnComplete,
    P,
    Request,
    StepGradients,
    UnsupportedModule,
    check_memory,
    weighted_pass,
)
from aang_ray.gradients.ledger import Ledger
from aang_ray.gradients.products import SegmentProducts
from aang_ray.gradients.regions import Regions
from aang_ray.gradients.rules import (
    Call,
    Contribution,
    Lookups,
    Products,
    Rule,
    Sums,
    Tap,
    is_tap,
    nodes_until_taps,
    rule_for,
)
from aang_ray.gradients.tables import settle_lookups
from aang_ray.model.segments import SegmentRows, current_segment_rows

# --- gradients.settle: Hands the contributions to one parameter over to the ledger: added per segment first, then scored.
#
# Shape suffixes: S segments, B entries of a block, P entries of the parameter.


BLOCK = 160_000
"""Most entries of a block: what is read and written of a gradient, v and the update stays in a core's cache."""


def settle(ledger: Ledger, parameter: nn.Parameter, contributions: Sequence[Contribution]) -> None:
    """Add all that one pass contributes to a parameter; segments' norms are norms of the sums."""
    sums = [c for c in contributions if isinstance(c, Sums)]
    products = [c for c in contributions if isinstance(c, Products)]
    lookups = [c for c in contributions if isinstance(c, Lookups)]
    if len(sums) == len(contributions):
        columns_SP = sums[0].columns(ledger.dtype, ledger.members)
        for other in sums[1:]:
            columns_SP += other.columns(ledger.dtype, ledger.members)
        ledger.add_columns(parameter, 0, columns_SP)
    elif len(products) == len(contributions):
        _settle_products(ledger, parameter, products)
    elif len(lookups) == len(contributions):
        settle_lookups(ledger, parameter, lookups)
    else:
        settle_dense(ledger, [parameter], lambda _: [ledger.zeros(*parameter.shape)], {parameter: contributions})


def _settle_products(ledger: Ledger, parameter: nn.Parameter, products: Sequence[Products]) -> None:
    """P_s = sum over calls of G_sᵀ X_s, for one segment after the other, dropped as soon as it is scored."""
    factors = [SegmentProducts(c.grads_NO, c.inputs_NI, c.rows, ledger.padded) for c in products]
    if ledger.by_columns:
        columns_SP = ledger.zeros(ledger.segments, *parameter.shape)
        for segment in ledger.present():
            for factor in factors:
                columns_SP[segment] += factor.product(segment)
        ledger.add_columns(parameter, 0, columns_SP.flatten(1))
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
            # One call's product in the statistics' own type is used as it is.
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
    """The general way: each segment's whole gradient of a few parameters, one segment after the other.

    `gradients_of(s)` gives one fresh tensor for each parameter, to which its contributions are added.
    """
    columns = [ledger.zeros(ledger.segments, p.numel()) for p in parameters] if ledger.by_columns else []
    blocks = [] if ledger.by_columns else [ledger.block(p, 0, p.numel()) for p in parameters]
    for segment in ledger.present():
        for index, (parameter, gradient) in enumerate(zip(parameters, gradients_of(segment), strict=True)):
            for contribution in contributions.get(parameter, ()):
                contribution.add_to(segment, gradient)
            ledger.add_joint_table(parameter, segment, gradient)
            if ledger.by_columns:
                columns[index][segment] = gradient.view(-1)
            else:
                blocks[index].add(segment, gradient.view(-1))
    for block in blocks:
        block.finish()
    for parameter, columns_SP in zip(parameters, columns, strict=False):
        ledger.add_columns(parameter, 0, columns_SP)


# --- gradients.recorder: Hooks on modules that make one forward and one backward pass yield every segment's gradient.


@dataclass(frozen=True)
class Parameters:
    """What is trained."""

    body: tuple[nn.Parameter, ...]
    all: frozenset[nn.Parameter]
    """Body and heads."""

    @classmethod
    def of(cls, body: nn.Module, heads: nn.Module) -> Self:
        """The parameters that require a gradient."""
        of_body = tuple(p for p in body.parameters() if p.requires_grad)
        return cls(of_body, frozenset((*of_body, *(p for p in heads.parameters() if p.requires_grad))))


@dataclass
class Site:
    """A module that owns parameters."""

    name: str
    module: nn.Module
    rule: Rule | None
    head: bool
    taken: list[list[nn.Parameter] | None] = field(default_factory=list)
    """For each call that is running: the parameters out of autograd's hands; None if it is not tapped."""


def find_sites(body: nn.Module, heads: nn.Module) -> list[Site]:
    """Every module of body and heads that owns parameters, with its rule.

    Raises:
        UnsupportedModule: for a module whose gradient is not a sum over its rows.
    """
    return [
        Site(name, module, rule_for(module, name), head)
        for root, head in ((body, False), (heads, True))
        for name, module in root.named_modules()
        if module._parameters
    ]


class Recorder:
    """Listens to one step's passes.

    Parameters that a rule knows take no part in autograd during the module's call; activations do. A
    parameter's contributions are counted in the forward pass and settled when the last one has arrived in
    the backward pass, so that a parameter used twice is scored once.
    """

    def __init__(self, sites: Iterable[Site], ledger: Ledger, parameters: Parameters, tied_in_scores: bool) -> None:
        self.ledger = ledger
        self._cutting = False
        self.calls: list[Call] = []
        self._sites = list(sites)
        self._parameters = parameters
        self._of_body = frozenset(parameters.body)
        self._tied_in_scores = tied_in_scores
        self._tokens: SegmentRows | None = None
        self._expected: dict[nn.Parameter, int] = {}
        self._open: dict[nn.Parameter, int] = {}
        self._on_complete: OnComplete | None = None
        self._arrived: dict[nn.Parameter, list[Contribution]] = {}
        self._deferred: frozenset[nn.Parameter] = frozenset()
        self._forward = False
        self._given: dict[int, Tensor] = {}
        self._cast: tuple[Tensor, int, Tensor] | None = None
        self._anchor = torch.zeros((), device=ledger.device, requires_grad=True)

    @contextmanager
    def hooked(self, *roots: nn.Module) -> Iterator[None]:
        """Hooks in place; afterwards they are gone and every parameter requires its gradient again."""
        handles: list[RemovableHandle] = []
        try:
            for site in self._sites:
                handles.append(site.module.register_forward_pre_hook(partial(self._before, site), with_kwargs=True))
                handles.append(site.module.register_forward_hook(partial(self._after, site), with_kwargs=True))
            for module in {module for root in roots for module in root.modules()}:
                if next(module.children(), None) is not None:
                    handles.append(module.register_forward_pre_hook(self._give, with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()
            for site in self._sites:
                site.taken.clear()
            for parameter in self._parameters.all:
                parameter.requires_grad_(True)
            self._forget()

    def _forget(self) -> None:
        """Let go of the graph. Its nodes hold calls that lead back here: a circle that only C++ could see."""
        self.calls.clear()
        self._expected.clear()
        self._open.clear()
        self._given.clear()
        self._arrived.clear()
        self._cast = None

    def begin(self, tokens: SegmentRows, on_complete: OnComplete | None = None) -> None:
        """A piece's forward pass begins; `on_complete` is told of the body's parameters that its backward pass completes."""
        self._forget()
        self._tokens, self._forward, self._on_complete = tokens, True, on_complete

    def backward(self, losses_S: Tensor, deferred: Iterable[nn.Parameter], retain_graph: bool) -> None:
        """The backward pass of the unweighted losses; all but the deferred parameters are settled."""
        self._forward = False
        self._deferred = frozenset(deferred)
        self._cast = None
        torch.autograd.grad(losses_S.sum(), [self._anchor], retain_graph=retain_graph, allow_unused=True)
        for parameter in [p for p in self._arrived if p not in self._deferred]:
            settle(self.ledger, parameter, self._arrived.pop(parameter))

    @contextmanager
    def gradients_cut(self) -> Iterator[None]:
        """Gradients do not pass through taps, and nothing arrives there."""
        self._cutting = True
        try:
            yield
        finally:
            self._cutting = False

    def take_deferred(self) -> Mapping[nn.Parameter, list[Contribution]]:
        """What arrived for the deferred parameters."""
        arrived, self._arrived = self._arrived, {}
        return arrived

    def _give(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not torch.is_grad_enabled():  # a pass that no gradient comes from: nothing of it is kept
            return
        self._given.update({t.data_ptr(): t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)})

    def _before(self, site: Site, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if isinstance(site.module, nn.modules.batchnorm._BatchNorm) and site.module.training:
            raise UnsupportedModule(site.name, type(site.module).__name__, "mixes the examples of a batch")
        taken: list[nn.Parameter] | None = None
        inputs = _first(args, kwargs)
        if torch.is_grad_enabled() and inputs is not None and self._carries_rows(site, inputs):
            taken = [] if site.rule is None else [p for p in site.rule.parameters if p in self._parameters.all]
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
            arrive=partial(self._arrive, site) if taken else None,
            below=get_gradient_edge(output) if output.requires_grad else None,
            cut=lambda: self._cutting,
        )
        if self._forward:
            self.calls.append(call)
            for parameter in taken:
                self._open[parameter] = self._open.get(parameter, 0) + 1
                if self._scored(site, parameter):
                    self._expected[parameter] = self._expected.get(parameter, 0) + 1
        kept = (self._keep(site.rule, inputs, output),) if site.rule is not None and taken else ()
        tap: Callable[..., Tensor] = Tap.apply
        return tap(call, self._anchor, output, *kept)

    def _keep(self, rule: Rule, inputs: Tensor, output: Tensor) -> Tensor:
        """What the rule keeps of an input; several calls in a row on one input share it."""
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

    def _scored(self, site: Site, parameter: nn.Parameter) -> bool:
        """Whether the site's part of the parameter's gradient counts in scores and norms."""
        return parameter in self._of_body and (not site.head or self._tied_in_scores)

    def _arrive(self, site: Site, call: Call, grads: Tensor, kept: Tensor) -> None:
        assert site.rule is not None
        for parameter, contribution in site.rule.contributions(kept, grads, call.rows):
            if parameter not in self._parameters.all:
                continue
            self._open[parameter] -= 1
            if self._scored(site, parameter):
                arrived = self._arrived.setdefault(parameter, [])
                arrived.append(contribution)
                if len(arrived) == self._expected[parameter] and parameter not in self._deferred:
                    settle(self.ledger, parameter, self._arrived.pop(parameter))
            else:
                contribution.add_total(self.ledger.coefficients_S, self.ledger.update(parameter))
            self._settled(parameter)

    def _settled(self, parameter: nn.Parameter) -> None:
        """Tell whoever listens if nothing more can come for a parameter of the body."""
        waits = self._open[parameter] > 0 or parameter in self._arrived or parameter in self._deferred
        if self._on_complete is not None and parameter in self._of_body and not waits:
            self._on_complete(parameter)

    def _rows(self, site: Site) -> SegmentRows:
        rows = current_segment_rows() if site.head else self._tokens
        if rows is None:
            raise UnsupportedModule(site.name, type(site.module).__name__, "was called outside `segment_rows`")
        return rows

    def _carries_rows(self, site: Site, inputs: Tensor) -> bool:
        """Whether the input has one entry for every row, and not by coincidence.

        A table of relative positions may be as long as the batch has tokens. So a computed input must come
        from another such call, and a plain one must be given to a module that contains this one, or be
        a matrix of ids that is not square (relative positions are).
        """
        rows = self._rows(site).rows
        leading = _leading(inputs.shape, rows) if site.rule is None else site.rule.leading(inputs)
        if leading is None or math.prod(inputs.shape[:leading]) != rows:
            return False
        if inputs.grad_fn is not None:
            return any(is_tap(node) for node in nodes_until_taps(inputs.grad_fn))
        if inputs.requires_grad:
            return inputs not in self._parameters.all
        ids = not inputs.is_floating_point() and inputs.ndim == 2 and inputs.shape[0] != inputs.shape[1]
        return ids or inputs.data_ptr() in self._given


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    value = args[0] if args else next(iter(kwargs.values()), None)
    return value if isinstance(value, Tensor) else None


def _leading(shape: torch.Size, rows: int) -> int | None:
    """How many leading axes have `rows` entries together."""
    product = 1
    for axes, size in enumerate(shape, start=1):
        product *= size
        if product == rows:
            return axes
    return None


class SegmentEngine:
    """One forward and one backward pass of the unweighted losses of all segments (semantics section 3).

    The gradient of a linear layer's weight is Gᵀ X, a sum over tokens, and segments are ranges of tokens:
    G_sᵀ X_s for every s costs the multiplications of the sum. Each is multiplied by c_s into the update,
    by v and by itself into the statistics, and dropped. Not weighting the losses keeps norms exact where
    a weight underflows. Heads get their weighted sum only. `tied_in_scores` counts the decoder's part of
    a tied table in scores and norms as well as in the update.

    Memory beyond a plain step: gradients of one matrix, for v, the joint gradient and the segment at hand; see
    `Ledger` for several pieces, the Gram matrix and separate gradients.

    Raises:
        UnsupportedModule: a module mixes rows, or otherwise has no exact segment gradients.
    """

    per_segment = False

    def __init__(self, body: nn.Module, heads: nn.Module, tied_in_scores: bool) -> None:
        self._body, self._heads, self._tied_in_scores = body, heads, tied_in_scores
        self._sites = find_sites(body, heads)

    def __call__(
        self,
        pieces: Sequence[P],
        losses: Callable[[P], Tensor],
        request: Request,
        on_complete: OnComplete | None = None,
    ) -> StepGradients:
        if not (request.scores or request.gram or request.separate):
            return weighted_pass(pieces, losses, request, self._body, on_complete)
        parameters = Parameters.of(self._body, self._heads)
        cuts = [piece.tokens for piece in pieces]
        if request.separate or (request.gram and len(pieces) > 1):
            check_memory(parameters.body, len(request.coefficients_S))
        elif len(pieces) > 1:
            # v, a segment that goes on in the next piece, the joint gradient, and what is to be kept.
            check_memory(parameters.body, 3 + len(request.keep))
        ledger = Ledger(parameters.body, request, cuts)
        recorder = Recorder(self._sites, ledger, parameters, self._tied_in_scores)
        total_S = torch.zeros_like(ledger.coefficients_S)
        with recorder.hooked(self._body, self._heads):
            for number, piece in enumerate(pieces, start=1):
                recorder.begin(piece.tokens, on_complete if number == len(pieces) else None)
                losses_S = losses(piece)
                if losses_S.requires_grad:
                    _backward(recorder, ledger, parameters, losses_S)
                ledger.end_piece()
                total_S += losses_S.detach()
        return ledger.result(total_S)


def _backward(recorder: Recorder, ledger: Ledger, parameters: Parameters, losses_S: Tensor) -> None:
    regions = Regions(recorder.calls, losses_S, parameters.all)
    recorder.backward(losses_S, regions.parameters, retain_graph=bool(regions.parameters))
    if not regions.parameters:
        return
    body = frozenset(parameters.body)
    of_body = [p for p in regions.parameters if p in body]
    of_heads = [p for p in regions.parameters if p not in body]
    with recorder.gradients_cut():
        if of_body:

            def gradients_of(segment: int) -> list[Tensor]:
                found = regions.segment(of_body, segment)
                return [
                    ledger.zeros(*p.shape) if g is None else g.to(ledger.dtype, copy=True).contiguous()
                    for p, g in zip(of_body, found, strict=True)
                ]

            settle_dense(ledger, of_body, gradients_of, recorder.take_deferred())
        if of_heads:
            for parameter, gradient in zip(of_heads, regions.weighted(of_heads, ledger.coefficients_S), strict=True):
                if gradient is not None:
                    ledger.update(parameter).add_(gradient)
