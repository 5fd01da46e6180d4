"""Randomness as a pure function of (seed, step, objective, example), never of a stream.

Whatever computes an example, in whatever order, on whatever worker, draws the same numbers.
Numbers come from SplitMix64 (Steele, Lea, Flood 2014): its output function applied to a key that
folds in every coordinate; vectorised over tokens.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

U64 = npt.NDArray[np.uint64]

_GOLDEN: Final = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLY_1: Final = np.uint64(0xBF58476D1CE4E5B9)
_MULTIPLY_2: Final = np.uint64(0x94D049BB133111EB)

# What a number is drawn for; two purposes never share a number.
SELECT, COUNT, OPERATION, REPLACEMENT, ORDER, EPOCH, DRAW, REST, DEV, DEV_HEAD, PUBLISHED, METHOD = range(1, 13)
SPAN_LENGTH, SPAN_TURN, NOISE = range(13, 16)
FREE = 1000
"""From here on numbers are for primitives that are not built in."""


def _mix(x: U64) -> U64:
    x = (x ^ (x >> np.uint64(30))) * _MULTIPLY_1
    x = (x ^ (x >> np.uint64(27))) * _MULTIPLY_2
    return x ^ (x >> np.uint64(31))


def keys(*coordinates: int | npt.NDArray[np.integer]) -> U64:
    """Fold coordinates (integers, or arrays of them that broadcast) into 64-bit keys."""
    key = np.zeros(1, dtype=np.uint64)
    with np.errstate(over="ignore"):
        for coordinate in coordinates:
            value = np.atleast_1d(np.asarray(coordinate)).astype(np.uint64)
            key = _mix(key * _MULTIPLY_2 + _mix(value + _GOLDEN) + _GOLDEN)
    return key


def uniform(*coordinates: int | npt.NDArray[np.integer]) -> npt.NDArray[np.float64]:
    """Numbers in [0, 1) with 53 bits, one for each broadcast element of the coordinates."""
    return (keys(*coordinates) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def generator(*coordinates: int) -> np.random.Generator:
    """NumPy's own generator for draws over whole sets, keyed by the coordinates."""
    return np.random.Generator(np.random.Philox(key=int(keys(*coordinates)[0])))
