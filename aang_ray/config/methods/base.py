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

    @property
    def uses_dev(self) -> bool:
        """Whether a step computes the dev head and the dev gradient."""
        return False
