"""O: from an objective and its texts to inputs with labels. (semantics sections 2.4 to 2.6)

| transform · representation · denoise | labels |
|---|---|
| mask, replace, bert-op · any | the selected positions' own tokens |
| no-op · left-to-right | at every position the next token |
| no-op · right-to-left | at every position the previous token |
| no-op · random-factorized | at each of the selected targets' queries the target |
| no-op · bidirectional (`published` legality only) | the selected positions' own, visible tokens |

`labels: published`: no-op always labels the selected positions with their own, unchanged tokens.
The `end-task` output labels each text with its class, whatever corrupted it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from aang_ray.config.section import Semantics
from aang_ray.objectives import visibility
from aang_ray.objectives.objective import Objective
from aang_ray.objectives.segment import Segment
from aang_ray.objectives.transforms import Bool, Int32, Int64, Texts, Vocabulary, corrupt, select


@dataclass(frozen=True)
class OutputSettings:
    """Switches that decide inputs and labels."""

    mask_rate: float
    labels: Semantics
    pooling: str
    """`first` or `mean`: whether the first token carries the text's label."""


def plain(name: str, head: str, texts: Texts, classes_E: Int64) -> Segment:
    """Uncorrupted texts with their classes: the end task itself, and the dev batch."""
    zeros = np.zeros(len(texts.ids_T), dtype=np.int32)
    return _segment(name, head, texts, texts.ids_T, zeros, classes_E=classes_E)


def build(
    objective: Objective,
    head: str,
    texts: Texts,
    classes_E: Int64 | None,
    vocabulary: Vocabulary,
    settings: OutputSettings,
) -> Segment:
    """The objective's inputs and labels on these texts."""
    real_T = vocabulary.real(texts.ids_T)
    selected_T = select(texts, real_T, settings.mask_rate)
    ids_T = corrupt(objective.transform, texts, selected_T, vocabulary)
    if objective.output == "end-task":
        first = visibility.HIGHEST if settings.pooling == "first" else None
        ranks_T = visibility.ranks(objective.representation, texts, first)
        return _segment(
            objective.key, head, texts, ids_T, ranks_T, classes_E=classes_E, representation=objective.representation
        )
    ranks_T = visibility.ranks(objective.representation, texts, visibility.LOWEST)
    if objective.transform == "no-op" and settings.labels == "sound":
        if objective.representation == "random-factorized":
            return _with_queries(objective, head, texts, ranks_T, selected_T, vocabulary)
        if objective.representation in {"left-to-right", "right-to-left"}:
            labelled_M, targets_M = _neighbours(objective.representation, texts, real_T)
            return _segment(
                objective.key,
                head,
                texts,
                ids_T,
                ranks_T,
                labelled_M,
                targets_M,
                representation=objective.representation,
            )
    labelled_M = np.flatnonzero(selected_T)
    return _segment(
        objective.key,
        head,
        texts,
        ids_T,
        ranks_T,
        labelled_M,
        texts.ids_T[labelled_M],
        representation=objective.representation,
    )


def _neighbours(representation: str, texts: Texts, real_T: Bool) -> tuple[Int64, Int32]:
    """Positions and targets of next-token (left-to-right) and previous-token (right-to-left) prediction."""
    text_T = texts.text_T
    shift = 1 if representation == "left-to-right" else -1
    target_of = np.arange(len(text_T)) + shift
    inside = (target_of >= 0) & (target_of < len(text_T))
    clipped = np.clip(target_of, 0, max(len(text_T) - 1, 0))
    labelled_M = np.flatnonzero(inside & (text_T[clipped] == text_T) & real_T[clipped])
    return labelled_M, texts.ids_T[labelled_M + shift]


def _with_queries(
    objective: Objective, head: str, texts: Texts, ranks_T: Int32, selected_T: Bool, vocabulary: Vocabulary
) -> Segment:
    """Append to each text one mask-token query a target, with the target's position.

    A query sees the first token, itself and content of strictly lower rank than its target; nobody
    sees it. Content ranks are even, so target rank - 1 lies strictly between.
    """
    targets = np.flatnonzero(selected_T)
    text_T, text_M = texts.text_T, texts.text_T[targets]
    order = np.argsort(np.concatenate((text_T, text_M)), kind="stable")  # content first, then its queries

    def interleave(content: Int32, queries: Int32) -> Int32:
        return np.concatenate((content, queries))[order].astype(np.int32)

    ids = interleave(texts.ids_T, np.full(len(targets), vocabulary.mask_id, dtype=np.int32))
    key_ranks = interleave(ranks_T, np.full(len(targets), visibility.HIGHEST, dtype=np.int32))
    query_ranks = interleave(ranks_T, ranks_T[targets] - 1)
    positions = np.concatenate((texts.positions_T, texts.positions_T[targets]))[order]
    is_query = np.concatenate((np.zeros(len(text_T), dtype=np.bool_), np.ones(len(targets), dtype=np.bool_)))[order]
    return Segment(
        name=objective.key,
        head=head,
        ids_T=ids,
        positions_T=positions,
        ranks_T=query_ranks,
        key_ranks_T=key_ranks,
        lengths_E=texts.lengths_E + np.bincount(text_M, minlength=len(texts.lengths_E)),
        labelled_M=np.flatnonzero(is_query),
        targets_M=texts.ids_T[targets],
        classes_E=None,
        representation=objective.representation,
        normaliser=float(len(targets)),
    )


def _segment(
    name: str,
    head: str,
    texts: Texts,
    ids_T: Int32,
    ranks_T: Int32,
    labelled_M: Int64 | None = None,
    targets_M: Int32 | None = None,
    classes_E: Int64 | None = None,
    representation: str | None = None,
) -> Segment:
    labels = len(texts.lengths_E) if labelled_M is None else len(labelled_M)
    return Segment(
        name=name,
        head=head,
        ids_T=ids_T,
        positions_T=texts.positions_T,
        ranks_T=ranks_T,
        key_ranks_T=ranks_T,
        lengths_E=texts.lengths_E,
        labelled_M=np.zeros(0, dtype=np.int64) if labelled_M is None else labelled_M,
        targets_M=np.zeros(0, dtype=np.int32) if targets_M is None else targets_M,
        classes_E=classes_E,
        representation=representation,
        normaliser=float(labels),
    )
