"""Which rows of a tied table each worker looks up in a step, so that the joint gradient's norm can be exact.

The table's part of the update also holds what it did as decoder, which counts in no score. So the lookups' part of
the joint gradient is summed up apart: only the rows that several workers look up have to be sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from aang_ray.gradients.engine import JointRows

Entries = npt.NDArray[np.int64]


@dataclass(frozen=True)
class RowPlan:
    """Rows of one worker: first those that others look up, too, in the same order on all; then its own."""

    place_V: Entries
    shared: int
    rows: int

    @classmethod
    def of(cls, entries: Sequence[Entries], rank: int, size: int) -> RowPlan:
        """From the entries, each once, that the objectives of every worker look up in a table of so many rows."""
        users_V = np.bincount(np.concatenate(entries), minlength=size)
        shared = np.flatnonzero(users_V > 1)
        own = entries[rank][users_V[entries[rank]] == 1]
        rows = len(shared) + len(own)
        place_V = np.full(size, rows, dtype=np.int64)
        place_V[np.concatenate((shared, own))] = np.arange(rows)
        return cls(place_V, len(shared), rows)

    def wanted(self, table: nn.Parameter) -> JointRows:
        """For the engine."""
        place_V = torch.from_numpy(self.place_V)
        if table.is_cuda:
            place_V = place_V.pin_memory()
        return JointRows(table, place_V.to(table.device, non_blocking=True), self.rows)
