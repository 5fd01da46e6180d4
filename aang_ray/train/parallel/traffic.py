"""How many bytes a step hands to the network."""

from __future__ import annotations

from dataclasses import astuple, dataclass


@dataclass
class Traffic:
    """Bytes of the tensors that one worker summed up with the others, or sent them, in one step.

    A sum over W workers by a ring moves 2 (W - 1) / W times these bytes in and out of each of them.
    """

    body: int = 0
    """The body's update: its parameters, once."""
    heads: int = 0
    """The heads that some worker used."""
    scalars: int = 0
    """Losses, inner products and norms."""
    rows: int = 0
    """Rows of a tied table that several workers looked up, for the norm of the joint gradient."""
    parts: int = 0
    """Gradients of segments that several workers share, summed among these."""
    separate: int = 0
    """Gradients of all segments, for methods that ask for them."""
    parameters: int = 0
    """Updated parameters, sent by whoever has their optimiser state (`sharded`)."""
    control: int = 0
    """Messages between hosts."""

    @property
    def total(self) -> int:
        return sum(astuple(self))
