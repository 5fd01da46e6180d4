"""One auxiliary objective, a choice at each of the four stages, and the rules that forbid a choice."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

from aang_ray.config.sections import Semantics

STAGES: Final = ("data", "transform", "representation", "output")
"""Input data, input transformation, representation, output (Dery et al. 2023, section 3)."""

EXTERNAL: Final = "external:"
"""Prefix of data that are another, labelled data set: `external:NAME`."""


@dataclass(frozen=True, order=True)
class Objective:
    """k = (d, t, r, o): the names of its primitives."""

    data: str
    transform: str
    representation: str
    output: str

    @property
    def key(self) -> str:
        """Return the name in files and logs, such as `end-task/mask/bidirectional/denoise`."""
        return "/".join(self.stages)

    @property
    def stages(self) -> tuple[str, str, str, str]:
        """Return the four names, in the order of `STAGES`."""
        return (self.data, self.transform, self.representation, self.output)

    @property
    def code(self) -> int:
        """Return a 64-bit hash of the key: the objective's coordinate in `randomness`."""
        return int.from_bytes(hashlib.blake2b(self.key.encode(), digest_size=8).digest(), "little")

    def title(self, task: str = "end-task") -> str:
        """Return the name for people, such as `movie · bert-op · left-to-right · denoise`."""
        data = task if self.data == "end-task" else self.data
        return " · ".join((data, self.transform, self.representation, self.output))


@dataclass(frozen=True)
class Rule:
    """A reason why some objectives are illegal.

    Each primitive carries the rules about the objectives that contain it (docs/semantics.md, section 1). Rules about
    labels concern those that *are* tokens: the original token must not stand in the input of its row. A row that sees
    a token must still read the text to tell its frequency or capitalisation, so no rule forbids asking for these.
    """

    reason: str
    """One line for people."""
    forbids: Callable[[Objective], bool]
    published: bool = True
    """Whether the rule also holds in `published` semantics."""


def ruled_out(objective: Objective, semantics: Semantics, rules: Iterable[Rule]) -> str | None:
    """Return the reason of the first rule that forbids the objective, or None if it is legal."""
    for rule in rules:
        if (semantics == "sound" or rule.published) and rule.forbids(objective):
            return rule.reason
    return None
