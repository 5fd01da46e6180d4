"""From an objective and its texts to a segment: corrupted inputs, ranks, labels. (semantics sections 2.4 to 2.6)"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from aang_ray.config.section import Semantics
from aang_ray.objectives import randomness, visibility
from aang_ray.objectives.contracts import check_corrupted, check_labels, check_selected
from aang_ray.objectives.noise import Noise
from aang_ray.objectives.objective import Objective
from aang_ray.objectives.outputs import Labels, View
from aang_ray.objectives.primitives import BUILT_IN, Primitives
from aang_ray.objectives.segment import Drawn, Segment
from aang_ray.objectives.texts import Bool, Int32, Int64, Texts, Vocabulary
from aang_ray.objectives.transforms import Corrupted, remaining


@dataclass(frozen=True)
class OutputSettings:
    """Switches that decide inputs and labels."""

    mask_rate: float
    labels: Semantics
    pooling: str
    """`first` or `mean`: whether the first token carries the text's label."""
    noise: Noise | None = None
    """For noised embeddings."""


def plain(name: str, head: str, texts: Texts, classes_E: Int64) -> Segment:
    """Uncorrupted texts with their classes: the end task itself, and the dev batch."""
    return replace(_unlabelled(name, head, texts), classes_E=classes_E, normaliser=float(len(texts.lengths_E)))


def build(
    objective: Objective,
    head: str,
    texts: Texts,
    classes_E: Int64 | None,
    vocabulary: Vocabulary,
    settings: OutputSettings,
    primitives: Primitives = BUILT_IN,
    fitted: Any = None,
) -> Segment:
    """The objective's inputs and labels on these texts; `fitted`: what its output's `fit` returned.

    Raises:
        UserError: if a primitive breaks its contract: those of a user's file are not of this program.
    """
    transform = primitives.transforms[objective.transform]
    representation = primitives.representations[objective.representation]
    output = primitives.outputs[objective.output]
    real_T = vocabulary.real(texts.ids_T)
    selected_T = transform.select(texts, real_T, settings.mask_rate)
    check_selected(transform, selected_T, len(real_T))
    corrupted = transform.corrupt(texts, selected_T, vocabulary)
    check_corrupted(transform, corrupted, real_T, vocabulary.size)
    kept_T = np.ones(len(real_T), dtype=np.bool_) if corrupted.kept_T is None else corrupted.kept_T
    view = View(objective, texts, real_T, selected_T, kept_T, vocabulary, settings.labels, classes_E, fitted)
    labels = output.label(view)
    check_labels(output, labels, view)
    read = remaining(texts, corrupted)
    first: int | None = visibility.LOWEST
    if output.head.kind == "text":
        first = visibility.HIGHEST if settings.pooling == "first" else None
    ranks_T = visibility.ranks(representation, read, first)
    segment = _unlabelled(objective.key, head, read, ranks_T, objective.representation)
    segment = _noised(segment, view, corrupted, settings.noise)
    if labels.drawn_T is not None:
        segment = _drawn(segment, view, labels.drawn_T & kept_T)
    if labels.by_queries:
        return _with_queries(segment, labels, vocabulary)
    return _labelled(segment, labels, of_end_task=objective.output == "end-task")


def _labelled(segment: Segment, labels: Labels, of_end_task: bool) -> Segment:
    normaliser = float(len(labels.targets))
    if labels.at_M is None:
        return replace(segment, classes_E=labels.targets, normaliser=normaliser, weighted=of_end_task)
    return replace(segment, labelled_M=labels.at_M, targets_M=labels.targets, normaliser=normaliser)


def _noised(segment: Segment, view: View, corrupted: Corrupted, noise: Noise | None) -> Segment:
    if corrupted.noised_T is None:
        return segment
    if noise is None:
        raise ValueError("the settings say nothing of noise")
    noised_T = corrupted.noised_T & view.kept_T
    return replace(segment, noised_N=view.row_T[noised_T], noise_NW=noise.draw(view.original, noised_T))


def _drawn(segment: Segment, view: View, drawn_T: Bool) -> Segment:
    """Leave the originals in place; the samples and the labels are made on the device."""
    at_G = view.row_T[drawn_T]
    ids_T = segment.ids_T.copy()
    ids_T[at_G] = view.original.ids_T[drawn_T]
    uniform_G = view.original.uniform_T(randomness.REPLACEMENT)[drawn_T]
    return replace(segment, ids_T=ids_T, drawn=Drawn(at_G, uniform_G, view.vocabulary))


def _with_queries(segment: Segment, labels: Labels, vocabulary: Vocabulary) -> Segment:
    """Append to each text one mask-token query a target, with the target's position.

    A query sees the first token, itself and content of strictly lower rank than its target; nobody
    sees it. Content ranks are even, so target rank - 1 lies strictly between.
    """
    targets = labels.at_M
    if targets is None or len(segment.noised_N) or segment.drawn is not None:
        raise ValueError("queries ask for tokens of intact texts")
    text_T = np.repeat(np.arange(segment.texts), segment.lengths_E)
    text_M = text_T[targets]
    order = np.argsort(np.concatenate((text_T, text_M)), kind="stable")  # content first, then its queries

    def interleave(content: Int32, queries: Int32) -> Int32:
        return np.concatenate((content, queries))[order].astype(np.int32)

    is_query = np.concatenate((np.zeros(len(text_T), dtype=np.bool_), np.ones(len(targets), dtype=np.bool_)))[order]
    highest_M = np.full(len(targets), visibility.HIGHEST, dtype=np.int32)
    return replace(
        segment,
        ids_T=interleave(segment.ids_T, np.full(len(targets), vocabulary.mask_id, dtype=np.int32)),
        positions_T=np.concatenate((segment.positions_T, segment.positions_T[targets]))[order],
        ranks_T=interleave(segment.ranks_T, segment.ranks_T[targets] - 1),
        key_ranks_T=interleave(segment.key_ranks_T, highest_M),
        lengths_E=segment.lengths_E + np.bincount(text_M, minlength=segment.texts),
        labelled_M=np.flatnonzero(is_query),
        targets_M=labels.targets,
        normaliser=float(len(targets)),
    )


def _unlabelled(
    name: str, head: str, texts: Texts, ranks_T: Int32 | None = None, representation: str | None = None
) -> Segment:
    if ranks_T is None:
        ranks_T = np.zeros(len(texts.ids_T), dtype=np.int32)
    return Segment(
        name=name,
        head=head,
        ids_T=texts.ids_T,
        positions_T=texts.positions_T,
        ranks_T=ranks_T,
        key_ranks_T=ranks_T,
        lengths_E=texts.lengths_E,
        representation=representation,
    )
