"""One optimiser step: batch, dev head, gradients, the method, clipping, update (docs/semantics.md, section 2).

Shape suffixes: S segments, P entries of the body, E examples, H hidden size, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from aang_ray.config.methods import AangConfig
from aang_ray.gradients import make_engine
from aang_ray.gradients.dev_head import fit_dev_head
from aang_ray.gradients.engine import Request, StepGradients, free_memory
from aang_ray.methods.base import PrimaryMethod, Sampled
from aang_ray.model.heads import TokenHead
from aang_ray.objectives import randomness
from aang_ray.objectives.calibration import Calibrated
from aang_ray.objectives.source import DEV, DEV_HEAD, END_TASK, END_TASK_HEAD
from aang_ray.train.device import MicroBatch, activation_bytes, is_out_of_memory
from aang_ray.train.domain import DomainBatch, DomainPiece
from aang_ray.train.optim import (
    clip,
    clip_objectives,
    get_gradient,
    load_trained_state,
    make_optimizer,
    rate_factor,
    set_gradient,
    trained_state,
)
from aang_ray.train.primary import NO_PIECES, PrimaryPieces, PrimaryView
from aang_ray.train.setup import Setup
from aang_ray.train.workers.exchange import Exchange, Share, failing_for_all, no_gradients
from aang_ray.train.workers.group import check_same


@dataclass(frozen=True)
class Prepared:
    """The batch of a step in host memory, ready to be copied to the device."""

    batch: DomainBatch
    pieces: tuple[DomainPiece, ...]
    """The batch, or this worker's share of it, in pieces for one forward pass each."""
    dev_head: DomainPiece | None
    """The examples for fitting the dev head phi*; None at a step without a fit."""
    micro: int
    """Maximum number of examples in a piece when the pieces were made."""
    primary: PrimaryPieces = NO_PIECES
    """End-task examples for the method's measurement before the step."""
    share: Share | None = None
    """This worker's part of the batch; None for all of it."""
    batch_tokens: int = 0
    """Tokens of the whole batch, on all workers together."""

    @property
    def sampled(self) -> Sampled:
        """The step's objectives, in the form that methods use."""
        labels = tuple(segment.normaliser for segment in self.batch.segments[2:])
        return Sampled(self.batch.step, self.batch.sampled, self.batch.shares, labels)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the segments for the loss log; an empty segment has an empty name."""
        return tuple(segment.name if segment.examples else "" for segment in self.batch.segments)

    @property
    def real_tokens(self) -> int:
        """Tokens that go through the body in training mode."""
        return self.batch_tokens + self.primary.real_tokens


class Stepper:
    """Makes optimiser steps. A step changes only `setup`, the optimiser, the schedule, the dev head and `micro`."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        config, method = setup.config, setup.method
        self.optimizer = make_optimizer(setup.encoder, setup.heads, config.optim)
        self._parameter_bytes = 0  # that workers send each other after a step
        if config.resources.optimizer_state == "sharded" and setup.workers.size > 1:
            from aang_ray.train.workers.sharded import Sharded  # late: takes seconds to import

            self.optimizer = sharded = Sharded(self.optimizer, setup.workers)
            self._parameter_bytes = sharded.bytes
        self.schedule = LambdaLR(self.optimizer, rate_factor(config.schedule))
        tied_in_scores = config.gradients.tied_in_scores or method.whole_gradients
        self.engine = make_engine(config.gradients.engine, setup.encoder, setup.heads, tied_in_scores=tied_in_scores)
        self.exchange = Exchange(setup.workers, setup.encoder, setup.heads, tied_in_scores)
        examples = (config.batch.end_task or 1) + (config.batch.auxiliary or 0) + config.batch.dev
        self.micro = MicroBatch(None if config.batch.micro == "auto" else config.batch.micro, examples)
        self.dev_head: nn.Module | None = None
        """The dev head phi* of the last fit; None before the first fit."""
        self._primary = PrimaryView(setup, method) if isinstance(method, PrimaryMethod) and method.measures else None
        self._live_dev_head = isinstance(config.method, AangConfig) and config.method.dev_head == "live"
        self._calibrates_dev = isinstance(config.method, AangConfig) and config.method.dev_calibration
        # Published clipping acts on each objective's gradient, so separate gradients are needed.
        self._clips_objectives = config.optim.clipping == "published" and config.method.auxiliary
        self._class_weights_C = setup.class_weights()

    @property
    def prepares_ahead(self) -> bool:
        """Whether a batch can be prepared while earlier steps are still running."""
        return not self.setup.domain.follows_factors

    def evaluates_after(self, step: int) -> bool:
        """Return whether dev is scored after `step` steps."""
        return step % self.setup.config.schedule.eval_every == 0 or self.ends_after(step)

    def ends_after(self, step: int) -> bool:
        """Return whether the stage ends after `step` steps."""
        return step >= (self.setup.config.schedule.steps or 0)

    def prepare(self, step: int) -> Prepared:
        """Return the batch of a step. Another thread may call this if `prepares_ahead` is true."""
        method, domain = self.setup.method, self.setup.domain
        batch = self.batch(step, method.samples_dev_at(step))
        micro = self.micro.texts  # read once: another thread may change it
        refit = method.samples_dev_at(step) and not self._live_dev_head and step % domain.head_refit_every == 0
        share = None if self.setup.workers.size == 1 else self.exchange.share(domain, batch, whole=method.uses_dev)
        return Prepared(
            batch,
            self._pieces(batch, micro, share),
            self.setup.pinned(domain.dev_head_piece(step)) if refit else None,
            micro,
            self._primary_pieces(step, micro),
            share,
            batch_tokens=domain.tokens(batch),
        )

    def batch(self, step: int, with_dev: bool = False) -> DomainBatch:
        """Return the batch of a step, with or without dev examples."""
        domain = self.setup.domain
        return domain.batch(step, with_dev, self.setup.method.factors() if domain.follows_factors else None)

    def estimate_memory(self, prepared: Prepared) -> None:
        """With `batch.micro: auto`, lower the size of a forward pass so that it should fit into memory."""
        setup = self.setup
        if self.micro.fixed:
            return
        setup.encoder.train()
        self._fit_dev_head(prepared)
        few, many = 4, 16
        # In the difference of two sizes, memory that does not depend on the number of examples (weights) cancels.
        more_bytes = self._forward_bytes(prepared.batch, many) - self._forward_bytes(prepared.batch, few)
        self.micro.fit(more_bytes / (many - few), free_memory(setup.compute.device))
        # Use the smallest size of all workers, so that the first worker's checkpoint is valid for all.
        self.micro.texts = -setup.workers.max_host([-self.micro.texts])[0]

    def _forward_bytes(self, batch: DomainBatch, examples: int) -> int:
        """Return the bytes that `examples` copies of the batch's largest example keep for the backward pass."""
        piece = self.setup.domain.probe(batch, examples)
        return activation_bytes(lambda: self.losses(piece))

    def step(self, prepared: Prepared) -> StepGradients:
        """Make one optimiser step; return its losses and statistics, without body-sized tensors.

        Raises:
            RunFailure: Memory runs out with pieces of one example or of the user's size, or on one of several workers.
        """
        setup = self.setup
        gradients = self._gradients_that_fit(prepared)
        sampled = prepared.sampled
        direction_P = setup.method.direction(sampled, gradients)
        setup.method.observe(sampled, gradients)
        if direction_P is not None:
            set_gradient(setup.encoder, direction_P)
        clip(setup.encoder, setup.head_of, setup.config.optim)
        if prepared.batch.step < setup.config.optim.head_warmup_steps:
            self._keep_pretrained()
        self.optimizer.step()
        self.exchange.traffic["parameters"] += self._parameter_bytes
        self.optimizer.zero_grad(set_to_none=True)
        self.schedule.step()
        return replace(gradients, separate_SP=None, kept={}, update_P=None)

    def losses(self, piece: DomainPiece) -> Tensor:
        """Return a piece's part of the loss of every segment, [S]. The piece may be in host memory."""
        heads = dict(self.setup.head_of)
        heads[DEV_HEAD] = heads[END_TASK_HEAD] if self.dev_head is None else self.dev_head
        if self._calibrates_dev:
            heads[DEV_HEAD] = Calibrated(heads[DEV_HEAD])
        with self.setup.compute.autocast():
            return self.setup.domain.losses(piece.to(self.setup.compute.device), heads)

    def state_dict(self) -> dict[str, Any]:
        """Return everything that an optimiser step changes. The keys are part of the checkpoint format.

        There is no random state: batches are a function of (seed, step) and dropout is seeded at every step.
        """
        setup = self.setup
        return {
            "body": trained_state(setup.encoder),
            "heads": dict(setup.heads.state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "method": setup.method.state_dict(),
            "dev_head": None if self.dev_head is None else dict(self.dev_head.state_dict()),
            "micro": self.micro.texts,
            "round": {},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned, except a `batch.micro` of the user, which affects rounding only."""
        setup = self.setup
        load_trained_state(setup.encoder, state["body"])
        setup.heads.load_state_dict(state["heads"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        setup.method.load_state_dict(state["method"])
        self.dev_head = None if state["dev_head"] is None else _dev_head(state["dev_head"], setup.compute.device)
        if not self.micro.fixed:
            self.micro.texts = int(state["micro"])

    def check_same(self, steps: int) -> None:
        """Check that all workers have the same parameters and method state after `steps` steps."""
        setup = self.setup
        if setup.workers.size == 1:
            return
        method = setup.method.state_dict()
        parameters = {f"encoder.{name}": value for name, value in setup.encoder.named_parameters()}
        parameters |= {f"heads.{name}": value for name, value in setup.heads.named_parameters()}
        state = {f"method.{name}": value for name, value in method.items() if isinstance(value, Tensor)}
        check_same(setup.workers, steps, {**parameters, **state})

    def _keep_pretrained(self) -> None:
        """Drop the gradients of the body and of heads from the checkpoint: the optimiser leaves them as they are."""
        setup = self.setup
        pretrained = [head for head in setup.head_of.values() if isinstance(head, TokenHead) and head.from_checkpoint]
        for module in (setup.encoder, *pretrained):
            for parameter in module.parameters():
                parameter.grad = None

    def _gradients_that_fit(self, prepared: Prepared) -> StepGradients:
        """Compute the gradients, in smaller pieces whenever memory runs out."""
        # Dropout differs between workers. A single worker has rank 0, which leaves the seed as it is.
        seed = int(randomness.keys(self.setup.config.seed, prepared.batch.step)[0] >> 1) ^ self.setup.workers.rank
        while True:
            micro = self.micro.texts
            if prepared.micro != micro:  # the pieces were made before memory ran out
                pieces = self._pieces(prepared.batch, micro, prepared.share)
                primary = self._primary_pieces(prepared.batch.step, micro)
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
        """Write the gradients to `.grad`, and return the statistics that the method requested."""
        setup = self.setup
        setup.encoder.train()
        setup.heads.train()
        if self._primary is not None:
            self._primary.measure(prepared.batch.step, prepared.primary)
        request = setup.method.request(prepared.sampled)
        if self._clips_objectives:
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
        if gradients.separate_SP is not None and self._clips_objectives:
            clip_objectives(setup.encoder, gradients.separate_SP, request.coefficients_S)
        if END_TASK in request.keep:
            gradients = replace(gradients, update_P=get_gradient(setup.encoder))
        return gradients

    def _fit_dev_head(self, prepared: Prepared) -> None:
        """Fit the dev head phi* on features that the body computes once, in eval mode and without gradient."""
        if prepared.dev_head is None:
            return
        setup = self.setup
        piece = prepared.dev_head.to(setup.compute.device)
        setup.encoder.eval()
        with torch.no_grad(), setup.compute.autocast():
            features_EH, labels_E = setup.domain.features(piece)
        features_EH = features_EH.to(torch.promote_types(features_EH.dtype, torch.float32))
        setup.encoder.train()
        seed = int(randomness.keys(setup.config.seed, prepared.batch.step, randomness.DEV_HEAD)[0] >> 1)
        self.dev_head = fit_dev_head(features_EH, labels_E, setup.classes, seed, self._class_weights_C)

    def _pieces(self, batch: DomainBatch, micro: int, share: Share | None) -> tuple[DomainPiece, ...]:
        ranges = None if share is None else share.ranges
        if self._calibrates_dev:  # the dev batch is calibrated as a whole, so it must not be cut
            micro = max(micro, batch.segments[DEV].examples)
        pieces = self.setup.domain.pieces(batch, micro, self.engine.per_segment, ranges)
        return tuple(self.setup.pinned(piece) for piece in pieces)

    def _primary_pieces(self, step: int, micro: int) -> PrimaryPieces:
        return NO_PIECES if self._primary is None else self._primary.prepare(step, micro)


def _dev_head(parameters: Mapping[str, Tensor], device: torch.device) -> nn.Module:
    """Return a dev head phi* (Linear, Tanh, Linear) with the given parameters, which are not trained further."""
    classes, hidden = parameters["2.weight"].shape
    dtype = parameters["2.weight"].dtype
    first = nn.Linear(hidden, hidden, device=device, dtype=dtype)
    head = nn.Sequential(first, nn.Tanh(), nn.Linear(hidden, classes, device=device, dtype=dtype))
    head.load_state_dict(parameters)
    return head.requires_grad_(False)
