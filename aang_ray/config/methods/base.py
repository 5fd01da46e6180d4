"""What the configurations of all methods share."""

from __future__ import annotations

from typing import ClassVar

from aang_ray.config.section import Section


class MethodSection(Section):
    """A method's own settings, and what the rest of the program must know about it."""

    auxiliary: ClassVar[bool]
    """Whether it trains on a space of auxiliary objectives."""
    samples_dev: ClassVar[bool] = False
    """Whether `batch.dev` and `batch.dev_head` can change its result."""
    own_direction: ClassVar[bool] = False
    """Whether the body's update is no weighted sum of the losses' gradients."""

    @property
    def uses_dev(self) -> bool:
        """Whether a step computes the dev head and the dev gradient."""
        return False

    @property
    def pretraining_steps(self) -> int:
        """Optimiser steps of the stages before the one that learns the end task."""
        return 0

    @property
    def pretraining_texts(self) -> int:
        """Texts that those steps put through the body."""
        return 0
