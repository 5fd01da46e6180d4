"""Texts laid out in rows by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from aang_ray.model.attention import TokenInputs
from tests.model.families import VOCAB

LOWEST, HIGHEST = -1000, 1000

REPRESENTATIONS = ("bidirectional", "left-to-right", "right-to-left", "random-factorized", "first token last")
_SHUFFLED = (0, 5, 2, 7, 4, 1, 6, 3, 9, 8)


@dataclass(frozen=True)
class Text:
    ids: tuple[int, ...]
    ranks: tuple[int, ...]
    key_ranks: tuple[int, ...] | None = None
    positions: tuple[int, ...] | None = None


def text(ids: Sequence[int], representation: str = "bidirectional") -> Text:
    """A text under a representation; ranked as in docs/semantics.md, section 2, step 5."""
    length = len(ids)
    ranks = {
        "bidirectional": [0] * length,
        "left-to-right": [LOWEST, *range(1, length)],
        "right-to-left": [LOWEST, *range(length - 1, 0, -1)],
        "random-factorized": [LOWEST, *_SHUFFLED[1:length]],
        "first token last": [HIGHEST, *_SHUFFLED[1:length]],
    }[representation]
    return Text(tuple(ids), tuple(ranks))


def random_ids(length: int, seed: int = 0) -> list[int]:
    """Random ids that are special tokens in no family."""
    return torch.randint(5, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def lay_out(rows: Sequence[Sequence[Text]], width: int, pad_id: int = 0) -> TokenInputs:
    """Lay out each row's texts one after another, followed by padding."""
    columns: dict[str, list[list[int]]] = {name: [] for name in ("ids", "positions", "ranks", "keys", "texts")}
    firsts: list[int] = []
    lengths: list[int] = []
    for index, row in enumerate(rows):
        ids: list[int] = []
        positions: list[int] = []
        ranks: list[int] = []
        keys: list[int] = []
        texts: list[int] = []
        for item in row:
            firsts.append(index * width + len(ids))
            texts += [len(lengths)] * len(item.ids)
            lengths.append(len(item.ids))
            ids += item.ids
            positions += item.positions or range(len(item.ids))
            ranks += item.ranks
            keys += item.key_ranks or item.ranks
        rest = width - len(ids)
        columns["ids"].append(ids + [pad_id] * rest)
        columns["positions"].append(positions + [0] * rest)
        columns["ranks"].append(ranks + [0] * rest)
        columns["keys"].append(keys + [0] * rest)
        columns["texts"].append(texts + [-1] * rest)
    return TokenInputs(
        ids_RL=torch.tensor(columns["ids"]),
        positions_RL=torch.tensor(columns["positions"]),
        ranks_RL=torch.tensor(columns["ranks"], dtype=torch.int32),
        key_ranks_RL=torch.tensor(columns["keys"], dtype=torch.int32),
        texts_RL=torch.tensor(columns["texts"], dtype=torch.int32),
        first_E=torch.tensor(firsts),
        lengths_E=torch.tensor(lengths),
    )
