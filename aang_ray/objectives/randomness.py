"""Random numbers as a pure function of (seed, step, objective, example, purpose), and not of a random stream.

The output function of SplitMix64 (Steele, Lea, Flood 2014) is applied to a key that folds in every coordinate.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

U64 = npt.NDArray[np.uint64]

_GOLDEN: Final = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLY_1: Final = np.uint64(0xBF58476D1CE4E5B9)
_MULTIPLY_2: Final = np.uint64(0x94D049BB133111EB)

# The purpose is the last coordinate, so that two purposes never share a number. Never renumber: results depend on it.
SELECT, COUNT, OPERATION, REPLACEMENT, ORDER, EPOCH, DRAW, REST, DEV, DEV_HEAD, PUBLISHED, METHOD = range(1, 13)
SPAN_LENGTH, SPAN_TURN, NOISE = range(13, 16)
FREE = 1000
"""The first purpose that primitives in a user's file may use; lower ones are reserved."""


def _mix(x: U64) -> U64:
    x = (x ^ (x >> np.uint64(30))) * _MULTIPLY_1
    x = (x ^ (x >> np.uint64(27))) * _MULTIPLY_2
    return x ^ (x >> np.uint64(31))


def keys(*coordinates: int | npt.NDArray[np.integer]) -> U64:
    """Fold integers, or integer arrays that broadcast against each other, into 64-bit keys, at least one."""
    key = np.zeros(1, dtype=np.uint64)
    with np.errstate(over="ignore"):
        for coordinate in coordinates:
            value = np.atleast_1d(np.asarray(coordinate)).astype(np.uint64)
            key = _mix(key * _MULTIPLY_2 + _mix(value + _GOLDEN) + _GOLDEN)
    return key


def uniform(*coordinates: int | npt.NDArray[np.integer]) -> npt.NDArray[np.float64]:
    """Return uniform numbers in [0, 1) with 53 random bits, one for each element of the broadcast coordinates."""
    return (keys(*coordinates) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def generator(*coordinates: int) -> np.random.Generator:
    """Return a generator that starts from the key of the coordinates, for permutations and other draws over sets."""
    return np.random.Generator(np.random.Philox(key=int(keys(*coordinates)[0])))
