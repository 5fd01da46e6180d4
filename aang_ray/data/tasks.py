"""End tasks as the rest of the program sees them, and the cards of the named ones."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Generic, Literal, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from aang_ray.config import DataConfig

Metric = Literal["accuracy", "macro_f1"]
Corpus = Literal["in_domain", "out_of_domain", "neural_lm", "retrieved"]
Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Ragged:
    """N token sequences end to end, memory-mapped: sequence i is `values[offsets[i]:offsets[i + 1]]`."""

    values: Int32
    """Token ids of all sequences, [T], special tokens included."""
    offsets: Int64
    capitals: npt.NDArray[np.bool_] | None = None
    """Whether the first letter of each token is upper-case in the raw text, [T]."""
    types: npt.NDArray[np.int8] | None = None
    """Token type of each token of text pairs, as BERT-like tokenizers number the two texts, [T]; None: all are 0."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> Int32:
        return self.values[self.offsets[index] : self.offsets[index + 1]]

    @property
    def lengths(self) -> Int64:
        """Return the tokens of each sequence, [N]."""
        return np.diff(self.offsets)

    def take(self, indices: Int64) -> tuple[Int32, Int64]:
        """Return the chosen sequences end to end, and their lengths."""
        return self.values[self._positions(indices)], self.offsets[indices + 1] - self.offsets[indices]

    def take_capitals(self, indices: Int64) -> npt.NDArray[np.bool_] | None:
        """Return `capitals` of the chosen sequences end to end."""
        return None if self.capitals is None else self.capitals[self._positions(indices)]

    def take_types(self, indices: Int64) -> npt.NDArray[np.int8] | None:
        """Return `types` of the chosen sequences end to end."""
        return None if self.types is None else self.types[self._positions(indices)]

    def _positions(self, indices: Int64) -> Int64:
        starts = self.offsets[indices]
        lengths = self.offsets[indices + 1] - starts
        ends = np.cumsum(lengths)
        within = np.arange(int(ends[-1]) if len(ends) else 0) - np.repeat(ends - lengths, lengths)
        positions: Int64 = np.repeat(starts, lengths) + within
        return positions


@dataclass(frozen=True)
class Labelled:
    """A split: N texts as tokens, with their classes."""

    tokens: Ragged
    labels: Int64
    """Indices into the sorted label set, [N]."""

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Int64) -> Labelled:
        values, lengths = self.tokens.take(indices)
        offsets = np.concatenate(([0], np.cumsum(lengths)))
        ragged = Ragged(values, offsets, self.tokens.take_capitals(indices), self.tokens.take_types(indices))
        return Labelled(ragged, self.labels[indices])

    def digests(self, indices: Int64) -> list[str]:
        """Return a hash of the tokens of each chosen text."""
        values, lengths = self.tokens.take(indices)
        return [content_digest(tokens) for tokens in np.split(values, np.cumsum(lengths)[:-1])]


def content_digest(values: npt.NDArray[Any]) -> str:
    """Return a hash of an example's content, 16 hexadecimal digits."""
    return hashlib.blake2b(np.ascontiguousarray(values).tobytes(), digest_size=8).hexdigest()


@dataclass(frozen=True)
class External:
    """Another labelled data set, whose labels serve as an auxiliary objective."""

    label_names: tuple[str, ...]
    train: Labelled


class LabelledSplit(Protocol):
    """Examples, each with a class label."""

    @property
    def labels(self) -> Int64: ...

    def __len__(self) -> int: ...

    def digests(self, indices: Int64) -> list[str]:
        """Return a hash of the content of each chosen example."""
        ...


SplitT = TypeVar("SplitT", bound=LabelledSplit, covariant=True)


@dataclass(frozen=True)
class Task(Generic[SplitT]):
    """What a run reads of an end task of any modality."""

    name: str
    label_names: tuple[str, ...]
    """The sorted label set of train. The metric averages over all of it, also where dev or test lack a class."""
    metric: Metric
    train: SplitT
    dev: SplitT
    test: SplitT
    test_clean: Int64
    """Indices of the test examples that are in neither train nor dev."""
    class_weights: npt.NDArray[np.float32] | None
    """Weight of each class in the end-task loss; None for equal weights."""
    manifest: Mapping[str, Any] = field(default_factory=dict, kw_only=True)
    """What was read, how it was split, what was truncated, as JSON values."""


@dataclass(frozen=True)
class EndTask(Task[Labelled]):
    """Everything that a run reads of an end task of texts."""

    corpora: Mapping[Corpus, Ragged]
    """Unlabelled text by kind. A kind that was not given is absent."""
    external: Mapping[str, External] = field(default_factory=dict)
    """Other labelled data sets by name."""


def balanced_weights(labels: Int64, classes: int) -> npt.NDArray[np.float32]:
    """Return the weight N / (C * N_c) of each of C classes, so that the weights of all N examples sum to N."""
    counts = np.bincount(labels, minlength=classes)
    return (len(labels) / (classes * counts)).astype(np.float32)


TEXT: Final = "text"
"""The modality of end tasks whose examples are texts."""


@dataclass(frozen=True)
class Card:
    """Defaults and origin of a named end task (docs/semantics.md, section 4)."""

    name: str
    topic: str
    metric: Metric
    classes: int
    origin: str
    source: str
    """How to get the data."""
    batch_end_task: int = 128
    batch_auxiliary: int = 256
    batch_dev_head: int = 32
    embedded: bool = False
    """Whether the program fetches the data by itself."""
    modality: str = TEXT
    """What the examples are (`modalities.py`)."""


_CARDS: dict[str, Card] = {}
_ALIASES: dict[str, str] = {}
CARDS: Mapping[str, Card] = MappingProxyType(_CARDS)
"""The named end tasks. Other modalities add theirs."""


def register_cards(cards: Iterable[Card], aliases: Mapping[str, str]) -> None:
    """Add named end tasks, and other names for them (alias to name)."""
    _CARDS.update({card.name: card for card in cards})
    _ALIASES.update(aliases)


def card_named(name: str) -> Card | None:
    """Return the card with this name or alias, if there is one."""
    return _CARDS.get(_ALIASES.get(name, name))


def card_of(data: DataConfig) -> Card | None:
    """Return the card whose defaults an end task takes: that of its name, or of the last part of its folder."""
    return card_named(data.task) or card_named(Path(data.task).expanduser().absolute().name)


def metric_of(data: DataConfig) -> Metric:
    """Return the metric that decides on dev: the configured one, else the card's, else accuracy."""
    card = card_of(data)
    return data.metric or (card.metric if card else "accuracy")


_VADER = "fetched with pip from the source distribution of vaderSentiment 3.3.2"
_DSP = "the repository of Gururangan et al. 2020 (allenai/dont-stop-pretraining) names its download"
_STANCE = "SemEval-2016 task 6 (stance), Mohammad et al. 2016"
_HYPERPARTISAN = "SemEval-2019 task 4 (hyperpartisan news), Kiesel et al. 2019"

register_cards(
    [
        *(
            Card(name, topic, "accuracy", 2, "Hutto & Gilbert 2014 (MIT licence)", _VADER, 32, 48, 32, embedded=True)
            for name, topic in (
                ("movie", "movie reviews"),
                ("tweets", "tweets"),
                ("amazon", "product reviews"),
                ("nyt", "newspaper editorials"),
            )
        ),
        Card("citation_intent", "computer science", "macro_f1", 6, "ACL-ARC, Jurgens et al. 2018", _DSP),
        Card("sciie", "computer science", "macro_f1", 7, "SciERC relations, Luan et al. 2018", _DSP),
        Card("chemprot", "biomedicine", "accuracy", 13, "ChemProt, Kringelum et al. 2016", _DSP),
        Card("se2016", "tweets", "accuracy", 3, _STANCE, "SemEval-2016, task 6"),
        Card("hyperpartisan", "news", "accuracy", 2, _HYPERPARTISAN, _DSP, 64, 128, 8),
    ],
    {"stance": "se2016", "hyperpartisan_news": "hyperpartisan", "acl_arc": "citation_intent"},
)
