"""Chance inside a method, as a pure function of (seed, step)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from aang_ray.objectives import randomness


@contextmanager
def seeded(seed: int, step: int, device: torch.device) -> Iterator[None]:
    """Torch's random numbers start anew from (seed, step) inside, and go on as before outside.

    So a resumed run, and every worker, draws what an uninterrupted single one draws.
    """
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(int(randomness.keys(seed, step, randomness.METHOD)[0] >> 1))
        yield
