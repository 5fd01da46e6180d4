"""Which combinations of primitives are objectives at all.

Rules are keyed by (stage, name), never by a name alone: `end-task` is both a kind of data and an
output. (semantics section 1)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from aang_ray.config.section import Semantics
from aang_ray.objectives.objective import Objective


@dataclass(frozen=True)
class Rule:
    """What rules an objective out, and why."""

    reason: str
    forbids: Callable[[Objective], bool]
    published: bool
    """Whether the rule holds in `published` semantics, too."""


@dataclass(frozen=True)
class Capabilities:
    """What an end task and an encoder can do for the objectives."""

    positions_given: bool = True
    """Tokens can be given position ids of their own."""
    corpora: frozenset[str] = frozenset({"in-domain", "out-of-domain"})
    """Unlabelled text that is there."""
    queries: bool = True
    """Appended queries see by rank; the released code's visibility knows nothing of them."""


RULES: tuple[Rule, ...] = (
    Rule(
        "an end-task label needs the end task's data",
        lambda k: k.output == "end-task" and k.data != "end-task",
        published=True,
    ),
    Rule(
        "the label of a text needs a representation that reads all of it",
        lambda k: k.output == "end-task" and k.representation in {"left-to-right", "right-to-left"},
        published=True,
    ),
    Rule(
        "denoising an input that nothing corrupted and every position sees is copying",
        lambda k: (k.transform, k.representation, k.output) == ("no-op", "bidirectional", "denoise"),
        published=False,
    ),
)


def ruled_out(objective: Objective, semantics: Semantics, rules: Sequence[Rule] = RULES) -> str | None:
    """Why the objective is illegal, or None."""
    for rule in rules:
        if (semantics == "sound" or rule.published) and rule.forbids(objective):
            return rule.reason
    return None


def unavailable(objective: Objective, capabilities: Capabilities, labels: Semantics) -> str | None:
    """Why a legal objective cannot be computed for this end task and encoder, or None."""
    if objective.data != "end-task" and objective.data not in capabilities.corpora:
        return f"no {objective.data} text is given (data.{objective.data.replace('-', '_')})"
    queries = (objective.transform, objective.representation, objective.output) == (
        "no-op",
        "random-factorized",
        "denoise",
    )
    if queries and labels == "sound" and not capabilities.positions_given:
        return "its queries need an encoder whose position ids can be given"
    if queries and labels == "sound" and not capabilities.queries:
        return "its queries need sound visibility (objectives.visibility), or objectives.labels: published"
    return None
