"""One optimiser step: batch, dev head, gradients, the method, clipping, update. (semantics section 2)"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from aang_ray.config.methods import AangConfig
from aang_ray.gradients import make_engine
from aang_ray.gradients.dev_head import fit_dev_head
from aang_ray.gradients.engine import Request, StepGradients
from aang_ray.methods.base import Sampled
from aang_ray.objectives import randomness
from aang_ray.objectives.source import DEV_HEAD, END_TASK_HEAD
from aang_ray.train.device import MicroBatch, activation_bytes, free_memory, is_out_of_memory
from aang_ray.train.domain import DomainBatch, DomainPiece
from aang_ray.train.optim import (
    clip,
    clipped_sum,
    get_gradient,
    make_optimizer,
    make_schedule,
    set_gradient,
    wants_separate,
)
from aang_ray.train.primary import NO_PIECES, PrimaryPieces, primary_view
from aang_ray.train.setup import Setup
from aang_ray.train.workers.exchange import Exchange, Share, failing_for_all, no_gradients
from aang_ray.train.workers.group import Sharded, check_same, replicated


@dataclass(frozen=True)
class Prepared:
    """A step's batch in host memory, ready to be copied to the device."""

    batch: DomainBatch
    pieces: tuple[DomainPiece, ...]
    dev_head: DomainPiece | None
    """The examples that phi* is fitted on, where this step fits it."""
    micro: int
    """Most texts in a piece when the pieces were cut."""
    primary: PrimaryPieces = NO_PIECES
    """What the method looks at before the step, where it does."""
    share: Share | None = None
    """This worker's part of the batch; None for all of it."""
    batch_tokens: int = 0
    """Tokens of the whole batch, whoever computes them."""

    @property
    def sampled(self) -> Sampled:
        """What the method is told."""
        labels = tuple(segment.normaliser for segment in self.batch.segments[2:])
        return Sampled(self.batch.step, self.batch.sampled, self.batch.shares, labels)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the segments whose losses are kept; the others are empty."""
        return tuple(segment.name if segment.texts else "" for segment in self.batch.segments)

    @property
    def real_tokens(self) -> int:
        """Tokens that go through the body in training mode."""
        return self.batch_tokens + self.primary.real_tokens


class Stepper:
    """Runs optimiser steps on a set-up; everything it changes is in `setup`, the optimiser and the schedule."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        config = setup.config
        plain = make_optimizer(setup.encoder, setup.heads, config.optim)
        sharded = config.resources.optimizer_state == "sharded" and setup.workers.size > 1
        self.optimizer = Sharded(plain, setup.workers) if sharded else plain
        self.schedule = make_schedule(self.optimizer, config.schedule)
        tied_in_scores = config.gradients.tied_in_scores or setup.method.whole_gradients
        self.engine = make_engine(config.gradients.engine, setup.encoder, setup.heads, tied_in_scores=tied_in_scores)
        self.exchange = Exchange(setup.workers, setup.encoder, setup.heads, tied_in_scores)
        texts = (config.batch.end_task or 1) + (config.batch.auxiliary or 0) + config.batch.dev
        self.micro = MicroBatch(None if config.batch.micro == "auto" else config.batch.micro, texts)
        self._primary = primary_view(setup)
        self._live_dev_head = isinstance(config.method, AangConfig) and config.method.dev_head == "live"
        weights = setup.task.class_weights
        self._class_weights_C = None if weights is None else torch.from_numpy(weights).to(setup.compute.device)
        self.dev_head: nn.Module | None = None
        """phi*, where one was fitted; it stays until the next fit."""

    @property
    def prepares_ahead(self) -> bool:
        """Whether a step's batch depends on nothing that the steps before it learn."""
        return not self.setup.domain.follows_factors

    def evaluates_after(self, step: int) -> bool:
        """Whether dev is scored after so many steps."""
        return step % self.setup.config.schedule.eval_every == 0 or self.ends_after(step)

    def ends_after(self, step: int) -> bool:
        """Whether so many steps are all."""
        return step >= (self.setup.config.schedule.steps or 0)

    def round_state(self) -> dict[str, Any]:
        """What a method of rounds needs to go on from within a round; nothing for the others."""
        return {}

    def restore_round(self, state: Mapping[str, Any]) -> None:
        """Take back what `round_state` gave, when all else is restored."""

    def prepare(self, step: int) -> Prepared:
        """The batch of a step; safe on another thread unless the allocation follows the factors."""
        method, domain = self.setup.method, self.setup.domain
        batch = domain.batch(step, method.uses_dev, method.factors() if domain.follows_factors else None)
        micro = self.micro.texts  # once: another thread may change it
        refit = method.uses_dev and not self._live_dev_head and step % domain.head_refit_every == 0
        dev_head = self._pinned(domain.dev_head_piece(step)) if refit else None
        share = None if self.setup.workers.size == 1 else self.exchange.share(domain, batch, whole=method.uses_dev)
        return Prepared(
            batch,
            self._pieces(batch, micro, share),
            dev_head,
            micro,
            self._primary_pieces(step, micro),
            share,
            batch_tokens=sum(int(costs_E.sum()) for costs_E in domain.costs(batch)),
        )

    def look_ahead(self, step: int) -> DomainBatch:
        """The end task and the objectives of a step that is still to come, without a dev batch."""
        domain = self.setup.domain
        return domain.batch(step, False, self.setup.method.factors() if domain.follows_factors else None)

    def estimate_memory(self, prepared: Prepared) -> None:
        """Let `batch.micro: auto` start with what should fit into memory."""
        setup = self.setup
        if self.micro.fixed:
            return
        setup.encoder.train()
        self._fit_dev_head(prepared)
        sizes = (4, 16)
        few, more = (self._probe(prepared.batch, examples) for examples in sizes)
        # The slope: what is kept whatever the number of texts, such as weights, is no matter of the piece's size.
        self.micro.fit((more - few) / (sizes[1] - sizes[0]), free_memory(setup.compute.device))
        # One size for all workers, so that a checkpoint of the first stands for all.
        self.micro.texts = -setup.workers.max_host([-self.micro.texts])[0]

    def _probe(self, batch: DomainBatch, examples: int) -> int:
        """Bytes kept for the backward pass by so many examples, the largest of any segment taken again and again."""
        piece = self._to_device(self.setup.domain.probe(batch, examples))

        def forward() -> Tensor:
            with self.setup.compute.autocast():
                return self._losses(piece)

        return activation_bytes(forward)

    def step(self, prepared: Prepared) -> StepGradients:
        """One optimiser step.

        Raises:
            RunFailure: if memory runs out with the smallest piece, or on one of several workers.
        """
        setup = self.setup
        gradients = self._gradients_that_fit(prepared)
        sampled = prepared.sampled
        direction_P = setup.method.direction(sampled, gradients)
        setup.method.observe(sampled, gradients)
        if direction_P is not None:
            set_gradient(setup.encoder, direction_P)
        clip(setup.encoder, setup.head_of, setup.config.optim)
        self.optimizer.step()
        if isinstance(self.optimizer, Sharded):
            self.exchange.traffic.parameters += self.optimizer.bytes
        self.optimizer.zero_grad(set_to_none=True)
        self.schedule.step()
        return replace(gradients, separate_SP=None, kept={}, update_P=None)

    def state_dict(self) -> dict[str, Any]:
        """Return everything that an optimiser step changes. The keys are part of the checkpoint format.

        Random streams are no part of it: batches are a function of (seed, step), and dropout is seeded at every step
        (docs/semantics.md, section 2).
        """
        setup = self.setup
        return {
            "body": dict(setup.encoder.state_dict()),
            "heads": dict(setup.heads.state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "method": setup.method.state_dict(),
            "dev_head": None if self.dev_head is None else dict(self.dev_head.state_dict()),
            "micro": self.micro.texts,
            "round": self.round_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned; a `batch.micro` that the user has set stays, it changes rounding only.

        Raises:
            KeyError, RuntimeError, ValueError: for a state of another model.
        """
        setup = self.setup
        setup.encoder.load_state_dict(state["body"])
        setup.heads.load_state_dict(state["heads"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        setup.method.load_state_dict(state["method"])
        self.dev_head = None if state["dev_head"] is None else _dev_head(state["dev_head"], setup.compute.device)
        if not self.micro.fixed:
            self.micro.texts = int(state["micro"])
        self.restore_round(state["round"])

    def check_same(self, steps: int) -> None:
        """Make sure that all workers of the run hold the same parameters and method state after so many steps.

        Raises:
            RunFailure: naming what differs.
        """
        setup = self.setup
        if setup.workers.size > 1:
            check_same(setup.workers, steps, replicated(setup.encoder, setup.heads, setup.method.state_dict()))

    def _gradients_that_fit(self, prepared: Prepared) -> StepGradients:
        # Dropout differs between workers; alone, rank 0 leaves the seed as it is.
        seed = int(randomness.keys(self.setup.config.seed, prepared.batch.step)[0] >> 1) ^ self.setup.workers.rank
        while True:
            if prepared.micro != self.micro.texts:  # prepared before memory ran out
                micro = self.micro.texts
                primary = self._primary_pieces(prepared.batch.step, micro)
                pieces = self._pieces(prepared.batch, micro, prepared.share)
                prepared = replace(prepared, micro=micro, pieces=pieces, primary=primary)
            torch.manual_seed(seed)
            try:
                return self._gradients(prepared)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                self.optimizer.zero_grad(set_to_none=True)
                self.micro.halve()

    def _gradients(self, prepared: Prepared) -> StepGradients:
        """Gradients in `.grad`, and the statistics that the method asked for."""
        setup = self.setup
        setup.encoder.train()
        setup.heads.train()
        if self._primary is not None:
            self._primary.look(prepared.batch.step, prepared.primary)
        request = setup.method.request(prepared.sampled)
        if wants_separate(setup.config):
            request = replace(request, separate=True)

        def compute(request: Request) -> StepGradients:
            self._fit_dev_head(prepared)
            if not prepared.pieces:
                return no_gradients(request, setup.encoder)
            return self.engine(prepared.pieces, self.losses, request)

        if prepared.share is None:
            gradients = compute(request)
        else:
            gradients = self.exchange.gradients(failing_for_all(compute), request, prepared.share)
        if gradients.separate_SP is not None and wants_separate(setup.config):
            clipped_sum(setup.encoder, gradients.separate_SP, request.coefficients_S)
        if request.keep:
            gradients = replace(gradients, update_P=get_gradient(setup.encoder))
        return gradients

    def losses(self, piece: DomainPiece) -> Tensor:
        """Of every segment, [S], of a piece in host memory."""
        with self.setup.compute.autocast():
            return self._losses(self._to_device(piece))

    def _losses(self, piece: DomainPiece) -> Tensor:
        heads = dict(self.setup.head_of)
        heads[DEV_HEAD] = heads[END_TASK_HEAD] if self.dev_head is None else self.dev_head
        return self.setup.domain.losses(piece, heads)

    def _fit_dev_head(self, prepared: Prepared) -> None:
        """Fit phi* on features that the body computes once, in eval mode and without gradient."""
        if prepared.dev_head is None:
            return
        setup = self.setup
        piece = self._to_device(prepared.dev_head)
        setup.encoder.eval()
        with torch.no_grad(), setup.compute.autocast():
            features_EH, labels_E = setup.domain.features(piece)
        features_EH = features_EH.to(torch.promote_types(features_EH.dtype, torch.float32))
        setup.encoder.train()
        seed = int(randomness.keys(setup.config.seed, prepared.batch.step, randomness.DEV_HEAD)[0] >> 1)
        self.dev_head = fit_dev_head(features_EH, labels_E, setup.classes, seed, self._class_weights_C)

    def _pieces(self, batch: DomainBatch, micro: int, share: Share | None) -> tuple[DomainPiece, ...]:
        ranges = None if share is None else share.ranges
        cuts = self.setup.domain.pieces(batch, micro, self.engine.per_segment, ranges)
        return tuple(self._pinned(piece) for piece in cuts)

    def _primary_pieces(self, step: int, micro: int) -> PrimaryPieces:
        return NO_PIECES if self._primary is None else self._primary.prepare(step, micro)

    def _pinned(self, piece: DomainPiece) -> DomainPiece:
        return piece.pin() if self.setup.compute.device.type == "cuda" else piece

    def _to_device(self, piece: DomainPiece) -> DomainPiece:
        return piece.to(self.setup.compute.device)


def _dev_head(parameters: Mapping[str, Tensor], device: torch.device) -> nn.Module:
    """Return a dev head phi* (Linear, Tanh, Linear) with these parameters; it is used until the next fit."""
    classes, hidden = parameters["2.weight"].shape
    dtype = parameters["2.weight"].dtype
    first = nn.Linear(hidden, hidden, device=device, dtype=dtype)
    head = nn.Sequential(first, nn.Tanh(), nn.Linear(hidden, classes, device=device, dtype=dtype))
    head.load_state_dict(parameters)
    return head.requires_grad_(False)
