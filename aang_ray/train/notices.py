"""What a run hears from outside its own process's signals: that its machine goes away, or that nobody waits for it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Notices:
    """Set by another thread at any moment, and looked at between two steps."""

    draining: bool = False
    """The machine goes away soon: keep the checkpoint fresh."""
    stop: bool = False
    """Whoever started the run has gone: write the checkpoint and end."""
    until: int | None = None
    """Write the checkpoint and end after this step: a scheduler decides whether the run goes on from there."""
