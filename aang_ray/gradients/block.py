"""A run of entries of one parameter: it takes one segment's gradient after the other.

Shape suffix: B entries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Block:
    """A run of entries of one parameter, flattened, and where its numbers go."""

    update: Tensor
    targets: Sequence[Tensor]
    """For each segment, what takes c_s times its gradient."""
    coefficients: Sequence[Tensor]
    held: Mapping[int, Tensor]
    """Where the gradients of segments go that are not complete yet."""
    kept: Mapping[int, Tensor]
    """Where the gradients of complete segments go that are asked for themselves."""
    v_B: Tensor | None
    """The dev gradient; None until segment 0 is added."""
    norms: list[list[Tensor]]
    dots: list[list[Tensor]]
    joint: tuple[Tensor, list[Tensor]] | None
    """Where the joint gradient is summed up for its own norm before it joins the update, and the norms."""

    def add(self, segment: int, gradient_B: Tensor) -> None:
        """One segment's gradient; segment 0 comes before the others."""
        target = self.targets[segment]
        target.addcmul_(gradient_B.to(target.dtype), self.coefficients[segment])
        if segment in self.kept:
            self.kept[segment].add_(gradient_B)
        held = self.held.get(segment)
        if held is not None:
            held += gradient_B
            return
        if segment == 0:
            self.v_B = gradient_B.clone()
        self.norms[segment].append(torch.dot(gradient_B, gradient_B))
        if self.v_B is not None:
            self.dots[segment].append(torch.dot(gradient_B, self.v_B))

    def finish(self) -> None:
        """All segments are added."""
        if self.joint is not None:
            joint, norms = self.joint
            norms.append(torch.dot(joint, joint))
            self.update.add_(joint)
