"""Steps for gradient tests: texts of several segments, packed into rows, with a small encoder and heads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from aang_ray.gradients.engine import Engine, Request, StepGradients
from aang_ray.model.attention import TokenInputs
from aang_ray.model.encoder import Encoder
from aang_ray.model.heads import ClassificationHead, TiedDecoder, TokenHead
from aang_ray.model.segments import SegmentRows, per_row, segment_rows
from tests.model.layout import Text, lay_out, random_ids, text

WIDTH = 16
CLASSES = 3
REPRESENTATIONS = ("bidirectional", "left-to-right", "right-to-left", "random-factorized")
SEGMENTS = ((6, 4, 5), (10, 3), (), (5, 9, 2, 7), (4,))
"""Lengths of the texts of each segment: ragged, one of them empty."""


JOINT_FROM = 2


@dataclass(frozen=True)
class TextPiece:
    """Texts of some segments; every text has a class, every second token a label."""

    inputs: TokenInputs
    tokens: SegmentRows
    texts: SegmentRows
    labelled: SegmentRows
    index_M: Tensor


def text_piece(lengths: Sequence[Sequence[int]]) -> TextPiece:
    """Pack texts one after another into rows; ids repeat between segments, so that segments share tokens."""
    rows: list[list[Text]] = [[]]
    token_bounds, text_bounds, labelled_bounds, index = [0], [0], [0], []
    used, texts = 0, 0
    for number, segment in enumerate(lengths):
        for length in segment:
            if used + length > WIDTH:
                rows.append([])
                used = 0
            start = (len(rows) - 1) * WIDTH + used
            ids = random_ids(length, seed=length % 5)
            rows[-1].append(text(ids, REPRESENTATIONS[number % len(REPRESENTATIONS)]))
            used += length
            texts += 1
            if number > 0:
                index += list(range(start, start + length, 2))
        token_bounds.append((len(rows) - 1) * WIDTH + used)
        text_bounds.append(texts)
        labelled_bounds.append(len(index))
    # Padding at the very end belongs to the last segment that has texts.
    end = token_bounds[-1]
    token_bounds = [len(rows) * WIDTH if bound == end else bound for bound in token_bounds]
    return TextPiece(
        lay_out(rows, WIDTH),
        SegmentRows(tuple(token_bounds)),
        SegmentRows(tuple(text_bounds)),
        SegmentRows(tuple(labelled_bounds)),
        torch.tensor(index, dtype=torch.long),
    )


def make_heads(encoder: Encoder, dtype: torch.dtype, seed: int = 0) -> nn.ModuleDict:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pooled = ClassificationHead(encoder.hidden_size, CLASSES, 0.0)
        token = TokenHead(encoder.word_embeddings, encoder.hidden_size)
    return nn.ModuleDict({"pooled": pooled, "token": token}).to(dtype)


def text_losses(encoder: Encoder, heads: nn.ModuleDict) -> Callable[[TextPiece], Tensor]:
    """Even segments classify their texts, odd ones predict tokens; sums, so that pieces add up."""

    def losses(piece: TextPiece) -> Tensor:
        hidden_RLH = encoder(piece.inputs)
        flat_TH = hidden_RLH.flatten(0, 1)
        with segment_rows(piece.texts):
            classes_EC = heads["pooled"](encoder.pool(hidden_RLH, piece.inputs))
        with segment_rows(piece.labelled):
            ids_M = piece.inputs.ids_RL.flatten()[piece.index_M]
            weights = [s % 2 / 10 for s in range(piece.tokens.count)]
            weight_M = per_row(torch.tensor(weights, dtype=torch.float64), piece.labelled)
            loss_M = heads["token"](flat_TH.index_select(0, piece.index_M), ids_M, weight_M)
        wide = torch.promote_types(classes_EC.dtype, torch.float32)
        loss_E = F.cross_entropy(classes_EC.to(wide), piece.inputs.lengths_E % CLASSES, reduction="none")
        parts = [
            loss_E[piece.texts.of(s)].sum() if s % 2 == 0 else loss_M[piece.labelled.of(s)].sum()
            for s in range(piece.tokens.count)
        ]
        return torch.stack(parts) / 10

    return losses


@dataclass
class Reference:
    """What an engine must return, by automatic differentiation of each loss through one retained graph."""

    losses_S: Tensor
    scored_SP: Tensor
    coefficients_S: Tensor
    updates: dict[str, Tensor]


def trained(body: nn.Module, heads: nn.Module) -> dict[str, nn.Parameter]:
    """The trained parameters of body and heads, by name."""
    named = dict(body.named_parameters()) | {f"heads.{name}": p for name, p in heads.named_parameters()}
    return {name: p for name, p in named.items() if p.requires_grad}


def reference(
    body: nn.Module,
    heads: nn.Module,
    piece: Any,
    losses: Callable[[Any], Tensor],
    coefficients_S: Tensor,
    tied_in_scores: bool = False,
) -> Reference:
    """One forward pass, then one `autograd.grad` for each segment, without the package's engines."""
    named = trained(body, heads)
    of_body = [p for p in body.parameters() if p.requires_grad]
    tied = [m for m in heads.modules() if isinstance(m, TiedDecoder) and m.table.weight.requires_grad]
    for module in tied:
        module.alias = module.table.weight.detach().requires_grad_()
    losses_S = losses(piece)
    aliases = [m.alias for m in tied if m.alias is not None]
    tables = [m.table.weight for m in tied]
    for module in tied:
        module.alias = None
    updates = {name: torch.zeros_like(p) for name, p in named.items()}
    rows = []
    for s, loss in enumerate(losses_S):
        inputs = [*named.values(), *aliases]
        found = [
            torch.zeros_like(p) if g is None else g
            for p, g in zip(
                inputs, torch.autograd.grad(loss, inputs, retain_graph=True, allow_unused=True), strict=True
            )
        ]
        gradients = dict(zip(map(id, inputs), found, strict=True))
        for name, p in named.items():
            updates[name] += coefficients_S[s].to(p.dtype) * gradients[id(p)]
        scored = {id(p): gradients[id(p)].clone() for p in of_body}
        for table, alias in zip(tables, aliases, strict=True):
            name = next(n for n, p in named.items() if p is table)
            updates[name] += coefficients_S[s].to(table.dtype) * gradients[id(alias)]
            if tied_in_scores:
                scored[id(table)] += gradients[id(alias)]
        rows.append(torch.cat([g.flatten() for g in scored.values()]))
    return Reference(losses_S.detach(), torch.stack(rows), coefficients_S, updates)


def run(
    engine: Engine,
    body: nn.Module,
    heads: nn.Module,
    pieces: Sequence[Any],
    losses: Callable[[Any], Tensor],
    request: Request,
) -> tuple[StepGradients, dict[str, Tensor]]:
    """Return the engine's result and the `.grad` of every parameter, and clear `.grad`."""
    result = engine(pieces, losses, request)
    assert all(p.grad is None for p in body.parameters() if not p.requires_grad)
    updates = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in trained(body, heads).items()}
    body.zero_grad(set_to_none=True)
    heads.zero_grad(set_to_none=True)
    return result, updates


def scores_of(result: StepGradients) -> tuple[Tensor, Tensor]:
    """Inner products and squared norms of a result that was asked for them."""
    assert result.dots_S is not None
    assert result.norms2_S is not None
    return result.dots_S, result.norms2_S


def relative(found: Tensor, expected: Tensor) -> float:
    """||found - expected|| / ||expected||, 0 where both are 0."""
    distance = torch.linalg.vector_norm((found.double() - expected.double()).flatten())
    return float(distance / torch.linalg.vector_norm(expected.double().flatten()).clamp_min(1e-300))


def assert_matches(result: StepGradients, updates: dict[str, Tensor], expected: Reference, tolerance: float) -> None:
    """Compare losses, inner products, norms and every parameter's update, with relative errors."""
    dots_S = expected.scored_SP @ expected.scored_SP[0]
    norms2_S = expected.scored_SP.square().sum(1)
    assert relative(result.losses_S, expected.losses_S) < tolerance
    found_dots_S, found_norms2_S = scores_of(result)
    size_S = (norms2_S[0] * norms2_S).sqrt()
    assert float(((found_dots_S - dots_S).abs() - tolerance * size_S).max()) <= 0
    assert float(((found_norms2_S - norms2_S).abs() - tolerance * norms2_S).max()) <= 0
    if result.joint_norm2 is not None:
        joint_S = expected.coefficients_S.to(expected.scored_SP.dtype)[JOINT_FROM:]
        norm2 = (joint_S @ expected.scored_SP[JOINT_FROM:]).square().sum()
        assert float((result.joint_norm2 - norm2).abs()) <= tolerance * float(norm2)
    largest = max(float(torch.linalg.vector_norm(g)) for g in expected.updates.values())
    for name, gradient in expected.updates.items():
        distance = float(torch.linalg.vector_norm(updates[name] - gradient))
        # Some gradients are 0 but for rounding (keys' biases): those are compared with the largest one.
        scale = max(float(torch.linalg.vector_norm(gradient)), 1e-6 * largest)
        assert distance <= tolerance * scale, f"{name}: {distance / scale:.3g}"
