"""Factored weights of the objectives, and the weight of the end task.

z_k = A_k + D_d + T_t + R_r + O_o, w = softmax(z restricted to S), lambda = softmax(a_E, a_X)[E];
everything starts at 0. (Dery et al. 2023, section 5; semantics section 1)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

LETTERS = ("A", "D", "T", "R", "O")


@dataclass(frozen=True)
class FactorIndex:
    """Which entries of one flat vector of factors make up each objective's logit."""

    names: Mapping[str, tuple[str, ...]]
    """Entry names by letter, in the order of the flat vector."""
    entries_K5: Tensor
    """For each objective the flat positions of its A, D, T, R and O, int64."""

    @classmethod
    def of(cls, names: Mapping[str, Sequence[str]], stages: Sequence[tuple[str, str, str, str]]) -> FactorIndex:
        """Build from entry names by letter and each objective's (d, t, r, o), in the order of A."""
        ordered = {letter: tuple(names[letter]) for letter in LETTERS}
        offsets = dict(zip(LETTERS, np.cumsum([0] + [len(ordered[letter]) for letter in LETTERS])[:-1], strict=True))
        rows = [
            [int(offsets["A"]) + k]
            + [int(offsets[letter]) + ordered[letter].index(name) for letter, name in zip("DTRO", stage, strict=True)]
            for k, stage in enumerate(stages)
        ]
        return cls(ordered, torch.tensor(rows, dtype=torch.int64))

    @property
    def size(self) -> int:
        return sum(len(entries) for entries in self.names.values())

    def split(self, flat: npt.NDArray[np.float64]) -> dict[str, npt.NDArray[np.float64]]:
        """A flat vector by letter."""
        ends = np.cumsum([len(self.names[letter]) for letter in LETTERS])[:-1]
        return dict(zip(LETTERS, np.split(flat, ends), strict=True))


def logits(flat_F: Tensor, entries_n5: Tensor) -> Tensor:
    """z of the sampled objectives, [n]."""
    return flat_F[entries_n5].sum(dim=1)


def scatter(gradient_n: Tensor, entries_n5: Tensor, size: int) -> Tensor:
    """Gradient of the flat factors from the gradient of the sampled logits.

    A_k receives dz_k; D, T, R and O receive the sum over the sampled objectives that use them; what
    was not sampled receives 0. (semantics section 3)
    """
    flat_F = torch.zeros(size, dtype=gradient_n.dtype, device=gradient_n.device)
    return flat_F.index_add(0, entries_n5.flatten(), gradient_n[:, None].expand(-1, entries_n5.shape[1]).flatten())
