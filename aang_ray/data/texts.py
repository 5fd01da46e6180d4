"""Texts and labels as read, before they become tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from aang_ray.data.duplicates import normalised

Split = Literal["train", "dev", "test"]
SPLITS: tuple[Split, ...] = ("train", "dev", "test")


@dataclass(frozen=True)
class Texts:
    """N texts, or N pairs of texts."""

    first: Sequence[str]
    second: Sequence[str] | None = None

    def __len__(self) -> int:
        return len(self.first)

    def keys(self) -> list[str]:
        """What each text, or pair, is compared by."""
        if self.second is None:
            return [normalised(text) for text in self.first]
        return [f"{normalised(a)}\x1f{normalised(b)}" for a, b in zip(self.first, self.second, strict=True)]

    def passages(self) -> list[str]:
        """Each text as unlabelled text; the texts of a pair are joined by a space."""
        if self.second is None:
            return list(self.first)
        return [f"{a} {b}" for a, b in zip(self.first, self.second, strict=True)]

    def sides(self) -> Iterable[str]:
        """Every text of every pair, and the pairs as passages."""
        yield from self.passages()
        if self.second is not None:
            yield from self.first
            yield from self.second

    def take(self, indices: Iterable[int]) -> Texts:
        """The chosen texts."""
        chosen = list(indices)
        second = None if self.second is None else [self.second[i] for i in chosen]
        return Texts([self.first[i] for i in chosen], second)


@dataclass(frozen=True)
class LabelledTexts:
    """A split as read, with the place of every row for messages about it."""

    texts: Texts
    labels: Sequence[str]
    where: str
    rows: Sequence[int]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Iterable[int]) -> LabelledTexts:
        """The chosen examples."""
        chosen = list(indices)
        labels, rows = [self.labels[i] for i in chosen], [self.rows[i] for i in chosen]
        return LabelledTexts(self.texts.take(chosen), labels, self.where, rows)


@dataclass(frozen=True)
class RawTask:
    """An end task as read: its splits, and the unlabelled text that its source brings along."""

    splits: dict[Split, LabelledTexts]
    method: str
    """How the splits came about."""
    in_domain: Sequence[str] | None = None
