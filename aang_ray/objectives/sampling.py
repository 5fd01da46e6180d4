"""Which objectives a step trains, and which examples they get.

Everything is a pure function of (seed, step): a worker, or a resumed run, computes it without being told.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from aang_ray.objectives import randomness
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
