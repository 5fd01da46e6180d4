"""Which examples every part of a step reads, whatever the examples are: a pure function of (seed, step)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from aang_ray.errors import UserError
from aang_ray.objectives import randomness
from aang_ray.objectives.allocation import Share, published_shares
from aang_ray.objectives.objective import Objective
from aang_ray.objectives.sampling import Cursors, epoch_examples
from aang_ray.objectives.space import Space
from aang_ray.objectives.texts import Int64

_END_TASK_CODE = -1
NOTHING: Int64 = np.zeros(0, dtype=np.int64)
"""Examples of a segment that a step leaves empty."""


@dataclass(frozen=True)
class SourceSettings:
    """Sizes and switches of the batches."""

    end_task: int
    auxiliary: int
    dev: int
    dev_head: int
    seed: int
    per_objective_heads: bool = False
    head_from_train: bool = False
    """The dev head's examples come from train (`published`) instead of dev."""
    head_refit_every: int = 1
    meta_dev_fraction: float = 0.0
    published_allocation: bool = False


class Readings:
    """The examples of any step: indices into train, dev, or the data of an objective.

    `sizes` tells how many examples a kind of data of the space has.
    """

    def __init__(
        self,
        train: int,
        dev: int,
        sizes: Callable[[str], int],
        space: Space | None,
        n: int,
        settings: SourceSettings,
    ) -> None:
        self._train, self._dev, self._sizes, self._space, self._settings = train, dev, sizes, space, settings
        self._cursors = Cursors(len(space), n, settings.auxiliary, settings.seed) if space is not None else None
        self._meta_dev, self._score_dev = self._split_dev()
        # Head and dev batch are disjoint. The head's sample comes first; where dev is no larger, it takes half.
        meta = len(self._meta_dev)
        self._head_size = settings.dev_head if settings.dev_head < meta else meta // 2

    @property
    def score_dev(self) -> Int64:
        """Dev examples that decide which checkpoint is kept."""
        return self._score_dev

    def draw(self, step: int) -> tuple[int, ...]:
        """S of a step; empty without auxiliary objectives."""
        return self._cursors.draw(step) if self._cursors is not None else ()

    def end_task(self, step: int) -> Int64:
        """Train examples of the end task's segment."""
        count = self._settings.end_task
        return epoch_examples(self._train, step * count, count, self._settings.seed, _END_TASK_CODE)

    def dev_batch(self, step: int) -> Int64:
        """At most `dev` examples of dev that the step's head was not fitted on."""
        settings = self._settings
        candidates = self._meta_dev
        if not settings.head_from_train:
            candidates = np.setdiff1d(candidates, self.dev_head(step))
        order = randomness.generator(settings.seed, step, randomness.DEV).permutation(len(candidates))
        chosen: Int64 = candidates[order][: settings.dev]
        return chosen

    def dev_head(self, step: int) -> Int64:
        """What phi* is fitted on at this step: examples of dev, or of train where `head_from_train` says so."""
        settings = self._settings
        generator = randomness.generator(settings.seed, step - step % settings.head_refit_every, randomness.DEV_HEAD)
        if settings.head_from_train:
            return generator.permutation(self._train)[: settings.dev_head]
        return self._meta_dev[generator.permutation(len(self._meta_dev))][: self._head_size]

    def auxiliary(self, step: int, factors: Mapping[str, npt.NDArray[np.float64]] | None) -> list[Share]:
        """(objective, examples, keys of randomness, b / B) for each sampled objective.

        `factors` (by factor letter, aligned with `Space.factors()`) are needed for `published` allocation only.
        """
        if self._cursors is None or self._space is None:
            return []
        settings, objectives = self._settings, self._space.objectives
        if settings.published_allocation:
            if factors is None:
                raise ValueError("published allocation needs the factors")
            sampled = self._cursors.draw(step)
            sizes = {data: self._sizes(data) for data in {objectives[k].data for k in sampled}}
            return published_shares(self._space, sampled, factors, sizes, settings.auxiliary, settings.seed, step)
        return [self._read(step, index, start, count) for index, start, count in self._cursors.at(step)]

    def size(self, objective: int) -> int:
        """Examples of the data that an objective reads."""
        return self._sizes(self._objective(objective).data)

    def chosen(self, number: int, objectives: Sequence[int]) -> list[Share]:
        """Batch number so-and-so of objectives that are read in turn, whatever was sampled at the steps before.

        Each gets floor(B / n) of the auxiliary batch, at least one example, and reads its epochs without replacement.
        """
        count = max(1, self._settings.auxiliary // max(1, len(objectives)))
        return [self._read(number, index, number * count, count) for index in objectives]

    def _read(self, step: int, index: int, start: int, count: int) -> Share:
        """Examples number start to start + count of an objective's endless reading."""
        objective, seed = self._objective(index), self._settings.seed
        size = self._sizes(objective.data)
        examples = epoch_examples(size, start, count, seed, objective.code)
        # An example that is read twice at a step, in a tiny data set, gets a key for each reading.
        reading = np.arange(start, start + count) // size
        return index, examples, randomness.keys(seed, step, objective.code, examples, reading), 1.0

    def _objective(self, index: int) -> Objective:
        if self._space is None:
            raise ValueError("no space")
        return self._space.objectives[index]

    def _split_dev(self) -> tuple[Int64, Int64]:
        everything = np.arange(self._dev)
        if self._settings.meta_dev_fraction == 0.0:
            return everything, everything
        order = randomness.generator(self._settings.seed, randomness.DEV).permutation(len(everything))
        if len(everything) < 3:
            raise UserError(f"method.meta_dev_fraction: dev has {len(everything)} texts, too few to set some aside")
        count = min(max(2, round(self._settings.meta_dev_fraction * len(everything))), len(everything) - 1)
        return np.sort(everything[order[:count]]), np.sort(everything[order[count:]])
