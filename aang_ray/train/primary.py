"""What a method sees of the end task's own gradients: fresh train examples, dropout off.

With dropout off every worker computes the same from the same examples, up to rounding where kernels are not
deterministic; so the first one's measurements are sent to all, or the workers would drift apart.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
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
from aang_ray.train.setup import Setup
from aang_ray.train.workers.exchange import failing_for_all
from aang_ray.train.workers.group import Agreement


@dataclass(frozen=True)
class PrimaryPieces:
    """A step's examples in host memory."""

    subspace: tuple[DomainPiece, ...] = ()
    mean: tuple[DomainPiece, ...] = ()
    counts: tuple[int, int] = (0, 0)
    """Examples in each."""

    @property
    def real_tokens(self) -> int:
        return sum(piece.real_tokens for piece in (*self.subspace, *self.mean))


class ExampleLosses:
    """A piece's cross-entropies, [E], through the end-task head, times the class weights where there are any."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        weights = setup.task.class_weights
        self._class_weights_C = None if weights is None else torch.from_numpy(weights).to(setup.compute.device)

    def __call__(self, piece: DomainPiece) -> Tensor:
        setup = self._setup
        with setup.compute.autocast():
            features_EH, labels_E = setup.domain.features(piece.to(setup.compute.device))
            logits_EC = setup.head_of[END_TASK_HEAD](features_EH)
        wide = torch.promote_types(logits_EC.dtype, torch.float32)
        weights_C = None if self._class_weights_C is None else self._class_weights_C.to(wide)
        return F.cross_entropy(logits_EC.to(wide), labels_E, weight=weights_C, reduction="none")

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Dropout off for the time being."""
        modules = (self._setup.encoder, *self._setup.head_of.values())
        training = [module.training for module in modules]
        for module in modules:
            module.eval()
        try:
            yield
        finally:
            for module, was in zip(modules, training, strict=True):
                module.train(was)


class PrimaryView:
    """Lets a method look at the end task before each step, through the body and the end-task head as they are."""

    def __init__(self, setup: Setup, method: PrimaryMethod) -> None:
        self._setup, self._method, self._losses = setup, method, ExampleLosses(setup)

    def prepare(self, step: int, micro: int) -> PrimaryPieces:
        """The examples of a step, a function of (seed, step); two sets that share none where train has enough."""
        wanted = self._method.primary_examples(step)
        size = len(self._setup.task.train)
        order = randomness.generator(self._setup.config.seed, step, randomness.METHOD).permutation(size)
        subspace = order[: wanted.subspace]
        mean = order[-min(wanted.mean, size) :]
        return PrimaryPieces(
            self._pieces(subspace, micro), self._pieces(mean, micro), counts=(len(subspace), len(mean))
        )

    def look(self, step: int, pieces: PrimaryPieces) -> None:
        """Hand the method the Jacobians of its examples' losses."""
        body = self._setup.encoder
        subspace, mean = (
            ExampleJacobian(body, part, self._losses, count) if part else None
            for part, count in zip((pieces.subspace, pieces.mean), pieces.counts, strict=True)
        )
        assert mean is not None, "a method looks at one example at least"
        workers, measure = self._setup.workers, self._method.measure
        with self._losses.evaluating():
            if subspace is None or workers.size == 1:
                measured = measure(step, subspace, mean)
            else:
                # Whether there is memory for a subspace is each worker's own finding. The host waits here anyway.
                with Agreement(workers):
                    measured = failing_for_all(measure)(step, subspace, mean)
        for tensor in measured:
            workers.broadcast_(tensor)

    def _pieces(self, examples: Int64, micro: int) -> tuple[DomainPiece, ...]:
        pieces = self._setup.domain.end_task_pieces("train", examples, micro)
        return tuple(p.pin() for p in pieces) if self._setup.compute.device.type == "cuda" else pieces


NO_PIECES = PrimaryPieces()


def primary_view(setup: Setup) -> PrimaryView | None:
    """For a method that looks at the end task; None for the others."""
    return PrimaryView(setup, setup.method) if isinstance(setup.method, PrimaryMethod) else None
