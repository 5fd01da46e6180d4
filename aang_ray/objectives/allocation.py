"""How the released code splits the auxiliary batch over the sampled objectives.

`allocation: published` (semantics section 2.3): B is split ceil(B * softmax R) over the sampled
representations, then ceil(. * softmax D) over the data, drawn with replacement; each transform gets a
random subset ceil(. * softmax T) of the same examples; outputs share the batch. Softmaxes run over
what was sampled together.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from aang_ray.objectives import randomness
from aang_ray.objectives.objective import Objective
from aang_ray.objectives.space import Space
from aang_ray.objectives.texts import Int64

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
