"""End-task gradients that some methods measure before a step, on fresh train examples and without dropout.

All workers compute them from the same examples. The first worker's result is sent to all, because kernels may not be
deterministic.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from aang_ray.gradients.statistics import ExampleJacobian
from aang_ray.methods.base import PrimaryMethod
from aang_ray.objectives import randomness
from aang_ray.objectives.source import END_TASK_HEAD
from aang_ray.objectives.texts import Int64
from aang_ray.train.domain import DomainPiece
from aang_ray.train.evaluate import evaluating
from aang_ray.train.setup import Setup
from aang_ray.train.workers.exchange import failing_for_all
from aang_ray.train.workers.group import agreed


@dataclass(frozen=True)
class PrimaryPieces:
    """The end-task examples of a step, in host memory."""

    subspace: tuple[DomainPiece, ...] = ()
    """Examples for estimating a subspace; empty at a step that keeps the previous subspace."""
    mean: tuple[DomainPiece, ...] = ()
    """Examples for the mean gradient."""
    counts: tuple[int, int] = (0, 0)
    """Number of examples in `subspace` and in `mean`."""

    @property
    def real_tokens(self) -> int:
        return sum(piece.real_tokens for piece in (*self.subspace, *self.mean))


NO_PIECES = PrimaryPieces()


class ExampleLosses:
    """A function that returns a piece's end-task cross-entropies, [E], multiplied by class weights if there are any."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._class_weights_C = setup.class_weights()

    def __call__(self, piece: DomainPiece) -> Tensor:
        setup = self._setup
        with setup.compute.autocast():
            features_EH, labels_E = setup.domain.features(piece.to(setup.compute.device))
            logits_EC = setup.head_of[END_TASK_HEAD](features_EH)
        wide = torch.promote_types(logits_EC.dtype, torch.float32)
        weights_C = None if self._class_weights_C is None else self._class_weights_C.to(wide)
        return F.cross_entropy(logits_EC.to(wide), labels_E, weight=weights_C, reduction="none")

    def evaluating(self) -> AbstractContextManager[None]:
        return evaluating(self._setup.encoder, *self._setup.head_of.values())


class PrimaryView:
    """Lets a method measure end-task gradients before each step, through the body and the end-task head."""

    def __init__(self, setup: Setup, method: PrimaryMethod) -> None:
        self._setup, self._method, self._losses = setup, method, ExampleLosses(setup)

    def prepare(self, step: int, micro: int) -> PrimaryPieces:
        """Return the examples of a step, a function of (seed, step): two disjoint sets if train is large enough."""
        first, last = self._method.primary_examples(step)
        size = len(self._setup.task.train)
        order = randomness.generator(self._setup.config.seed, step, randomness.METHOD).permutation(size)
        subspace, mean = order[:first], order[-min(last, size) :]
        counts = (len(subspace), len(mean))
        return PrimaryPieces(self._pieces(subspace, micro), self._pieces(mean, micro), counts)

    def measure(self, step: int, pieces: PrimaryPieces) -> None:
        """Call the method's `measure` with the Jacobians of the examples' losses; send the results to all workers."""
        body = self._setup.encoder
        subspace, mean = (
            ExampleJacobian(body, part, self._losses, count) if part else None
            for part, count in zip((pieces.subspace, pieces.mean), pieces.counts, strict=True)
        )
        assert mean is not None, "a method asks for one example at least"
        workers, measure = self._setup.workers, self._method.measure
        with self._losses.evaluating():
            if subspace is None or workers.size == 1:
                measured = measure(step, subspace, mean)
            else:
                # One worker may run out of memory here while others do not, so they agree. The host waits here anyway.
                with agreed(workers):
                    measured = failing_for_all(measure)(step, subspace, mean)
        for tensor in measured:
            workers.broadcast_(tensor)

    def _pieces(self, examples: Int64, micro: int) -> tuple[DomainPiece, ...]:
        pieces = self._setup.domain.end_task_pieces("train", examples, micro)
        return tuple(self._setup.pinned(piece) for piece in pieces)
