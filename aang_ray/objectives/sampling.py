"""Which objectives a step trains, and which examples each of them reads.

Everything is a pure function of (seed, step). (docs/semantics.md, sections 2.1 and 2.3)
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

NO_EXAMPLES: Int64 = np.zeros(0, dtype=np.int64)
"""The examples of a segment that a step leaves empty."""


@dataclass(frozen=True)
class SourceSettings:
    """Sizes of the batches, in examples, and what they hold."""

    end_task: int
    auxiliary: int
    """Examples of all sampled objectives together, B."""
    dev: int
    dev_head: int
    """Examples that phi* is fitted on."""
    seed: int
    per_objective_heads: bool = False
    head_from_train: bool = False
    """Take the dev head's examples from train (`published`) instead of dev."""
    head_refit_every: int = 1
    """Steps for which the dev head keeps its examples."""
    meta_dev_fraction: float = 0.0
    """Part of dev that is set aside for the meta part; 0: all of dev serves it and the choice of the checkpoint."""
    published_allocation: bool = False


@dataclass(frozen=True)
class Share:
    """What one sampled objective reads at a step."""

    objective: int
    """Index into the space."""
    examples: Int64
    """Indices into the objective's data."""
    keys: randomness.U64
    """Random keys, one for each example."""
    fraction: float = 1.0
    """b / B in `published` allocation; 1 in equal allocation, where it does not enter the loss."""


# Equal allocation


def draw_objectives(size: int, n: int, seed: int, step: int) -> tuple[int, ...]:
    """Draw S: min(n, size) distinct indices below `size`, uniformly, in ascending order."""
    chosen = randomness.generator(seed, step, randomness.DRAW).choice(size, size=min(n, size), replace=False)
    return tuple(sorted(int(index) for index in chosen))


def equal_shares(batch: int, n: int, seed: int, step: int) -> tuple[int, ...]:
    """Split a batch over n objectives: floor(batch / n) examples each, and the remainder in turns by (seed, step)."""
    share, rest = divmod(batch, n)
    turn = (int(randomness.keys(seed, randomness.REST)[0] % np.uint64(n)) + step * rest) % n
    return tuple(share + (1 if (index - turn) % n < rest else 0) for index in range(n))


@lru_cache(maxsize=128)
def _epoch_order(size: int, seed: int, code: int, epoch: int) -> npt.NDArray[np.int32]:
    """The order of an epoch; cached, because an epoch of a large corpus lasts many steps."""
    order = randomness.generator(seed, code, epoch, randomness.EPOCH).permutation(size).astype(np.int32)
    order.setflags(write=False)
    return order


def epoch_examples(size: int, start: int, count: int, seed: int, code: int) -> Int64:
    """Return the `count` examples after the first `start` of an endless sequence of epochs over `size` examples.

    Each epoch has an order keyed by (seed, code, epoch), where `code` is the reader's number (`Objective.code`).
    """
    wanted = np.arange(start, start + count)
    result = np.empty(count, dtype=np.int64)
    for epoch in range(start // size, (start + count - 1) // size + 1):
        inside = wanted // size == epoch
        result[inside] = _epoch_order(size, seed, code, epoch)[wanted[inside] % size]
    return result


class Cursors:
    """Counts how many examples each of `size` objectives has read before a step, of which n share a batch.

    After a jump the missed steps are replayed.
    """

    def __init__(self, size: int, n: int, batch: int, seed: int) -> None:
        self.size, self.n, self.batch, self.seed = size, min(n, size), batch, seed
        self._step = 0
        self._read = np.zeros(size, dtype=np.int64)

    def draw(self, step: int) -> tuple[int, ...]:
        """Return the objectives of a step."""
        return draw_objectives(self.size, self.n, self.seed, step)

    def at(self, step: int) -> list[tuple[int, int, int]]:
        """Return (objective, examples read before, examples to read now) for every objective of the step."""
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


# Published allocation


def published_shares(
    space: Space,
    sampled: Sequence[int],
    factors: Mapping[str, npt.NDArray[np.float64]],
    sizes: Mapping[str, int],
    batch: int,
    seed: int,
    step: int,
) -> list[Share]:
    """Split the auxiliary batch over the sampled objectives as the released code does.

    B is split ceil(B * softmax R) over the representations, each part ceil(. * softmax D) over the data, drawn with
    replacement; each transform gets a random subset of ceil(. * softmax T) of these examples, which outputs share.
    Softmaxes run over what was sampled together.

    Args:
        space: the objectives.
        sampled: those of this step.
        factors: logits by factor letter, in the order of `Space.factors()`.
        sizes: examples of each kind of data.
        batch: B.
        seed: of the run.
        step: optimiser step.
    """
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

    def drawn_for(data: str, representation: str, transform: str = "") -> np.random.Generator:
        code = Objective(data, transform, representation, "").code
        return randomness.generator(seed, step, code, randomness.PUBLISHED)

    for representation, count_r in split(batch, "R", (k.representation for k in objectives.values())).items():
        of_r = {i: k for i, k in objectives.items() if k.representation == representation}
        for data, count_d in split(count_r, "D", (k.data for k in of_r.values())).items():
            of_d = {i: k for i, k in of_r.items() if k.data == data}
            examples = drawn_for(data, representation).integers(sizes[data], size=count_d)
            for transform, count_t in split(count_d, "T", (k.transform for k in of_d.values())).items():
                order = drawn_for(data, representation, transform).permutation(count_d)[:count_t]
                code = Objective(data, transform, representation, "").code
                keys = randomness.keys(seed, step, code, order)
                for index in (i for i, k in of_d.items() if k.transform == transform):
                    shares[index] = Share(index, examples[order], keys, count_t / batch)
    return [shares[index] for index in sampled]


# All examples of a step

_END_TASK_CODE = -1
"""The end task's number as a reader of `epoch_examples`."""


class ExampleSchedule:
    """The examples of any step, whatever they are: indices into train, dev, or the data of an objective.

    Args:
        train: number of train examples of the end task.
        dev: number of dev examples.
        sizes: returns how many examples a kind of data of the space has.
        space: the auxiliary objectives, if there are any.
        n: objectives in a step.
        settings: sizes and switches.

    Raises:
        UserError: if dev is too small to set a part of it aside.
    """

    score_dev: Int64
    """Dev examples that decide which checkpoint is kept."""

    def __init__(
        self, train: int, dev: int, sizes: Callable[[str], int], space: Space | None, n: int, settings: SourceSettings
    ) -> None:
        self._train, self._sizes, self._space, self._settings = train, sizes, space, settings
        self._cursors = Cursors(len(space), n, settings.auxiliary, settings.seed) if space is not None else None
        self._meta_dev = self.score_dev = np.arange(dev)
        if settings.meta_dev_fraction:
            if dev < 3:
                raise UserError(f"method.meta_dev_fraction: dev has {dev} texts, too few to set some aside")
            count = min(max(2, round(settings.meta_dev_fraction * dev)), dev - 1)
            order = randomness.generator(settings.seed, randomness.DEV).permutation(dev)
            self._meta_dev, self.score_dev = np.sort(order[:count]), np.sort(order[count:])
        # Head and dev batch are disjoint. The head's sample comes first; of a dev that is no larger it takes half.
        meta = len(self._meta_dev)
        self._head_size = settings.dev_head if settings.dev_head < meta else meta // 2

    def end_task(self, step: int) -> Int64:
        """Return the train examples of the end task's segment."""
        count = self._settings.end_task
        return epoch_examples(self._train, step * count, count, self._settings.seed, _END_TASK_CODE)

    def dev_batch(self, step: int) -> Int64:
        """Return at most `dev` examples of dev that the step's head was not fitted on."""
        settings = self._settings
        candidates = self._meta_dev
        if not settings.head_from_train:
            candidates = np.setdiff1d(candidates, self.dev_head(step))
        order = randomness.generator(settings.seed, step, randomness.DEV).permutation(len(candidates))
        return candidates[order][: settings.dev]

    def dev_head(self, step: int) -> Int64:
        """Return the examples that phi* is fitted on: of dev, or of train with `head_from_train`."""
        settings = self._settings
        generator = randomness.generator(settings.seed, step - step % settings.head_refit_every, randomness.DEV_HEAD)
        if settings.head_from_train:
            return generator.permutation(self._train)[: settings.dev_head]
        return self._meta_dev[generator.permutation(len(self._meta_dev))][: self._head_size]

    def auxiliary(self, step: int, factors: Mapping[str, npt.NDArray[np.float64]] | None) -> list[Share]:
        """Return what each sampled objective reads; `factors`, as in `published_shares`, are for that allocation."""
        if self._cursors is None or self._space is None:
            return []
        settings, objectives = self._settings, self._space.objectives
        if settings.published_allocation:
            if factors is None:
                raise ValueError("published allocation needs the factors")
            sampled = self._cursors.draw(step)
            sizes = {data: self._sizes(data) for data in {objectives[k].data for k in sampled}}
            return published_shares(self._space, sampled, factors, sizes, settings.auxiliary, settings.seed, step)
        return [self._share(step, index, start, count) for index, start, count in self._cursors.at(step)]

    def size(self, objective: int) -> int:
        """Return the number of examples in the data of an objective, given its index."""
        assert self._space is not None
        return self._sizes(self._space.objectives[objective].data)

    def shares_of(self, number: int, objectives: Sequence[int]) -> list[Share]:
        """Return what objectives read in batch `number` of these: floor(B / n) examples each, at least one."""
        count = max(1, self._settings.auxiliary // max(1, len(objectives)))
        return [self._share(number, index, number * count, count) for index in objectives]

    def _share(self, step: int, index: int, start: int, count: int) -> Share:
        assert self._space is not None
        objective, size, seed = self._space.objectives[index], self.size(index), self._settings.seed
        examples = epoch_examples(size, start, count, seed, objective.code)
        # In a tiny data set an example may be read twice at a step: each time gets its own random key.
        epoch = np.arange(start, start + count) // size
        return Share(index, examples, randomness.keys(seed, step, objective.code, examples, epoch))
