"""Which objectives a step trains, and which examples they get.

Everything is a pure function of (seed, step): a worker, or a resumed run, computes it without being told.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from aang_ray.errors import UserError
from aang_ray.objectives import randomness
from aang_ray.objectives.objective import Objective
from aang_ray.objectives.space import Space
from aang_ray.objectives.texts import Int64


def draw_objectives(size: int, n: int, seed: int, step: int) -> tuple[int, ...]:
    """S: n distinct indices below `size`, uniformly, in ascending order. (semantics section 2.1)"""
    chosen = randomness.generator(seed, step, randomness.DRAW).choice(size, size=min(n, size), replace=False)
    return tuple(sorted(int(index) for index in chosen))


def equal_shares(batch: int, n: int, seed: int, step: int) -> tuple[int, ...]:
    """floor(batch / n) examples each; the remainder's turn rotates with (seed, step)."""
    share, rest = divmod(batch, n)
    turn = (int(randomness.keys(seed, randomness.REST)[0] % np.uint64(n)) + step * rest) % n
    return tuple(share + (1 if (index - turn) % n < rest else 0) for index in range(n))


@lru_cache(maxsize=128)
def _epoch_order(size: int, seed: int, code: int, epoch: int) -> npt.NDArray[np.int32]:
    """An epoch's order; kept, because an epoch over a large corpus lasts many steps."""
    order = randomness.generator(seed, code, epoch, randomness.EPOCH).permutation(size).astype(np.int32)
    order.setflags(write=False)
    return order


def epoch_examples(size: int, start: int, count: int, seed: int, code: int) -> Int64:
    """Examples number start to start + count of an endless reading without replacement within an epoch.

    Epoch e reads the `size` examples in an order of its own, keyed by (seed, code, e).
    """
    wanted = np.arange(start, start + count)
    result = np.empty(count, dtype=np.int64)
    for epoch in range(start // size, (start + count - 1) // size + 1):
        inside = wanted // size == epoch
        result[inside] = _epoch_order(size, seed, code, epoch)[wanted[inside] % size]
    return result


class Cursors:
    """How many examples each objective has read before a step.

    A function of (seed, step) that is summed up as steps go by; `advance_to` replays what it missed.
    """

    def __init__(self, size: int, n: int, batch: int, seed: int) -> None:
        self.size, self.n, self.batch, self.seed = size, min(n, size), batch, seed
        self._step = 0
        self._read = np.zeros(size, dtype=np.int64)

    def draw(self, step: int) -> tuple[int, ...]:
        """The objectives of a step."""
        return draw_objectives(self.size, self.n, self.seed, step)

    def at(self, step: int) -> list[tuple[int, int, int]]:
        """(objective, examples read before, examples now) for every objective of the step."""
        if step < self._step:
            self._step, self._read = 0, np.zeros(self.size, dtype=np.int64)
        while self._step < step:
            for objective, count in self._shares(self._step):
                self._read[objective] += count
            self._step += 1
        return [(objective, int(self._read[objective]), count) for objective, count in self._shares(step)]

    def _shares(self, step: int) -> Sequence[tuple[int, int]]:
        sampled = self.draw(step)
        return list(zip(sampled, equal_shares(self.batch, len(sampled), self.seed, step), strict=True))


# --- objectives.allocation: How the released code splits the auxiliary batch over the sampled objectives.
#
# `allocation: published` (semantics section 2.3): B is split ceil(B * softmax R) over the sampled
# representations, then ceil(. * softmax D) over the data, drawn with replacement; each transform gets a
# random subset ceil(. * softmax T) of the same examples; outputs share the batch. Softmaxes run over
# what was sampled together.


Share = tuple[int, Int64, randomness.U64, float]
"""(objective, examples, keys of randomness, b / B)."""


def published_shares(
    space: Space,
    sampled: Sequence[int],
    factors: Mapping[str, npt.NDArray[np.float64]],
    sizes: Mapping[str, int],
    batch: int,
    seed: int,
    step: int,
) -> list[Share]:
    """The examples of every sampled objective, in the order of `sampled`; `sizes`: texts of each kind of data."""
    names = space.factors()
    objectives = {index: space.objectives[index] for index in sampled}
    shares: dict[int, Share] = {}

    def split(total: int, letter: str, choices: Iterable[str]) -> dict[str, int]:
        distinct = list(dict.fromkeys(choices))
        logits = np.array([factors[letter][names[letter].index(name)] for name in distinct])
        parts = np.exp(logits - logits.max())
        parts /= parts.sum()
        # Rounding noise must not push an exact product over the next integer.
        return {name: math.ceil(total * part - 1e-9) for name, part in zip(distinct, parts, strict=True)}

    for representation, count_r in split(batch, "R", (k.representation for k in objectives.values())).items():
        of_r = {i: k for i, k in objectives.items() if k.representation == representation}
        for data, count_d in split(count_r, "D", (k.data for k in of_r.values())).items():
            of_d = {i: k for i, k in of_r.items() if k.data == data}
            code = _code(data, representation)
            examples = randomness.generator(seed, step, code, randomness.PUBLISHED).integers(sizes[data], size=count_d)
            for transform, count_t in split(count_d, "T", (k.transform for k in of_d.values())).items():
                code_t = _code(data, representation, transform)
                order = randomness.generator(seed, step, code_t, randomness.PUBLISHED).permutation(count_d)[:count_t]
                keys = randomness.keys(seed, step, code_t, order)
                for index in (i for i, k in of_d.items() if k.transform == transform):
                    shares[index] = (index, examples[order], keys, count_t / batch)
    return [shares[index] for index in sampled]


def _code(data: str, representation: str, transform: str = "") -> int:
    return Objective(data, transform, representation, "").code


# --- objectives.readings: Which examples every part of a step reads, whatever the examples are: a pure function of (seed, step).


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
