"""One auxiliary objective: a choice at each of the four stages."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

from aang_ray.config.sections import Semantics

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


# --- objectives.legality: Which combinations of primitives are objectives at all.
#
# Rules are keyed by (stage, name), never by a name alone: `end-task` is both a kind of data and an output. So each
# primitive carries the rules about the objectives that it is part of. (semantics section 1)
#
# No label may be seen where it must not be. What counts is what a label *says*: an original token must not stand in
# the input of its own row, so denoising and next-token have rules. How often a token occurs in its text (TF), how rare
# it is (TF-IDF) and how it was written (capitalisation) are no tokens: a row that sees the token still has to read
# the text, or know the language, to tell. So these are asked of visible tokens, too, and no rule forbids it.


EXTERNAL = "external:"
"""Data of another, labelled data set: `external:NAME`."""
PUBLISHED = frozenset({"bidirectional", "left-to-right", "right-to-left", "random-factorized"})
"""Representations whose visibility the released code defines."""


@dataclass(frozen=True)
class Rule:
    """What rules out an objective, and why."""

    reason: str
    """One line, as a person reads it."""
    forbids: Callable[[Objective], bool]
    published: bool = True
    """Whether the rule holds in `published` semantics, too."""


@dataclass(frozen=True)
class Capabilities:
    """What an end task, an encoder and the settings can do for the objectives."""

    positions_given: bool = True
    """Tokens can be given position ids of their own."""
    data: frozenset[str] = frozenset({"end-task", "in-domain", "out-of-domain"})
    """Data that are there, by their names in a space."""
    sound_visibility: bool = True
    """Appended queries see by rank; the released code's visibility knows nothing of them."""
    shared_heads: bool = True
    """Objectives with the same output share a head."""


def ruled_out(objective: Objective, semantics: Semantics, rules: Iterable[Rule]) -> str | None:
    """Why the objective is illegal, or None."""
    for rule in rules:
        if (semantics == "sound" or rule.published) and rule.forbids(objective):
            return rule.reason
    return None


def how_to_give(data: str) -> str:
    """What a person sets to have the data."""
    if data.startswith(EXTERNAL):
        return f"list {data.removeprefix(EXTERNAL)} in data.external"
    return f"set data.{data.replace('-', '_')}"


def asks_by_queries(objective: Objective, labels: Semantics) -> bool:
    """Whether the labels are asked for at queries that are appended to the text."""
    if (objective.transform, objective.representation) != ("no-op", "random-factorized"):
        return False
    return objective.output == "next-token" or (objective.output == "denoise" and labels == "sound")


def unavailable(objective: Objective, capabilities: Capabilities, labels: Semantics) -> str | None:
    """Why a legal objective cannot be computed for this end task and encoder, or None."""
    if objective.data not in capabilities.data:
        return f"no {objective.data} text is given; {how_to_give(objective.data)}"
    if asks_by_queries(objective, labels):
        if not capabilities.positions_given:
            return "its queries need an encoder whose position ids can be given"
        if not capabilities.sound_visibility:
            return "its queries need sound visibility (objectives.visibility), or objectives.labels: published"
    if objective.representation not in PUBLISHED and not capabilities.sound_visibility:
        return "the released code has no such visibility (objectives.visibility: sound)"
    if objective.output == "real-synthetic" and not capabilities.shared_heads:
        return "its replacements come from one denoise head (objectives.heads: shared)"
    return None
