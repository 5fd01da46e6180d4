"""Outputs that ask for tokens. (semantics section 2.6)

| transform · representation | denoise | next-token |
|---|---|---|
| mask, replace, bert-op, noised-embeddings, span-mask · any | the selected positions' own tokens | the next tokens |
| deletion · any | before each gap, the first token that is gone | the next tokens |
| no-op · left-to-right | as next-token | at every position the next token |
| no-op · right-to-left | as next-token | at every position the previous token |
| no-op · random-factorized | as next-token | at each selected target's query the target |
| no-op · bidirectional (`published` legality only) | the selected positions' own, visible tokens | the next tokens |

Tokens are always those before T. `labels: published`: denoising no-op always labels the selected positions with their
own, unchanged tokens. Denoising what was only noised has a floor below ln V: as much as the noise leaves to be seen.
"""

from __future__ import annotations

import numpy as np

from aang_ray.objectives.legality import Rule
from aang_ray.objectives.outputs import Head, Labels, Output, View

ORDERED = frozenset({"left-to-right", "right-to-left", "random-factorized"})
"""Representations under which a row does not see the token that comes next."""


def _denoise(view: View) -> Labels:
    k = view.objective
    if k.transform == "no-op" and k.representation in ORDERED and view.labels == "sound":
        return _next_token(view)
    before_T = np.concatenate(([True], view.kept_T[:-1]))
    asked = np.flatnonzero(view.selected_T & (view.kept_T | before_T))
    return Labels(view.original.ids_T[asked], view.row_T[asked])


def _next_token(view: View) -> Labels:
    ids_T, text_T = view.original.ids_T, view.original.text_T
    representation = view.objective.representation
    if representation == "random-factorized":
        asked = np.flatnonzero(view.selected_T)
        return Labels(ids_T[asked], view.row_T[asked], by_queries=True)
    shift = -1 if representation == "right-to-left" else 1
    target_of = np.arange(len(ids_T)) + shift
    inside = (target_of >= 0) & (target_of < len(ids_T))
    clipped = np.clip(target_of, 0, max(len(ids_T) - 1, 0))
    asked = np.flatnonzero(inside & (text_T[clipped] == text_T) & view.real_T[clipped] & view.kept_T)
    return Labels(ids_T[asked + shift], view.row_T[asked])


DENOISE = Output(
    "denoise",
    Head("vocabulary"),
    _denoise,
    rules=(
        Rule(
            "denoising an input that nothing corrupted and every position sees is copying",
            lambda k: k.transform == "no-op" and k.representation not in ORDERED,
            published=False,
        ),
    ),
)
NEXT_TOKEN = Output(
    "next-token",
    Head("vocabulary"),
    _next_token,
    rules=(
        Rule(
            "under this representation the next token is seen: predicting it is copying",
            lambda k: k.representation not in ORDERED,
            published=False,
        ),
        Rule(
            "under a random order the next token is asked of intact text; of corrupted text that is denoising",
            lambda k: k.representation == "random-factorized" and k.transform != "no-op",
        ),
    ),
)
