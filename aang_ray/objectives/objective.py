"""One auxiliary objective: a choice at each of the four stages."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Final

STAGES: Final = ("data", "transform", "representation", "output")
"""Input data, input transformation, representation, output (Dery et al. 2023, section 3)."""


@dataclass(frozen=True, order=True)
class Objective:
    """k = (d, t, r, o)."""

    data: str
    transform: str
    representation: str
    output: str

    @property
    def key(self) -> str:
        """Stable name, the same in every space and for every end task."""
        return "/".join(self.stages)

    @property
    def stages(self) -> tuple[str, str, str, str]:
        return (self.data, self.transform, self.representation, self.output)

    @property
    def code(self) -> int:
        """64 bits that stand for the objective wherever randomness depends on it."""
        return int.from_bytes(hashlib.blake2b(self.key.encode(), digest_size=8).digest(), "little")

    def title(self, task: str = "end-task") -> str:
        """Readable name, for example `movie · bert-op · left-to-right · denoise`."""
        data = task if self.data == "end-task" else self.data
        return " · ".join((data, self.transform, self.representation, self.output))
